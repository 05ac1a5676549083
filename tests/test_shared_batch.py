"""A stacked pass begins with one batch for all groups, which the first perturbed layer makes each group's own."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.optim.check import Checks
from tests.tolerance import bits

ROWS = 6


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def small_cnn():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU(), nn.Linear(8, 5))


def of_signals():
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5))


def of_words():
    return nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 5))


def normed():
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


def frozen_prefix():
    model = nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)
    )
    model[:3].requires_grad_(False)
    return model


MODELS = {
    "conv2d": (small_cnn, (ROWS, 2, 8, 8)),
    "conv1d": (of_signals, (ROWS, 3, 8)),
    "embedding": (of_words, (ROWS, 4)),
    "layer norm": (normed, (ROWS, 8)),
    "frozen": (frozen_prefix, (ROWS, 8)),
}


def batch(shape, step=0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, 11, shape, generator=generator) if len(shape) == 2 and shape[1] == 4 else None
    x = torch.randn(shape, generator=generator) if x is None else x
    return x, torch.randint(0, 5, (shape[0],), generator=generator)


@contextlib.contextmanager
def copies_for_all(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Checks, "may_share", False)
        yield


def seen_rows(module):
    """First dimensions of what a module is given, filled as it runs."""
    rows = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def trained(name, device="cpu", steps=3, **options):
    make, shape = MODELS[name]
    model = ezo.convert_(seeded(make).to(device), head=options.pop("head", 1))
    opt = ezo.ElasticZO(model, lr=1e-3, seed=3, mode="stacked", **options)
    losses = []
    for step in range(steps):
        opt.train_step(*(t.to(device) for t in batch(shape, step)))
        losses.append(opt.losses.clone())
    return model, torch.cat(losses)


@pytest.mark.parametrize("options", [{}, {"queries": 3, "antithetic": False}, {"queries": 2, "head": 0}], ids=str)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "frozen"])
def test_bits_are_those_of_a_copy_a_group(monkeypatch, device, name, options):
    model, losses = trained(name, device, **options)
    with copies_for_all(monkeypatch):
        other, same = trained(name, device, **options)
    assert torch.equal(losses, same)
    for key, value in model.state_dict().items():
        assert torch.equal(bits(value), bits(other.state_dict()[key])), key


@pytest.mark.parametrize("name", MODELS)
def test_the_first_layer_is_given_the_batch_once(name):
    make, shape = MODELS[name]
    model = ezo.convert_(seeded(make), head=1)
    opt = ezo.ElasticZO(model, mode="stacked", queries=2)
    opt.train_step(*batch(shape))
    first, last = seen_rows(model[0]), seen_rows(model[-1])
    opt.train_step(*batch(shape, 1))
    assert first == [ROWS] and last == [4 * ROWS]


@pytest.mark.parametrize("options", [{}, {"queries": 2}, {"queries": 3, "antithetic": False}], ids=str)
def test_what_is_frozen_before_it_runs_once_and_as_each_group_would(options):
    """Batch norm in training and a dropout included: statistics are the batch's, a mask is its query's."""
    stacked, losses = trained("frozen", **options)
    apart = ezo.convert_(seeded(frozen_prefix), head=1)
    opt = ezo.ElasticZO(apart, lr=1e-3, seed=3, mode="sequential", **options)
    alone = []
    for step in range(3):
        opt.train_step(*batch((ROWS, 8), step))
        alone.append(opt.losses.clone())
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-4, atol=1e-5)
    for key in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        torch.testing.assert_close(stacked.state_dict()[key], apart.state_dict()[key], rtol=1e-5, atol=1e-6)


def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped():
    """The first step of an optimizer, which looks whether a batch can be shared, is taken as the others are."""
    make, shape = MODELS["frozen"]

    def steps(model, opt, numbers):
        for step in numbers:
            opt.train_step(*batch(shape, step))
        return model.state_dict(), opt.state_dict()

    def made():
        model = ezo.convert_(seeded(make), head=1)
        return model, ezo.ElasticZO(model, lr=1e-2, seed=3, mode="stacked")

    whole, _ = steps(*made(), range(4))
    half, state = steps(*made(), range(2))
    model, opt = made()
    model.load_state_dict(half)
    opt.load_state_dict(state)
    rest, _ = steps(model, opt, range(2, 4))
    for key, value in whole.items():
        assert torch.equal(bits(value), bits(rest[key])), key


class Skips(nn.Module):
    """Adds its batch to what the first layer made of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) + x)


class CountsRows(Skips):
    """Asks its batch how many rows there are."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)).view(len(x), 8))


class Scales(Skips):
    """Writes into its batch."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.mul_(0.5))))


class Tokens(Skips):
    """Has as many rows as the batches of all groups: [B, 2, 8] as [2 B, 8]."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.flatten(0, 1))).view(-1, 2, 8).mean(1))


class Frames(nn.Module):
    """A convolution of each frame, and the mean over time: [B, 4, 2, 4, 4] has as many rows as all groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        h = torch.relu(self.a(x.flatten(0, 1))).mean((2, 3))
        return self.b(h.view(-1, x.shape[1], 8).mean(1))


class Adapter(nn.Module):
    """A branch of tokens that begins at zero: whose rows are whose does not show in the first losses."""

    def __init__(self):
        super().__init__()
        self.skip, self.a, self.z, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        nn.init.zeros_(self.z.weight), nn.init.zeros_(self.z.bias)

    def forward(self, x):
        branch = torch.tanh(self.a(x.reshape(-1, 8))).view(-1, x.shape[1], 8).mean(1)
        return self.b(self.skip(x).mean(1) + self.z(branch))


class WithLengths(Skips):
    """Gives what is of every group beside what is each one's own."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))), (1000 * x[:, 0]).long() % 3 + 1


class ByValue(Skips):
    """Takes another way for other values: rows as [B, 2, 8], or as [2 B, 8]."""

    def forward(self, x):
        h = self.a(x) if x.sum() > 0 else self.a(x.flatten(0, 1)).view(-1, 2, 8)
        return self.b(torch.tanh(h).mean(1))


class Flattens(Skips):
    """Needs a batch that is densely strided."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.view(-1, 8))))


def loss_of(out, y):
    if not isinstance(out, tuple):
        return F.cross_entropy(out, y)
    return (F.cross_entropy(out[0], y, reduction="none") * out[1]).mean()


HARD = {
    "frames": (Frames, (ROWS, 4, 2, 4, 4), torch.float32),
    "frames in bf16": (Frames, (ROWS, 4, 2, 4, 4), torch.bfloat16),  # whose rounding hides more than a group's share
    "a branch of zeros": (Adapter, (ROWS, 4, 8), torch.float32),
    "outputs of integers": (WithLengths, (ROWS, 8), torch.float32),
    "outputs of integers, two rows": (WithLengths, (2, 8), torch.float32),  # as many as the groups
    "another way by value": (ByValue, (ROWS, 2, 8), torch.float32),
}


@pytest.mark.parametrize("case", HARD)
def test_what_rows_do_not_show_is_seen(case):
    """What perturbed layers made is followed through a first pass; what later ones ask is held against it."""
    make, shape, dtype = HARD[case]
    found = {}
    for mode in ("stacked", "sequential"):
        model = ezo.convert_(seeded(make).to(dtype))
        opt = ezo.ElasticZO(model, lr=1e-3, eps=1e-2, seed=3, mode=mode)
        losses = []
        for step in range(4):
            x, y = batch(shape, step)
            x = x.abs() if step < 2 else -x.abs()
            opt.train_step(x.to(dtype), y, loss_of)
            losses.append(opt.losses.clone())
        found[mode] = torch.cat(losses)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found["stacked"], found["sequential"], **tolerance)


def test_a_batch_that_is_strided_is_made_dense():
    model = ezo.convert_(seeded(Flattens))
    opt = ezo.ElasticZO(model, mode="stacked")
    images = torch.randn(ROWS, 4, 6)
    for x in (torch.randn(ROWS, 2, 4), images[:, 1:3, 1:5], images[:, 1:3, 1:5]):
        opt.train_step(x, batch((ROWS, 8))[1])
    rows = seen_rows(model.a)
    opt.train_step(images[:, 1:3, 1:5], batch((ROWS, 8))[1])
    assert rows == [ROWS] and opt.skipped == 0


def test_bits_do_not_depend_on_where_a_batch_lies():
    """Memory of NumPy's begins at multiples of 16 bytes, and a library's product by where it begins."""
    states = []
    for offset in (0, 1, 2, 3, 4):
        model = seeded(lambda: nn.Sequential(nn.Linear(67, 130), nn.Tanh(), nn.Linear(130, 5)))
        model[0].requires_grad_(False)
        opt = ezo.ElasticZO(ezo.convert_(model), lr=1e-2, seed=3, mode="stacked")
        for step in range(2):
            x, y = batch((3, 67), step)
            memory = torch.empty(x.numel() + offset)
            memory[offset:] = x.flatten()
            opt.train_step(memory[offset:].view(3, 67), y)
        states.append(bits(model[2].weight))
    assert all(torch.equal(states[0], other) for other in states[1:])


@pytest.mark.parametrize("mode", ["stacked", "auto"])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("cls", [Skips, CountsRows, Scales, Tokens])
def test_a_model_that_needs_copies_gets_them(recwarn, cls, inference, mode):
    shape = (ROWS, 2, 8) if cls is Tokens else (ROWS, 8)
    losses, kept = {}, {}
    with torch.inference_mode(inference):
        for own in (mode, "sequential"):
            model = ezo.convert_(seeded(cls))
            opt = ezo.ElasticZO(model, lr=1e-3, seed=3, mode=own)
            losses[own] = []
            for step in range(2):
                x, y = batch(shape, step)
                given = x.clone()
                if own == mode:
                    opt.train_step(x, y)
                else:  # without a copy each group would be given what the one before wrote
                    opt.step(lambda m=model, x=x, y=y: F.cross_entropy(m(x.clone()), y))
                assert torch.equal(x, given)
                losses[own].append(opt.losses.clone())
            kept[own] = opt.mode
    torch.testing.assert_close(*map(torch.cat, losses.values()), rtol=1e-5, atol=1e-6)
    assert kept[mode] == "stacked" and not recwarn.list


def test_rows_of_another_batch_are_looked_at_anew():
    """The decision is of a shape of batch: a later one may be as long as all groups of another."""
    model = ezo.convert_(seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))))
    apart = ezo.convert_(seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))))
    opt, other = (ezo.ElasticZO(m, seed=1, mode=mode) for m, mode in ((model, "stacked"), (apart, "sequential")))
    for step, rows in enumerate((6, 12, 1, 6, 2, 3)):
        x, y = batch((rows, 8), step)
        opt.train_step(x, y)
        other.train_step(x, y)
        torch.testing.assert_close(opt.losses, other.losses, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_decides_nothing():
    model = ezo.convert_(seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))))
    opt = ezo.ElasticZO(model, mode="stacked")
    x, y = batch((ROWS, 8))
    opt.train_step(x * torch.inf, y)
    assert opt.skipped == 1
    first = seen_rows(model[0])
    opt.train_step(x, y)
    assert first == [ROWS, ROWS, ROWS]  # the step, and each group alone
    opt.train_step(x, y)
    assert first[3:] == [ROWS]

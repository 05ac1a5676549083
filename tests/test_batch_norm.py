"""Batch norm of all groups in one operator, on the CPU reference: the bits of torch's own a group, and when it is taken."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import _library, batch_norm
from tests.test_coefficients import Operators
from tests.test_step import bits


class Net(nn.Module):
    """Batch norms of images, of rows, without an affine, without running statistics, and one in the head."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4, momentum=momentum)
        self.fc = nn.Linear(4 * 9, 6)
        self.rows, self.plain = nn.BatchNorm1d(6, track_running_stats=False), nn.BatchNorm1d(6, affine=False)
        self.out, self.last = nn.Linear(6, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = self.plain(torch.relu(self.rows(self.fc(x.flatten(1)))))
        return self.last(self.out(x))


@pytest.fixture
def at_once(monkeypatch):
    """A CPU that takes what a GPU takes; how many groups each call had."""
    seen, inner = [], batch_norm._batch_norm
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    monkeypatch.setattr(
        batch_norm, "_batch_norm", lambda x, w, b, groups, *rest: (seen.append(groups), inner(x, w, b, groups, *rest))
    )
    return seen


def data(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(7, 2, 5, 5, generator=generator), torch.randint(3, (7,), generator=generator)


def run(make=Net, steps=3, frozen=(), layout=torch.contiguous_format, **options):
    torch.manual_seed(0)
    model = make().to(memory_format=layout)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    # not the library's own SGD, which is rounded in another way where a step takes it with its coefficients
    sgd = functools.partial(torch.optim.SGD, lr=0.05)
    opt = ezo.ElasticZO(ezo.convert_(model, head=["out", "last"]), lr=1e-3, seed=1, head_optimizer=sgd, **options)
    for i in range(steps):
        x, y = data(i)
        opt.train_step(x.to(memory_format=layout), y)
    assert opt.skipped == 0
    return bits(model)


@pytest.mark.parametrize(
    "options",
    [{}, {"queries": 3}, {"mode": "sequential"}, {"make": lambda: Net(None)}, {"frozen": ["norm.weight"]},
     {"frozen": ["norm.weight", "norm.bias"]}, {"layout": torch.channels_last}],
    ids=["pair", "queries", "sequential", "average", "frozen weight", "frozen", "channels last"],
)  # fmt: skip
def test_a_step_has_the_bits_of_a_call_a_group(at_once, monkeypatch, options):
    ours = run(**options)
    groups = 1 if options.get("mode") else 2 * options.get("queries", 1)
    assert set(at_once) >= {groups}
    at_once.clear()
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: False)
    theirs = run(**options)
    assert not at_once and all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_launches_do_not_grow_with_queries(monkeypatch):
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    counts = []
    for queries in (1, 8):
        model = ezo.convert_(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)))
        opt = ezo.ElasticZO(model, queries=queries)
        opt.train_step(*data(0))
        with Operators() as seen:
            opt.train_step(*data(0))
        counts.append(sorted(seen.names))
    assert counts[0] == counts[1] and {"batch_norm", "running_statistics"} < set(counts[0])


def test_a_skipped_step_leaves_running_statistics(at_once):
    torch.manual_seed(0)
    model = ezo.convert_(Net(), head=["out", "last"])
    opt, before = ezo.ElasticZO(model), bits(model)
    x, y = data(0)
    opt.train_step(x * float("inf"), y)
    assert opt.skipped == 1 and all(torch.equal(before[k], v) for k, v in bits(model).items())


def test_evaluation_and_one_value_are_torchs(at_once):
    torch.manual_seed(0)
    model = ezo.convert_(Net().eval(), head=["out", "last"])
    ezo.ElasticZO(model).train_step(*data(0))
    assert at_once == [2, 1, 1]  # the one without running statistics; the first step's check has each group alone
    rows = ezo.convert_(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ezo.ElasticZO(rows).train_step(torch.randn(1, 4), torch.tensor([0]))


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_another_number_of_channels_is_refused(at_once, monkeypatch, affine, gpu):
    """[N, L, C] into a batch norm of C: nothing is read or written beyond its buffers, and no weight has moved."""
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: gpu)
    norm = nn.BatchNorm1d(8, affine=affine)
    model = ezo.convert_(nn.Sequential(nn.Linear(4, 8), norm, nn.Flatten(), nn.Linear(96, 3)))
    before = bits(model)
    with pytest.raises(ValueError, match="should contain 12 elements not 8"):
        ezo.ElasticZO(model, lr=1.0).train_step(torch.randn(5, 12, 4), torch.randint(3, (5,)))
    assert not at_once and all(torch.equal(before[k], v) for k, v in bits(model).items())


def test_vmap_is_left_to_torch(at_once):
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x):
            return torch.vmap(self.norm, in_dims=1, out_dims=1)(self.fc(x).view(-1, 2, 3)).flatten(1)

    opt = ezo.ElasticZO(ezo.convert_(Mapped()), mode="sequential")
    opt.train_step(torch.randn(5, 4), torch.randint(6, (5,)))
    assert opt.skipped == 0 and not at_once


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("off", ["tracking", "count"])
def test_what_is_switched_off_later_stays_as_torch_leaves_it(at_once, monkeypatch, off, momentum, gpu):
    """``track_running_stats`` of a norm that has them, for forwards of other data; a count that is None."""

    def make():
        model = Net(momentum)
        for norm in (model.norm, model.last):
            if off == "tracking":
                norm.track_running_stats = False
            else:
                norm.num_batches_tracked = None
        return model

    if not gpu:
        monkeypatch.setattr(_library, "bound_by_launches", lambda device: False)
    torch.manual_seed(0)
    ours, plain = make(), make()
    plain.load_state_dict(ours.state_dict())
    ezo.ElasticZO(ezo.convert_(ours, head=["out", "last"]), lr=0.0, head_lr=0.0, eps=1e-6).train_step(*data(0))
    plain(data(0)[0])
    assert bool(at_once) == gpu
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), msg=name)
    moved = not torch.equal(ours.norm.running_mean, torch.zeros(4))
    assert moved == (off == "count" and momentum is not None)

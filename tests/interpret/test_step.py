"""Whole steps on the kernels: the contract's bitwise points, and the reference's run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import _library
from ezo_kernels.ops._update_triton import update_table


@pytest.fixture(autouse=True)
def plans(monkeypatch, cuda_kernels):
    """Plans with a table of addresses, as CUDA parameters have."""

    def build(cls, params, sites, layouts, noise, z_dtypes, scales):
        rounded = tuple(name != "float32" for name in z_dtypes)
        table = update_table(params, sites, layouts, noise, rounded=rounded, scales=scales)
        where = tuple(map(cls._address, params))
        return cls(tuple(sites), tuple(layouts), where, table, rounded=rounded, scales=tuple(scales))

    monkeypatch.setattr(ezo.ops.UpdatePlan, "build", classmethod(build))


class Net(nn.Module):
    """Every fused layer and a norm, in one small net."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.25)
        self.fc = nn.Linear(4 * 3 * 3, 9)
        self.out = nn.Linear(9, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.out(torch.relu(self.fc(self.drop(x.flatten(1)))))


def start(**kwargs):
    torch.manual_seed(0)
    model = ezo.convert_(Net(), head=["out"])
    return model, ezo.ElasticZO(model, lr=1e-2, eps=1e-2, seed=5, **kwargs)


def data(i: int = 0):
    g = torch.Generator().manual_seed(i)
    return torch.randn(3, 2, 3, 3, generator=g), torch.randint(0, 3, (3,), generator=g)


@pytest.mark.parametrize(("mode", "name"), [("stacked", "gaussian"), ("sequential", "clt4"), ("stacked", "hadamard")])
def test_eps_zero_gives_equal_losses(mode, name):
    _, opt = start(mode=mode, noise=name, queries=2)
    opt._eps.zero_()
    opt.train_step(*data())
    # one dropout mask a query: the two signs of a query are equal, the queries are not
    assert opt.losses[0] == opt.losses[1] and opt.losses[2] == opt.losses[3]


@pytest.mark.parametrize("name", ["clt4", "hadamard", "rademacher"])
def test_update_uses_the_forward_z_bitwise(name):
    model, opt = start(noise=name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt.train_step(*data())
    for s in model._ezo.manifest:
        z = ezo.ops.materialize(s.shape, seed=5, step=0, site=s.site, layout=s.layout, noise=name)
        assert torch.equal(model.state_dict()[s.names[0]], before[s.names[0]] - (opt._lr * opt.g) * z), s.names


@pytest.mark.parametrize("strategy", ["auto", "two_products"])
def test_a_step_of_16_bits_applies_the_rounded_z_bitwise(strategy, on_cpu):
    """fp16, whose products the interpreter can make: losses near the reference's, and the update's bits by our own g."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 18).half(), torch.tensor([0, 1, 2, 0])

    def run():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(18, 24), nn.ReLU(), nn.Linear(24, 3)).half()
        ezo.convert_(model, strategy=strategy)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        opt = ezo.ElasticZO(model, lr=1e-1, eps=1e-1, seed=5, noise="clt4", stochastic_rounding=False)
        opt.train_step(x, y, lambda out, y: nn.functional.cross_entropy(out.float(), y))
        return model, opt, before

    model, opt, before = run()
    for s in model._ezo.manifest:
        name, z = s.names[0], ezo.ops.materialize(s.shape, seed=5, step=0, site=s.site, noise="clt4")
        z = z.half().float() if name.endswith("weight") else z
        want = (before[name].float() - (opt._lr * opt.g) * z).half()
        assert torch.equal(model.state_dict()[name], want), name
    torch.testing.assert_close(opt.losses, on_cpu(run)[1].losses, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("mode", "name"), [("stacked", "gaussian"), ("sequential", "clt4")])
def test_two_steps_follow_the_reference(mode, name, on_cpu):
    def run():
        model, opt = start(mode=mode, noise=name, queries=2, clip=5.0)
        for i in range(2):
            opt.train_step(*data(i))
        return [v.clone() for v in model.state_dict().values()], opt.losses.clone()

    (ours, losses), (want, expected) = run(), on_cpu(run)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def test_steps_on_drawn_rows_follow_the_reference(on_cpu):
    def run():
        model, opt = start(noise="clt4", importance_rows=3, head_lr=0.1)
        model.norm.eval()
        x, y = torch.randn(9, 2, 3, 3, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 3
        for _ in range(2):
            opt.train_step(x, y)
        return opt.losses.clone(), {k: v.clone() for k, v in model.state_dict().items()}

    (losses, weights), (near, reference) = run(), on_cpu(run)
    torch.testing.assert_close(losses, near, rtol=1e-4, atol=1e-6)
    for name, value in weights.items():
        torch.testing.assert_close(value, reference[name], rtol=1e-4, atol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing():
    model, opt = start()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = data()
    opt.train_step(x * float("inf"), y)
    assert opt.skipped.item() == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class TwoOfHead(nn.Sequential):
    """A trunk of one layer below a head of two."""

    def __init__(self):
        super().__init__(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("mode", "head_grad"), [("stacked", "mean"), ("stacked", "plus"), ("stacked", "minus"), ("sequential", "mean")]
)
def test_a_head_in_one_launch_learns_as_a_call_a_group_does(on_cpu, monkeypatch, head_grad, mode):
    """As a GPU takes it: the losses, the head's layers and their gradients for all groups at once."""

    def train(at_once):
        monkeypatch.setattr(_library, "bound_by_launches", lambda device: at_once)
        torch.manual_seed(0)
        model = ezo.convert_(TwoOfHead(), head=["2", "4"])
        opt = ezo.ElasticZO(model, lr=1e-2, eps=1e-2, queries=2, head_grad=head_grad, seed=1, mode=mode)
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            opt.train_step(torch.randn(7, 6, generator=generator), torch.randint(3, (7,), generator=generator))
        assert opt.skipped == 0
        return opt.losses, [p.detach() for p in model.parameters()]

    (losses, ours), (expected, theirs) = train(True), train(False)
    (reference, apart) = on_cpu(train, True)
    for a, b in ((losses, expected), (losses, reference)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b, c in zip(ours, theirs, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_eps_zero_gives_equal_losses_with_a_head_in_one_launch(monkeypatch, mode):
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    opt = ezo.ElasticZO(ezo.convert_(TwoOfHead(), head=["2", "4"]), queries=3, mode=mode)
    opt._eps.zero_()
    opt.train_step(torch.randn(33, 6), torch.randint(3, (33,)))
    assert (opt.losses == opt.losses[0]).all()

"""A relu as part of an integer linear layer: the bits of doing it after, in one launch."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.nn import linear_relu
from ezo_kernels.nn.convert import context_of
from tests.int8_models import exponents, given, randint
from tests.test_int8_ops import a_pass, multiplier  # noqa: F401 - the fixture

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check(x, w, b, p, **how):
    how = {
        "weight_exponent": exponents(-9).to(w.device), "site": 3, "bias_site": 17,
        "bias_exponent": None if b is None else exponents(-3).to(w.device), **how,
    }  # fmt: skip
    y = ops.int8_linear(x, w, b, p, strategy="buffer", **how)
    want = F.relu(y)
    assert not torch.equal(want.values, y.values) and want.values.any()
    for strategy in ("buffer", "twice"):
        got = ops.int8_linear(x, w, b, p, strategy=strategy, relu=True, **how)
        assert torch.equal(got.values, want.values) and torch.equal(got.exponent, y.exponent), strategy


@pytest.mark.parametrize("rounding", ["nearest", "pseudo"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 9, 16), (5, 33, 70), (40, 20, 128)])
@pytest.mark.parametrize("weights", ["fused", "slab"])
def test_is_what_the_two_give(rows, n, k, rounding, weights, multiplier, device):  # noqa: F811
    w, b = randint(n, k, seed=1).to(device), randint(n, seed=2).to(device)
    for p in (a_pass(device), a_pass(device, 3, (-1,)), a_pass(device, signs=(0,)), None):
        x = given(2 if p is None else p.groups, rows, k, device=device)
        check(x, w, b, p, rounding=rounding, weights=weights)
    check(given(1, rows, k, device=device), w, None, a_pass(device, 2), rounding=rounding, weights=weights)


def test_small_accumulators_are_not_shifted(multiplier, device):  # noqa: F811
    """They fit into int8 as they are: the other branch of the rounding."""
    x, w = given(2, 3, 2, device=device), torch.tensor([[1, 0], [-1, 0]], dtype=torch.int8, device=device)
    x.values.clamp_(-5, 5)
    check(x, w, None, None, rounding="nearest")


def test_in_chunks_is_the_same(monkeypatch):
    monkeypatch.setattr(sys.modules["ezo_kernels.ops.int8_linear"], "CHUNK_BYTES", 300)
    check(given(2, 7, 20), randint(12, 20, seed=1), randint(12, seed=2), a_pass())


class Layers(nn.Module):
    """Two with a relu between them, by a function or by the two."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.first, self.second, self.out = nn.Linear(12, 9), nn.Linear(9, 8), nn.Linear(8, 4)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = linear_relu(layer, x) if self.fused else F.relu(layer(x))
        return self.out(x)


class Launches(TorchDispatchMode):
    """Counts the operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def trained(make, head, **options):
    """With relus by a function, and by the two: losses and parameters after four steps, and the operators of the last."""
    x = ezo.quantize(torch.randn(5, 12, generator=torch.Generator().manual_seed(0)))
    y, start = torch.tensor([0, 1, 2, 3, 0]), make(True).state_dict()
    for fused in (True, False):
        model = make(fused)
        model.load_state_dict(start)
        opt = ezo.ElasticZOInt8(
            ezo.convert_(model, head=head, precision="int8"), r_max=15, p_zero=0.5, seed=3, **options
        )
        losses = [int(opt.train_step(x, y)) for _ in range(3)]
        with Launches() as seen:
            losses.append(int(opt.train_step(x, y)))
        yield losses, model.state_dict(), seen.names


def assert_same(ours, theirs) -> None:
    assert ours[0] == theirs[0] and all(torch.equal(ours[1][name], value) for name, value in theirs[1].items())


@pytest.mark.parametrize("strategy", ["twice", "buffer"])
@pytest.mark.parametrize("head", [0, ["out"], ["second", "out"]], ids=str)
def test_a_step_has_the_bits_of_the_two_in_fewer_launches(strategy, head):
    fused, apart = trained(Layers, head, strategy=strategy)
    assert_same(fused, apart)
    masks = 0 if not head else len(head) - 1  # what rounds an error sees to them
    for (_, _, names), relus, masked in ((fused, 0, 0), (apart, 2, masks)):
        assert names.count("ezo::int8_relu") == relus
        assert sum(name in ("aten::masked_fill.Scalar", "aten::masked_fill.Tensor") for name in names) == masked


class Residual(nn.Module):
    """A relu that two layers of the head read: its errors are added before it stops them."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.first, self.second = nn.Linear(12, 9), nn.Linear(9, 8)
        self.third, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = linear_relu(self.second, x) if self.fused else F.relu(self.second(x))
        x = x + self.third(x)
        y = linear_relu(self.out, x) if self.fused else F.relu(self.out(x))
        return y.flatten(1)


def test_a_relu_that_several_layers_read():
    assert_same(*trained(Residual, ["second", "third", "out"], head_bits=4))


def test_a_layer_that_no_pass_perturbs_is_the_same():
    """Outside of a pass, and frozen inside of one."""
    model = Layers(True)
    model.first.requires_grad_(False)
    ezo.convert_(model, head=["out"], precision="int8")
    x = ezo.quantize(torch.randn(4, 12))
    plain = F.relu(model.first(x))
    assert torch.equal(linear_relu(model.first, x).values, plain.values)
    with context_of(model).running(a_pass(), 8):
        got = linear_relu(model.first, x)
    assert torch.equal(got.values, plain.values) and torch.equal(got.exponent, plain.exponent)

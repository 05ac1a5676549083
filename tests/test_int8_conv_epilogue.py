"""Pooling and relu as part of an integer convolution: the bits, the launches and the memory of doing them after it."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.nn import conv_pool_relu
from ezo_kernels.nn.convert import context_of
from ezo_kernels.ops import Int8Tensor
from tests.int8_models import exponents, given, randint
from tests.test_int8_ops import CONVS, a_pass, multiplier  # noqa: F401 - the fixture

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check(x, w, b, p, relu, pool, **how):
    how = {
        "weight_exponent": exponents(-9).to(w.device), "site": 3, "bias_site": 17,
        "bias_exponent": None if b is None else exponents(-3).to(w.device), **how,
    }  # fmt: skip
    y = ops.int8_conv2d(x, w, b, p, strategy="buffer", **how)
    want = F.max_pool2d(y, 2) if pool == 2 else y
    want = F.relu(want) if relu else want
    for strategy in ("buffer", "twice"):
        got = ops.int8_conv2d(x, w, b, p, strategy=strategy, relu=relu, pool=pool, **how)
        assert torch.equal(got.values, want.values), strategy
        assert torch.equal(got.exponent, y.exponent), strategy
    return got


@pytest.mark.parametrize(("relu", "pool"), [(True, 1), (False, 2), (True, 2)])
@pytest.mark.parametrize("case", CONVS[:6], ids=lambda c: f"{c['kernel']}x{c['c']}g{c.get('groups', 1)}")
@pytest.mark.parametrize("rounding", ["nearest", "pseudo"])
def test_is_what_the_three_give(case, relu, pool, rounding, multiplier, device):  # noqa: F811
    how = {k: v for k, v in case.items() if k in ("stride", "padding", "dilation", "groups")}
    x = given(2, 3, case["c"], *case["size"], device=device)
    w = randint(case["o"], case["c"] // case.get("groups", 1), *case["kernel"], seed=1).to(device)
    b = randint(case["o"], seed=2).to(device)
    for p in (a_pass(device), a_pass(device, signs=(0,)), None):
        check(x, w, b, p, relu, pool, rounding=rounding, **how)


@pytest.mark.parametrize("weights", ["fused", "slab"])
@pytest.mark.parametrize("shared", [False, True])
def test_passes(weights, shared, multiplier, device):  # noqa: F811
    for queries, signs in ((3, (1, -1)), (2, (-1,))):
        p = a_pass(device, queries, signs)
        x = given(1 if shared else p.groups, 2, 4, 7, 5, device=device)
        check(x, randint(6, 4, 3, 3, seed=1).to(device), None, p, True, 2, padding=1, weights=weights)


def test_the_largest_magnitude_counts_where_no_window_is(multiplier, device):  # noqa: F811
    """Of 3 x 3 outputs a window covers the first four; the shift is that of the last one."""
    values = torch.ones(1, 1, 3, 3, dtype=torch.int8)
    values[0, 0, 2, 2] = 127
    x = Int8Tensor(values.to(device), exponents(0).to(device))
    w = torch.full((1, 1, 1, 1), 100, dtype=torch.int8, device=device)
    y = check(x, w, None, None, True, 2)
    assert y.exponent.tolist() == [-9 + (12_700).bit_length() - 7]
    assert y.values.tolist() == [[[[(100 + 64) >> 7]]]]


def test_in_chunks_is_the_same(monkeypatch):
    monkeypatch.setattr(sys.modules["ezo_kernels.ops.int8_conv2d"], "CHUNK_BYTES", 1500)
    for groups in (1, 2):
        w = randint(6, 4 // groups, 3, 3, seed=1)
        check(given(2, 7, 4, 6, 6), w, randint(6, seed=2), a_pass(), True, 2, padding=1, groups=groups)


@pytest.mark.parametrize("pool", [0, 3, None])
def test_other_windows_are_refused(pool):
    with pytest.raises(ValueError, match=f"int8_conv2d: pool must be 1 or 2, got {pool}"):
        check(given(2, 1, 2, 4, 4), randint(3, 2, 3, 3), None, a_pass(), False, pool)


def test_an_output_without_a_window_is_refused():
    x, w = given(2, 1, 2, 3, 6), randint(3, 2, 3, 3)
    with pytest.raises(ValueError, match=r"int8_conv2d: an output of \(1, 4\) has no window of 2 x 2"):
        ops.int8_conv2d(x, w, None, a_pass(), weight_exponent=exponents(-9), pool=2)


class Convolutions(nn.Module):
    """One that pools, and what follows it, by a function or by the three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.conv = nn.Conv2d(2, 3, 3, padding="same")
        self.out = nn.Linear(36, 4)

    def forward(self, x):
        x = conv_pool_relu(self.conv, x) if self.fused else F.relu(F.max_pool2d(self.conv(x), 2))
        return self.out(x.flatten(1))


@pytest.mark.parametrize("strategy", ["twice", "buffer", "auto"])
@pytest.mark.parametrize("head", [0, ["out"]], ids=str)
def test_a_step_has_the_bits_of_the_three_in_less_memory(strategy, head):
    x = ezo.quantize(torch.randn(5, 2, 7, 9, generator=torch.Generator().manual_seed(0)))
    y, found = torch.tensor([0, 1, 2, 3, 0]), []
    start = Convolutions(True).state_dict()
    for fused in (True, False):
        model = Convolutions(fused)
        model.load_state_dict(start)
        model = ezo.convert_(model, head=head, precision="int8")
        opt = ezo.ElasticZOInt8(model, r_max=15, p_zero=0.5, seed=3, strategy=strategy)
        losses = [opt.train_step(x, y) for _ in range(3)]
        found.append((model.state_dict(), losses, opt.memory()["planned_bytes"], opt.memory()["measured_bytes"]))
    (ours, own, bytes_, measured), (theirs, other, plain, _) = found
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(own, other, strict=True))
    assert bytes_ == measured
    assert (bytes_ < plain) == (strategy != "buffer")


def test_a_convolution_that_no_pass_perturbs_is_the_same():
    """Outside of a pass, and frozen inside of one."""
    model = Convolutions(True)
    model.conv.requires_grad_(False)
    ezo.convert_(model, head=["out"], precision="int8")
    x = ezo.quantize(torch.randn(4, 2, 7, 9))
    plain = F.relu(F.max_pool2d(model.conv(x), 2))
    assert torch.equal(conv_pool_relu(model.conv, x).values, plain.values)
    with context_of(model).running(a_pass(), 8):
        got = conv_pool_relu(model.conv, x)
    assert torch.equal(got.values, plain.values) and torch.equal(got.exponent, plain.exponent)

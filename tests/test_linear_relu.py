"""Relu as part of a perturbed linear layer, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.nn import linear_relu
from ezo_kernels.nn.convert import context_of
from tests.materialised import Pass, randn
from tests.tolerance import assert_bitwise_equal

SITE = {"site": 1, "bias_site": 2}


@pytest.mark.parametrize("strategy", ["auto", "fused", "two_products", "slab"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "signs"), [(1, (1, -1)), (2, (-1,))])
@pytest.mark.parametrize("shared", [False, True])
def test_is_what_torch_makes_of_the_output(strategy, dtype, queries, signs, shared, device):
    p = Pass(device, queries=queries, signs=signs, eps=0.1)
    rows = 3 * (1 if shared else p.p.groups)
    x, w, b = (randn(*s, seed=i, dtype=dtype, device=device) for i, s in enumerate([(rows, 2, 24), (17, 24), (17,)]))
    for bias in (b, None):
        how = {"shared": shared, "strategy": strategy, "precision": "ieee", **SITE}
        if strategy == "two_products":
            how["z_dtype"] = str(dtype).removeprefix("torch.")
        y = ops.perturbed_linear(x, w, bias, p.p, **how)
        assert (y < 0).any() and (y > 0).any()
        assert_bitwise_equal(ops.perturbed_linear(x, w, bias, p.p, relu=True, **how), F.relu(y))


@pytest.mark.parametrize("strategy", ["fused", "two_products", "slab"])
def test_nan_stays(strategy, device):
    x, w = randn(4, 8, device=device), randn(5, 8, seed=1, device=device)
    x[1, 3] = math.nan
    y = ops.perturbed_linear(x, w, None, Pass(device).p, relu=True, strategy=strategy, **SITE)
    assert y[1].isnan().all() and y.isnan().sum() == 5


def test_other_forms(device):
    """A weight stored the other way round, x of one row, an output that is not written in one piece."""
    one = Pass(device, signs=(1,)).p
    x, w = randn(8, device=device), randn(8, 5, seed=1, device=device)
    y = ops.perturbed_linear(x, w, None, one, transposed=True, **SITE)
    assert_bitwise_equal(ops.perturbed_linear(x, w, None, one, transposed=True, relu=True, **SITE), F.relu(y))


@pytest.mark.parametrize("head", [["2"], 0], ids=str)
def test_layer_gives_the_bits_of_the_two_in_and_outside_a_pass(head):
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2))
    linear, x = net[0], randn(4, 6)
    plain = F.relu(linear(x))
    assert_bitwise_equal(linear_relu(linear, x), plain)  # torch's own layer
    zo = context_of(ezo.convert_(net, head=head))
    assert_bitwise_equal(linear_relu(linear, x), plain)
    stacked = torch.cat([x, x])
    with zo.running(Pass("cpu", eps=0.1).p, 8):
        got, want = linear_relu(linear, stacked), F.relu(linear(stacked))
    assert_bitwise_equal(got, want)
    assert not torch.equal(got[:4], plain)


def test_a_layer_of_the_head_keeps_its_gradient():
    net = ezo.convert_(nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 3)), head=["1"])
    y = linear_relu(net[1], randn(4, 9))
    y.sum().backward()
    assert net[1].weight.grad is not None and net[1].weight.grad.abs().sum() > 0

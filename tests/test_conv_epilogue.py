"""Relu and pooling as part of a perturbed convolution, on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.nn import conv_pool_relu
from ezo_kernels.nn.convert import context_of
from ezo_kernels.ops import Noise, Perturbation
from ezo_kernels.ops.noise import key_tensor
from tests.materialised import randn
from tests.tolerance import assert_bitwise_equal

SITE = {"site": 1, "bias_site": 2}


def one(queries=1, eps=0.1, signs=(1, -1)):
    return Perturbation(key_tensor(1, 2), torch.tensor([eps]), Noise("gaussian"), 0, queries, signs)


@pytest.mark.parametrize("strategy", ["fused", "slab"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("relu", "pool"), [(True, 1), (False, 2), (True, 2)])
@pytest.mark.parametrize("size", [(7, 9), (4, 4)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_is_what_torch_makes_of_the_output(strategy, dtype, relu, pool, size, shared):
    p = one(queries=2)
    x, w, b = randn(3 if shared else 12, 4, *size, dtype=dtype), randn(6, 4, 3, 3, dtype=dtype), randn(6, dtype=dtype)
    for last in (False, True):
        x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        how = {"shared": shared, "padding": 1, "strategy": strategy, **SITE}
        want = F.max_pool2d(ops.perturbed_conv2d(x, w, b, p, **how), pool)
        got = ops.perturbed_conv2d(x, w, b, p, relu=relu, pool=pool, **how)
        assert_bitwise_equal(got, want.relu() if relu else want)
        assert got.is_contiguous(memory_format=torch.channels_last) == last


@pytest.mark.parametrize("pool", [0, 3, -2, 2.5, None])
def test_other_windows_are_refused(pool):
    with pytest.raises(ValueError, match=f"pool must be 1 or 2, got {pool}"):
        ops.perturbed_conv2d(randn(2, 1, 4, 4), randn(1, 1, 3, 3), None, one(), pool=pool, **SITE)


def test_an_output_without_a_window_is_refused():
    with pytest.raises(ValueError, match=r"an output of \(1, 4\) has no window of 2 x 2"):
        ops.perturbed_conv2d(randn(2, 1, 3, 6), randn(1, 1, 3, 3), None, one(), pool=2, **SITE)


@pytest.mark.parametrize("arch", [0, 80, 90])
def test_info_names_the_strategy_that_the_unpooled_output_has(arch):
    lenet = ezo.convert_(ezo.models.LeNet5(), head=["fc2", "fc3"])
    x = randn(2048, 1, 28, 28)
    plain = ezo.convert_(nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.Flatten(), nn.Linear(4704, 2)), head=["2"])
    rows = {row.name: row for row in ezo.summary(lenet, x, arch=arch).rows}
    (want, *_) = ezo.summary(plain, x, arch=arch).rows
    found = rows["conv1"]
    assert found.strategy and (found.strategy, found.workspace_bytes) == (want.strategy, want.workspace_bytes)


@pytest.mark.parametrize("pad", ["same", 2, 0])
def test_layer_gives_the_bits_of_the_three_in_and_outside_a_pass(pad):
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=pad), nn.Flatten(), nn.LazyLinear(2))
    x = randn(4, 2, 7, 9)
    net(x)
    conv, plain = net[0], F.relu(F.max_pool2d(net[0](x), 2))
    assert_bitwise_equal(conv_pool_relu(conv, x), plain)  # torch's own layer
    zo = context_of(ezo.convert_(net, head=["2"]))
    assert_bitwise_equal(conv_pool_relu(conv, x), plain)
    stacked = torch.cat([x, x])
    with zo.running(one(), 8):
        got, want = conv_pool_relu(conv, stacked), F.relu(F.max_pool2d(conv(stacked), 2))
    assert_bitwise_equal(got, want)
    assert not torch.equal(got[:4], plain)

"""Sums of fp32 products by compiled kernels: no further from the truth than the contract has it, however long K is."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels import ops
from ezo_kernels.ops.noise import Noise
from tests.tolerance import assert_within_torch_error

SITE, BIAS_SITE = 0xFEDCBA98, 7


def numbers(*shapes):
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def perturbation(key, noise):
    return ops.Perturbation(key, torch.tensor([1e-3]), Noise(noise), query=3)


@pytest.mark.parametrize("k", [129, 1000, 2048])
@pytest.mark.parametrize(("strategy", "noise"), [("fused", "clt4"), ("two_products", "rademacher")])
def test_linear(on_cpu, key, strategy, noise, k):
    """Few rows, where torch makes many short sums: one long sum in the kernel misses the rule by up to 1.7 times."""
    x, w, b = numbers((2, k), (65, k), (65,))
    p = perturbation(key, noise)
    ours = ops.perturbed_linear(x, w, b, p, site=SITE, bias_site=BIAS_SITE, strategy=strategy)
    weights, biases = (on_cpu(ops.perturb, t, p, site=site) for t, site in ((w, SITE), (b, BIAS_SITE)))
    parts = list(zip(x.chunk(2), weights, biases, strict=True))
    exact = torch.cat([own.double() @ weight.double().t() + bias.double() for own, weight, bias in parts])
    near = torch.cat([torch.nn.functional.linear(*part) for part in parts])
    assert_within_torch_error(ours, near, exact)


def test_conv2d(on_cpu, key):
    x, w = numbers((2, 128, 5, 5), (33, 128, 5, 5))
    p = perturbation(key, "clt4")
    ours = ops.perturbed_conv2d(x, w, None, p, site=SITE, strategy="fused")
    parts = list(zip(x.chunk(2), on_cpu(ops.perturb, w, p, site=SITE), strict=True))
    exact = torch.cat([torch.nn.functional.conv2d(own.double(), weight.double()) for own, weight in parts])
    near = torch.cat([torch.nn.functional.conv2d(*part) for part in parts])
    assert_within_torch_error(ours, near, exact)

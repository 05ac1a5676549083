"""Products of compiled kernels: bf16, fp16 and tf32 on the tensor core, by every strategy that has no workspace."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels import ops
from ezo_kernels.ops.noise import Noise
from tests.tolerance import assert_bitwise_equal, error

SITE, BIAS_SITE = 0xFEDCBA98, 7
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def problem(rows, n, k, dtype, transposed=False):
    """x of two groups, weight and bias."""
    generator = torch.Generator().manual_seed(rows + n + k)
    shapes = (2 * rows, k), (k, n) if transposed else (n, k), (n,)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def options_of(dtype, **more):
    z_dtype = "float32" if dtype == F32 else str(dtype).removeprefix("torch.")
    return {"site": SITE, "bias_site": BIAS_SITE, "precision": "tf32", "z_dtype": z_dtype, **more}


def perturbed(key, x, w, b, noise, eps=0.3, **options):
    p = ops.Perturbation(key, torch.tensor([eps]), Noise(noise), query=3)
    return ops.perturbed_linear(x, w, b, p, **options)


def to_tf32(t):
    """fp32 with ten bits behind the point, to nearest: what the tensor core reads of it at best."""
    return (t.float().view(torch.int32) + 0x1000 & ~0x1FFF).view(F32)


def truth(on_cpu, key, x, w, b, noise, dtype, transposed, rounded=lambda t: t):
    """In fp64, of the z that the kernels round to their dtype; and torch's own product of such weights, made of ``rounded``."""
    p = ops.Perturbation(key, torch.tensor([1.0]), Noise(noise), query=3, signs=(1,))
    z, z_bias = (
        on_cpu(ops.perturb, torch.zeros(t.shape), p, site=site)[0].to(dtype).double()
        for t, site in ((w, SITE), (b, BIAS_SITE))
    )
    w, z = (w.t(), z.t()) if transposed else (w, z)
    eps, exact, near = torch.tensor(0.3).double(), [], []
    for sign, own in zip((1, -1), x.chunk(2), strict=True):
        weight, bias = w.double() + sign * eps * z, b.double() + sign * eps * z_bias
        exact.append(own.double() @ weight.t() + bias)
        near.append(torch.nn.functional.linear(rounded(own), rounded(weight.to(dtype)), bias.to(dtype)))
    return torch.cat(exact), torch.cat(near)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "n", "k"), [(5, 24, 40), (64, 128, 128), (70, 130, 72)])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("strategy", ["fused", "two_products"])
def test_sixteen_bits(on_cpu, key, strategy, dtype, rows, n, k, transposed):
    """At most twice torch's own error: the perturbed weight is rounded to 16 bits once, or not at all."""
    if strategy == "two_products" and transposed:
        with pytest.raises(NotImplementedError, match="stored"):
            perturbed(
                key, *problem(rows, n, k, dtype, True), "clt4", **options_of(dtype, strategy=strategy, transposed=True)
            )
        return
    x, w, b = problem(rows, n, k, dtype, transposed)
    ours = perturbed(key, x, w, b, "clt4", **options_of(dtype, strategy=strategy, transposed=transposed))
    exact, near = truth(on_cpu, key, x, w, b, "clt4", dtype, transposed)
    assert error(ours, exact) <= 2 * error(near, exact)


@pytest.mark.parametrize("noise", ["gaussian", "hadamard", "rademacher", "sparse", "uniform"])
@pytest.mark.parametrize("strategy", ["fused", "two_products"])
def test_noises(on_cpu, key, strategy, noise):
    x, w, b = problem(64, 64, 128, BF16)
    ours = perturbed(key, x, w, b, noise, **options_of(BF16, strategy=strategy))
    exact, near = truth(on_cpu, key, x, w, b, noise, BF16, False)
    assert error(ours, exact) <= 2 * error(near, exact)


@pytest.mark.parametrize("transposed", [False, True])
def test_tf32(on_cpu, key, transposed):
    x, w, b = problem(64, 64, 96, F32, transposed)
    ours = perturbed(key, x, w, b, "clt4", **options_of(F32, strategy="fused", transposed=transposed))
    exact, near = truth(on_cpu, key, x, w, b, "clt4", F32, transposed, to_tf32)
    assert error(ours, exact) <= 2 * error(near, exact)


@pytest.mark.parametrize(("strategy", "dtype"), [("fused", BF16), ("fused", F32), ("two_products", BF16)])
def test_without_eps_both_signs_have_the_same_bits(key, strategy, dtype):
    x, w, b = problem(33, 48, 72, dtype)
    x[33:] = x[:33]
    plus, minus = perturbed(key, x, w, b, "gaussian", eps=0.0, **options_of(dtype, strategy=strategy)).chunk(2)
    assert_bitwise_equal(plus, minus)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolutions(on_cpu, key, dtype, memory):
    """As the products: at most twice torch's own error, of weights rounded once."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 16, 9, 9, generator=generator).to(dtype).to(memory_format=memory)
    w = torch.randn(24, 16, 3, 3, generator=generator).to(dtype).to(memory_format=memory)
    p = ops.Perturbation(key, torch.tensor([0.3]), Noise("clt4"), query=3)
    ours = ops.perturbed_conv2d(x, w, None, p, site=SITE, padding=1, precision="tf32", strategy="fused")
    unit = ops.Perturbation(key, torch.tensor([1.0]), Noise("clt4"), query=3, signs=(1,))
    z = torch.tensor(0.3).double() * on_cpu(ops.perturb, torch.zeros(w.shape), unit, site=SITE)[0].double()
    rounded = to_tf32 if dtype == F32 else lambda t: t
    exact, near = [], []
    for sign, own in zip((1, -1), x.chunk(2), strict=True):
        weight = w.double() + sign * z
        exact.append(torch.nn.functional.conv2d(own.double(), weight, padding=1))
        near.append(torch.nn.functional.conv2d(rounded(own), rounded(weight.to(dtype)), padding=1))
    exact = torch.cat(exact)
    assert error(ours, exact) <= 2 * error(torch.cat(near), exact)

"""The perturbed pair of a linear layer against what it replaces: ``pytest bench/bench_linear.py``.

| case | is |
|---|---|
| two plain | two forwards of B rows with the weight as it is: what no pair can beat by more than a factor of two |
| one plain | one forward of 2 B rows |
| fused | :func:`perturbed_linear`, both signs in one launch, z never in memory; by auto and by each strategy forced |
| materialised | z in memory, W + eps z and W - eps z beside it, two forwards |

What torch.compile makes of these is a suite of its own (``bench_compiled.py``): it takes minutes. Efficiency is the time of the
fastest plain one over that of fused, inside CUDA graphs. On a GPU weights rotate over 200 MB.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from bench.derivative import cosine
from bench.timing import copies, devices, rotate, time_case
from ezo_kernels.ops import Noise, Perturbation, materialize, perturb, perturbed_linear
from ezo_kernels.ops.noise import key_tensor
from tests.tolerance import assert_within_torch_error

#: device -> (rows a sign, outputs, inputs, dtype)
SHAPES = {
    "cpu": [(32, 120, 784, torch.float32), (32, 1024, 1024, torch.float32)],
    "cuda": [
        *((rows, n, n, torch.bfloat16) for n in (4096, 8192) for rows in (16, 64, 512, 2048, 8192, 1)),
        (64, 4096, 4096, torch.float32),
        (32, 120, 784, torch.float32),
    ],
}
NOISES = {
    "cpu": ["gaussian", "clt4", "hadamard", "rademacher"],
    "cuda": ["hadamard", "clt4", "gaussian", "rademacher", "gaussian_fast"],
}
SEED, STEP, SITE = 1, 2, 3
#: Rows of a sign that are compared.
FEW = 16
CASES = [
    pytest.param(device, *shape, id=f"{device}-{shape[0]}x{shape[1]}x{shape[2]}-{str(shape[3])[6:]}")
    for device in devices()
    for shape in SHAPES[device]
]
NOISY = [
    pytest.param(*case.values, noise, id=f"{case.id}-{noise}") for case in CASES for noise in NOISES[case.values[0]]
]


def operands(device, rows, n, k, dtype, noise="gaussian"):
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2 * rows, k, generator=generator, device=device).to(dtype)
    w = (torch.randn(n, k, generator=generator, device=device) * k**-0.5).to(dtype)
    p = Perturbation(key_tensor(SEED, STEP, device), torch.tensor([1e-3], device=device), Noise(noise))
    return x, [w.clone() for _ in range(copies(w))], p


def materialised(x, w, p, z):
    step = z.to(torch.float32) * p.eps
    plus, minus = x.chunk(2)
    w = w.to(torch.float32)
    return torch.cat([F.linear(plus, (w + step).to(x.dtype)), F.linear(minus, (w - step).to(x.dtype))])


@functools.lru_cache(maxsize=2)
def reference(shape, noise: str, device):
    """z from the CPU where the noise is the same everywhere, from this device where it is not."""
    portable = Noise(noise).portable
    return materialize(shape, seed=SEED, step=STEP, site=SITE, noise=noise, device="cpu" if portable else device)


def check(x, w, p, run, few: int = FEW, z_dtype=torch.float32):
    """The first rows of both groups against fp64 with z from the reference; a case that is wrong is not timed."""
    z = reference(w.shape, p.noise.name, w.device).to(w.device).to(z_dtype).float()
    rows = x.shape[0] // 2
    some = [slice(0, min(few, rows)), slice(rows, rows + min(few, rows))]
    moved = p.eps.double() * z.double()
    truth = torch.cat([F.linear(x[s].double(), w.double() + moved * (1 - 2 * i)) for i, s in enumerate(some)])
    same, ours = materialised(torch.cat([x[s] for s in some]), w, p, z), run()
    assert_within_torch_error(torch.cat([ours[s] for s in some]), same, truth, "bench")


@pytest.mark.parametrize(("device", "rows", "n", "k", "dtype"), CASES)
@pytest.mark.parametrize("stacked", [False, True], ids=["two plain", "one plain"])
def test_plain(benchmark, device, rows, n, k, dtype, stacked):
    x, weights, _ = operands(device, rows, n, k, dtype)
    parts = [x] if stacked else list(x.chunk(2))
    run = rotate(lambda w: [F.linear(part, w) for part in parts], weights)
    case = "one plain" if stacked else "two plain"
    time_case(benchmark, run, device, case=case, rows=rows, n=n, k=k, dtype=str(dtype)[6:])


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["auto", "two_products", "slab", "fused", "specialized"])
@pytest.mark.parametrize(("device", "rows", "n", "k", "dtype", "noise"), NOISY)
def test_fused(benchmark, device, rows, n, k, dtype, noise, strategy):
    if strategy == "specialized" and not 64 <= rows <= 2048:
        pytest.skip("specialised warps are for the middle")
    x, weights, p = operands(device, rows, n, k, dtype, noise)

    def once(w):
        return perturbed_linear(x, w, None, p, site=SITE, strategy=strategy, z_dtype=str(dtype)[6:])

    try:
        check(x, weights[0], p, lambda: once(weights[0]), z_dtype=dtype)
    except NotImplementedError as error:
        pytest.skip(f"cannot be taken: {error}")
    run = rotate(once, weights)
    z = reference((n, k), noise, x.device).to(x.device, dtype)
    pair = perturbed_linear(
        x[:rows], weights[0], None, p, site=SITE, shared=True, strategy=strategy, z_dtype=str(dtype)[6:]
    )
    along = cosine(pair, F.linear(x[: min(rows, FEW)].double(), z.double()))
    info = dict(case="fused", strategy=strategy, rows=rows, n=n, k=k, dtype=str(dtype)[6:], noise=noise, cosine=along)
    time_case(benchmark, run, device, **info)


@torch.no_grad()
@pytest.mark.parametrize(("device", "rows", "n", "k", "dtype", "noise"), NOISY)
def test_materialised(benchmark, device, rows, n, k, dtype, noise):
    x, weights, p = operands(device, rows, n, k, dtype, noise)

    def once(w):
        plus, minus = perturb(w, p, site=SITE)
        return torch.cat([F.linear(part, v) for part, v in zip(x.chunk(2), (plus, minus), strict=True)])

    check(x, weights[0], p, lambda: once(weights[0]))
    run = rotate(once, weights)
    time_case(benchmark, run, device, case="materialised", rows=rows, n=n, k=k, dtype=str(dtype)[6:], noise=noise)

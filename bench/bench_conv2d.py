"""The perturbed pair of a convolution against what it replaces: ``pytest bench/bench_conv2d.py``.

| case | is |
|---|---|
| plain | ``F.conv2d`` with the weight as it is, as two batches of B or one of 2 B, contiguous or channels_last |
| fused | :func:`perturbed_conv2d`, both signs in one call, by auto and by each strategy forced that auto does not take |
| materialised | z in memory, W + eps z and W - eps z beside it, two convolutions |

Before a strategy is timed all of them are compared with the reference, and beside each time is the cosine of its measured
derivative (:mod:`bench.derivative`). Efficiency is the time of the fastest plain one over that of fused.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.derivative import cosine
from bench.timing import copies, devices, rotate, time_case
from ezo_kernels.ops import Noise, Perturbation, materialize, perturb, perturbed_conv2d
from ezo_kernels.ops._linear_triton import architecture
from ezo_kernels.ops.conv2d import strategy_for
from ezo_kernels.ops.noise import key_tensor
from tests.tolerance import assert_within_torch_error

#: device -> images a sign, input and output channels, height, kernel, dtype
SHAPES = {
    "cpu": [(4, 6, 16, 14, 5, torch.float32)],
    "cuda": [
        *((128, c, c, size, 3, torch.bfloat16) for size in (32, 56) for c in (64, 128, 256)),
        (32, 6, 16, 14, 5, torch.float32),
    ],
}
NOISES = {"cpu": ["gaussian", "hadamard"], "cuda": ["hadamard", "gaussian", "clt4", "rademacher"]}
STRATEGIES = ("fused", "slab")
SEED, STEP, SITE = 1, 2, 3
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = [
    pytest.param(device, *shape, id=f"{device}-{'x'.join(map(str, shape[:5]))}-{str(shape[5])[6:]}")
    for device in devices()
    for shape in SHAPES[device]
]
NOISY = [pytest.param(*c.values, noise, id=f"{c.id}-{noise}") for c in CASES for noise in NOISES[c.values[0]]]


def operands(device, images, c, o, size, kernel, dtype, memory, noise="gaussian"):
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2 * images, c, size, size, generator=generator, device=device)
    w = torch.randn(o, c, kernel, kernel, generator=generator, device=device) * (c * kernel**2) ** -0.5
    x, w = (t.to(dtype).contiguous(memory_format=FORMATS[memory]) for t in (x, w))
    p = Perturbation(key_tensor(SEED, STEP, device), torch.tensor([1e-3], device=device), Noise(noise))
    return x, [w.clone() for _ in range(min(copies(w), 64))], p


def check(x, w, p, run) -> None:
    """The first images of both groups against fp64 with z from the reference; a case that is wrong is not timed."""
    z = materialize(w.shape, seed=SEED, step=STEP, site=SITE, noise=p.noise.name, layout="conv").to(w.device)
    images, padding = x.shape[0] // 2, w.shape[-1] // 2
    some = [slice(0, min(2, images)), slice(images, images + min(2, images))]
    truth, same = [], []
    for part, sign in zip(some, (1, -1), strict=True):
        moved = w.float() + sign * (p.eps * z)
        exact = w.double() + sign * p.eps.double() * z.double()
        truth.append(F.conv2d(x[part].double(), exact, padding=padding))
        same.append(F.conv2d(x[part], moved.to(x.dtype), padding=padding))
    ours = run()
    assert_within_torch_error(torch.cat([ours[s] for s in some]), torch.cat(same), torch.cat(truth), "bench")


def about(images, c, o, size, kernel, dtype, memory) -> dict:
    return dict(rows=images, c=c, o=o, size=size, kernel=kernel, dtype=str(dtype)[6:], memory=memory)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("parts", [2, 1], ids=["two plain", "one plain"])
@pytest.mark.parametrize(("device", "images", "c", "o", "size", "kernel", "dtype"), CASES)
def test_plain(benchmark, device, images, c, o, size, kernel, dtype, parts, memory):
    shape = (images, c, o, size, kernel, dtype, memory)
    x, weights, _ = operands(device, *shape)
    run = rotate(lambda w: [F.conv2d(part, w, padding=kernel // 2) for part in x.chunk(parts)], weights)
    case = "two plain" if parts == 2 else "one plain"
    time_case(benchmark, run, device, case=case, **about(*shape))


def taken(x, w, p) -> str:
    """The strategy that auto takes."""
    out = torch.empty(x.shape[0], w.shape[0], *x.shape[2:], device="meta")
    arch = architecture(x.device) if x.is_cuda else 0
    return strategy_for(x, w, out, p.groups, arch, 1, "", "auto", p.signs, p.noise.name).name


@torch.no_grad()
@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("strategy", ["auto", "slab", "fused"])
@pytest.mark.parametrize(("device", "images", "c", "o", "size", "kernel", "dtype", "noise"), NOISY)
def test_fused(benchmark, device, images, c, o, size, kernel, dtype, noise, strategy, memory):
    shape = (images, c, o, size, kernel, dtype, memory)
    x, weights, p = operands(device, *shape, noise)
    if strategy == taken(x, weights[0], p):
        pytest.skip("what auto takes")

    def by(strategy, x=x, shared=False):
        return lambda w: perturbed_conv2d(
            x, w, None, p, site=SITE, padding=kernel // 2, strategy=strategy, shared=shared
        )

    for each in STRATEGIES:
        check(x, weights[0], p, lambda each=each: by(each)(weights[0]))
    z = materialize(weights[0].shape, seed=SEED, step=STEP, site=SITE, noise=noise, layout="conv").to(x.device)
    right = F.conv2d(x[: min(2, images)].double(), z.double(), padding=kernel // 2)
    along = cosine(by(strategy, x[:images], True)(weights[0]), right)
    info = dict(case="fused", strategy=strategy, noise=noise, cosine=along)
    time_case(benchmark, rotate(by(strategy), weights), device, **info, **about(*shape))


@torch.no_grad()
@pytest.mark.parametrize(("device", "images", "c", "o", "size", "kernel", "dtype", "noise"), NOISY)
def test_materialised(benchmark, device, images, c, o, size, kernel, dtype, noise):
    shape = (images, c, o, size, kernel, dtype, "channels_last")
    x, weights, p = operands(device, *shape, noise)

    def once(w):
        pair = perturb(w, p, site=SITE, layout="conv")
        return torch.cat([F.conv2d(part, v, padding=kernel // 2) for part, v in zip(x.chunk(2), pair, strict=True)])

    check(x, weights[0], p, lambda: once(weights[0]))
    time_case(benchmark, rotate(once, weights), device, case="materialised", noise=noise, **about(*shape))

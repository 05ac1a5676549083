"""Perturbed linear: the kernel against the CPU operator. bf16 is for a GPU: the interpreter's is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ezo_kernels import ops
from ezo_kernels.ops import _linear_triton
from ezo_kernels.ops._tiles import linear_tile
from ezo_kernels.ops.noise import Noise

SITE, BIAS_SITE = 0xFEDCBA98, 7
SIGNS = [(1, -1), (1,), (-1,), (0,)]


def make(rows, n, k, dtype=torch.float32, weight_dtype=None, groups=1, transposed=False):
    generator = torch.Generator().manual_seed(rows * n + k)
    x = torch.randn(groups * rows, k, generator=generator).to(dtype)
    w = torch.randn((k, n) if transposed else (n, k), generator=generator).to(weight_dtype or dtype)
    b = torch.randn(n, generator=generator).to(weight_dtype or dtype)
    return x, w, b


def check(on_cpu, x, w, b, p, **options):
    options = {"site": SITE, "bias_site": BIAS_SITE, "precision": "ieee", **options}
    ours = ops.perturbed_linear(x, w, b, p, **options)
    theirs = on_cpu(ops.perturbed_linear, x, w, b, p, **options)
    # a sum of K products of size sqrt(1 + eps^2): fp32 differs by its order, fp16 by an ulp of a perturbed weight too
    k = x.shape[-1]
    limit = 2e-5 if x.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit * k**0.5)


@pytest.mark.parametrize("shared", [False, True])
def test_noises(on_cpu, key, noise, shared):
    p = ops.Perturbation(key, torch.tensor([0.4]), noise[0], query=3)
    x, w, b = make(5, 40, 70, groups=1 if shared else p.groups)
    check(on_cpu, x, w, b, p, shared=shared)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize(
    ("n", "k", "noise_name"), [(3, 25, "clt4"), (10, 84, "hadamard"), (33, 128, "clt4"), (48, 72, "clt4")]
)
def test_shapes(on_cpu, key, rows, n, k, transposed, noise_name):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise(noise_name))
    check(on_cpu, *make(rows, n, k, groups=2, transposed=transposed), p, transposed=transposed)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("signs", SIGNS, ids=str)
def test_queries(on_cpu, key, signs, shared):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"), query=9, queries=3, signs=signs)
    check(on_cpu, *make(18, 20, 40, groups=1 if shared else p.groups), p, shared=shared)


@pytest.mark.parametrize("strategy", ["fused", "two_products", "slab"])
@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_relu(key, strategy, signs, shared):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"), queries=2, signs=signs)
    x, w, b = make(18, 20, 40, groups=1 if shared else p.groups)
    how = {"site": SITE, "bias_site": BIAS_SITE, "precision": "ieee", "strategy": strategy, "shared": shared}
    y = ops.perturbed_linear(x, w, b, p, **how)
    assert torch.equal(ops.perturbed_linear(x, w, b, p, relu=True, **how), torch.relu(y))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["rademacher", "sparse", "uniform"])
def test_transposed(on_cpu, key, name, transposed):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise(name, p_zero=0.5 if name == "sparse" else 0.0))
    check(on_cpu, *make(4, 40, 70, groups=2, transposed=transposed), p, transposed=transposed)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("signs", SIGNS, ids=str)
def test_half(on_cpu, key, weight_dtype, signs):
    p = ops.Perturbation(key, torch.tensor([0.05]), Noise("clt4"), signs=signs)
    x, w, b = make(20, 30, 48, torch.float16, weight_dtype, groups=p.groups)
    check(on_cpu, x, w, b, p)


def _inputs():
    yield "leading dimensions", torch.randn(4, 3, 5, 36)
    yield "transposed leading", torch.randn(3, 4, 36).transpose(0, 1)
    yield "column stride", torch.randn(4, 72)[:, ::2]
    yield "row slice", torch.randn(8, 50)[::2, 3:39]
    yield "expanded", torch.randn(1, 36).expand(4, 36)
    yield "column major", torch.randn(36, 4).t()
    yield "six dimensions", torch.randn(2, 3, 2, 4, 2, 36).permute(3, 1, 0, 2, 4, 5)


@pytest.mark.parametrize(("name", "x"), list(_inputs()), ids=lambda v: v if isinstance(v, str) else "")
def test_strides_of_x(on_cpu, key, name, x):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"))
    check(on_cpu, x, torch.randn(20, 36), None, p)
    check(on_cpu, x, torch.randn(20, 36), None, p, shared=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_strides_of_the_weight(on_cpu, key, transposed):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"))
    x = torch.randn(6, 20)
    b = torch.randn(40)[::2]
    for w in (torch.randn(20, 20).t(), torch.randn(40, 60)[::2, ::3], torch.randn(1, 20).expand(20, 20)):
        check(on_cpu, x, w, b, p, transposed=transposed)


TILES = [(16, 32, 32), (64, 64, 32), (32, 128, 64)]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "rademacher", "hadamard"])
def test_tiles(monkeypatch, on_cpu, key, name, tile, swap, transposed):
    noise = Noise(name)
    chosen = dataclasses.replace(
        linear_tile(40, 33, 100, torch.float32, "gaussian", "ieee", transposed, 90),
        bm=tile[0], bn=tile[1], bk=tile[2], swap=swap,
    )  # fmt: skip
    monkeypatch.setattr(_linear_triton, "linear_tile", lambda *_: chosen)
    p = ops.Perturbation(key, torch.tensor([0.4]), noise)
    check(on_cpu, *make(20, 33, 70, groups=2, transposed=transposed), p, transposed=transposed)


@pytest.mark.parametrize("shared", [False, True])
def test_eps_zero_gives_equal_groups(key, shared):
    x, w, b = make(20, 20, 70)
    p = ops.Perturbation(key, torch.zeros(1), queries=2)
    y = ops.perturbed_linear(
        x if shared else x.repeat(4, 1), w, b, p, site=SITE, bias_site=BIAS_SITE, shared=shared, precision="ieee"
    ).chunk(4)
    assert all(torch.equal(y[0], part) for part in y)


def test_the_pair_is_its_two_signs(key):
    x, w, b = make(20, 20, 70, groups=2)
    options = {"site": SITE, "bias_site": BIAS_SITE, "precision": "ieee"}
    both = ops.perturbed_linear(x, w, b, ops.Perturbation(key, torch.tensor([0.4])), **options).chunk(2)
    for sign, part, y in zip((1, -1), x.chunk(2), both, strict=True):
        p = ops.Perturbation(key, torch.tensor([0.4]), signs=(sign,))
        assert torch.equal(ops.perturbed_linear(part, w, b, p, **options), y)

"""Perturbed linear: the kernel against the CPU operator. bf16 is for a GPU: the interpreter's is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ezo_kernels import ops
from ezo_kernels.ops import _linear_small_triton, _linear_triton, _parts_triton, _strategy
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


@pytest.mark.parametrize(("swap", "transposed"), [(False, True), (True, False)])
@pytest.mark.parametrize("tile", TILES, ids=str)
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


@pytest.fixture
def parted(monkeypatch):
    """``parted(parts, steps)`` cuts K so; a list of how many parts each launch added up."""
    summed, launch = [], _parts_triton.sum_parts_kernel

    class Counted:
        def __getitem__(self, grid):
            return lambda *a, **k: (summed.append(a[3]), launch[grid](*a, **k))

    def cut(parts, steps):
        for module in (_linear_triton, _strategy):
            monkeypatch.setattr(module, "linear_parts", lambda *_: (parts, steps))
        return summed

    monkeypatch.setattr(_parts_triton, "sum_parts_kernel", Counted())
    return cut


@pytest.mark.parametrize(
    ("parts", "steps", "name", "queries", "relu"), [(2, 2, "hadamard", 1, False), (3, 1, "clt4", 2, True)]
)
@pytest.mark.parametrize(("shared", "transposed"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
def test_parts_of_k_add_up(parted, on_cpu, key, signs, shared, transposed, parts, steps, name, queries, relu):
    """Whatever the noise reads of rows and columns does not depend on the part; the bias is added once."""
    summed = parted(parts, steps)
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise(name), query=9, queries=queries, signs=signs)
    tensors = make(18, 40, parts * steps * 32 - 7, groups=1 if shared else p.groups, transposed=transposed)
    check(on_cpu, *tensors, p, shared=shared, transposed=transposed, relu=relu)
    assert summed == [parts]


@pytest.mark.parametrize(("shared", "strategy"), [(False, "auto"), (True, "auto"), (False, "two_products")])
def test_parts_of_many_queries_take_their_turns(monkeypatch, parted, key, shared, strategy):
    """The memory has a bound, and no query sees how many it shares a launch with."""
    summed = parted(3, 1)
    monkeypatch.setattr(_linear_small_triton, "small_parts", lambda *_: (3, 1))
    monkeypatch.setattr(_strategy, "small_parts", lambda *_: (3, 1))
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"), query=4, queries=3)
    x, w, b = make(18, 40, 90, groups=1 if shared else p.groups)
    options = {"site": SITE, "bias_site": BIAS_SITE, "precision": "ieee", "shared": shared, "strategy": strategy}
    at_once = ops.perturbed_linear(x, w, b, p, **options)
    monkeypatch.setattr(_strategy, "WORKSPACE_BYTES", 2 * 3 * 4 * 2 * 18 * 40)  # two queries
    assert torch.equal(ops.perturbed_linear(x, w, b, p, **options), at_once)
    monkeypatch.setattr(_strategy, "WORKSPACE_BYTES", 1)
    assert torch.equal(ops.perturbed_linear(x, w, b, p, **options), at_once)
    assert summed == [3] * (1 + 2 + 3)


def test_half_in_parts_is_rounded_once(parted, on_cpu, key):
    summed = parted(3, 2)
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"))
    check(on_cpu, *make(70, 40, 190, torch.float16, groups=2), p)
    assert summed == [3]


def test_who_asks_for_fused_gets_no_parts(parted, on_cpu, key):
    summed = parted(3, 1)
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"))
    check(on_cpu, *make(18, 40, 90, groups=2), p, strategy="fused")
    assert summed == []


def test_groups_run_alike_in_parts(parted, key):
    """eps = 0 leaves equal bits for both signs, and one sign by itself has those of the pair."""
    summed = parted(3, 1)
    x, w, b = make(20, 20, 90)
    options = {"site": SITE, "bias_site": BIAS_SITE, "precision": "ieee"}
    plus, minus = ops.perturbed_linear(x.repeat(2, 1), w, b, ops.Perturbation(key, torch.zeros(1)), **options).chunk(2)
    assert torch.equal(plus, minus)
    both = ops.perturbed_linear(x.repeat(2, 1), w, b, ops.Perturbation(key, torch.tensor([0.4])), **options)
    for sign, y in zip((1, -1), both.chunk(2), strict=True):
        p = ops.Perturbation(key, torch.tensor([0.4]), signs=(sign,))
        assert torch.equal(ops.perturbed_linear(x, w, b, p, **options), y)
    assert summed == [3] * 4

"""The two-product kernel against the CPU operator, in fp32 and fp16. bf16 is for a GPU: the interpreter's is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_linear import SIGNS, _inputs, check, make

from ezo_kernels import ops
from ezo_kernels.ops import _linear_small_triton, _parts_triton
from ezo_kernels.ops._tiles import small_tile
from ezo_kernels.ops.noise import Noise

OPTIONS = {"site": 0xFEDCBA98, "bias_site": 7, "precision": "ieee", "strategy": "two_products"}


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Counts launches of the kernel that is under test: a test that ran another one must fail."""
    count = []
    launch = _linear_small_triton.launch_linear_small
    monkeypatch.setattr(_linear_small_triton, "launch_linear_small", lambda *a, **k: (count.append(1), launch(*a, **k)))
    yield count
    assert count


@pytest.mark.parametrize("shared", [False, True])
def test_noises(on_cpu, key, noise, shared):
    p = ops.Perturbation(key, torch.tensor([0.4]), noise[0], query=3)
    check(on_cpu, *make(5, 40, 70, groups=1 if shared else p.groups), p, shared=shared, strategy="two_products")


@pytest.mark.parametrize("rows", [1, 17, 65])
@pytest.mark.parametrize(
    ("n", "k", "noise_name"), [(3, 25, "clt4"), (10, 84, "hadamard"), (70, 128, "clt4"), (48, 72, "clt4")]
)
def test_shapes(on_cpu, key, rows, n, k, noise_name):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise(noise_name))
    check(on_cpu, *make(rows, n, k, groups=2), p, strategy="two_products")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
def test_queries(on_cpu, key, signs, shared):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"), query=9, queries=3, signs=signs)
    x, w, b = make(18, 20, 40, groups=1 if shared else p.groups)
    check(on_cpu, x, w, b, p, shared=shared, strategy="two_products")
    check(on_cpu, x, w, None, p, shared=shared, strategy="two_products")


@pytest.mark.parametrize("name", ["clt4", "hadamard", "rademacher"])
@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
def test_half(on_cpu, key, signs, name):
    p = ops.Perturbation(key, torch.tensor([0.05]), Noise(name), signs=signs)
    x, w, b = make(20, 30, 48, torch.float16, groups=p.groups)
    check(on_cpu, x, w, b, p, strategy="two_products", z_dtype="float16")


@pytest.mark.parametrize(("name", "x"), list(_inputs()), ids=lambda v: v if isinstance(v, str) else "")
def test_strides(on_cpu, key, name, x):
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"))
    check(on_cpu, x, torch.randn(36, 20).t(), torch.randn(40)[::2], p, strategy="two_products")
    check(on_cpu, x, torch.randn(40, 72)[::2, ::2], None, p, shared=True, strategy="two_products")


@pytest.mark.parametrize("tile", [(16, 64, 64), (32, 32, 128), (64, 64, 32)], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "rademacher", "hadamard"])
def test_tiles(monkeypatch, on_cpu, key, name, tile):
    chosen = dataclasses.replace(small_tile(20, torch.float32, name, True, 90), half=tile[0], bn=tile[1], bk=tile[2])
    monkeypatch.setattr(_linear_small_triton, "small_tile", lambda *_: chosen)
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise(name))
    check(on_cpu, *make(20, 33, 70, groups=2), p, strategy="two_products")


def whole(*args, **kwargs):
    """Inputs whose sums are exact: the interpreter multiplies by a BLAS, whose rows may be summed in different orders."""
    return [torch.round(4 * t) for t in make(*args, **kwargs)]


@pytest.mark.parametrize("shared", [False, True])
def test_eps_zero_gives_equal_groups(key, shared):
    x, w, b = whole(20, 20, 70)
    p = ops.Perturbation(key, torch.zeros(1), queries=2)
    y = ops.perturbed_linear(x if shared else x.repeat(4, 1), w, b, p, shared=shared, **OPTIONS).chunk(4)
    assert all(torch.equal(y[0], part) for part in y)


def test_the_pair_is_its_two_signs(key):
    x, w, b = whole(20, 20, 70, groups=2)
    noise, eps = Noise("rademacher"), torch.tensor([0.4])
    both = ops.perturbed_linear(x, w, b, ops.Perturbation(key, eps, noise), **OPTIONS).chunk(2)
    assert not torch.equal(*both)
    for sign, part, y in zip((1, -1), x.chunk(2), both, strict=True):
        p = ops.Perturbation(key, eps, noise, signs=(sign,))
        assert torch.equal(ops.perturbed_linear(part, w, b, p, **OPTIONS), y)


def parted(monkeypatch, parts: int, steps: int) -> None:
    monkeypatch.setattr(_linear_small_triton, "small_parts", lambda *_: (parts, steps))


@pytest.mark.parametrize(("parts", "steps"), [(2, 2), (3, 1)])
@pytest.mark.parametrize(("shared", "relu"), [(False, True), (True, False)])
@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
def test_parts_of_k_add_up(monkeypatch, on_cpu, key, signs, shared, relu, parts, steps):
    """Whatever the noise reads of rows and columns does not depend on the part; the bias is added once."""
    tile = dataclasses.replace(small_tile(20, torch.float32, "clt4", True, 90), half=16, bn=32, bk=32)
    monkeypatch.setattr(_linear_small_triton, "small_tile", lambda *_: tile)
    summed, launch = [], _parts_triton.sum_parts_kernel

    class Counted:
        def __getitem__(self, grid):
            return lambda *a, **k: (summed.append(a[3]), launch[grid](*a, **k))

    monkeypatch.setattr(_parts_triton, "sum_parts_kernel", Counted())
    parted(monkeypatch, parts, steps)
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"), query=9, queries=2, signs=signs)
    x, w, b = whole(18, 40, parts * steps * 32 - 7, groups=1 if shared else p.groups)
    check(on_cpu, x, w, b, p, shared=shared, strategy="two_products", relu=relu)
    assert summed == [parts]


@pytest.mark.parametrize("parts", [1, 4])
def test_groups_run_alike_in_parts(monkeypatch, key, parts):
    """eps = 0 leaves equal bits for both signs, and one sign by itself has those of the pair."""
    parted(monkeypatch, parts, -(-4 // parts))
    x, w, b = make(9, 40, 256, groups=2)
    x = torch.cat([x[:9], x[:9]])
    p = ops.Perturbation(key, torch.tensor([0.0]), Noise("gaussian"))
    plus, minus = ops.perturbed_linear(x, w, b, p, **OPTIONS).chunk(2)
    assert torch.equal(plus, minus)
    pair = ops.perturbed_linear(x, w, b, ops.Perturbation(key, torch.tensor([0.3]), Noise("gaussian")), **OPTIONS)
    alone = [
        ops.perturbed_linear(
            x[:9], w, b, ops.Perturbation(key, torch.tensor([0.3]), Noise("gaussian"), signs=(s,)), **OPTIONS
        )
        for s in (1, -1)
    ]
    assert torch.equal(pair, torch.cat(alone))


def test_without_memory_for_parts_k_is_whole(monkeypatch, on_cpu, key):
    parted(monkeypatch, 3, 1)
    empty = torch.empty

    def full(*size, **how):
        if size == (3 * 2 * 5 * 40,):
            raise torch.OutOfMemoryError("full")
        return empty(*size, **how)

    monkeypatch.setattr(torch, "empty", full)
    p = ops.Perturbation(key, torch.tensor([0.4]), Noise("clt4"))
    with pytest.warns(RuntimeWarning, match="no memory for 4800 bytes of parts; K is not cut"):
        check(on_cpu, *make(5, 40, 70, groups=2), p, strategy="two_products")

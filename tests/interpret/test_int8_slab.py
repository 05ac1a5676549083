"""Perturbed int8 weights made in memory, then plain products: every bit of the CPU reference, whatever the slabs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_int8 import CONVS, SIGNS, compare, conv, exponent, ints, linear, make_pass, tensor

from ezo_kernels.ops import _int8_slab, _int8_slab_triton
from ezo_kernels.ops.int8_conv2d import int8_conv1d


@pytest.fixture(autouse=True)
def written(monkeypatch):
    """A test that ran the fused kernels must fail."""
    count, of = [], _int8_slab_triton._write
    monkeypatch.setattr(_int8_slab_triton, "_write", lambda *a: (count.append(a[7]), of(*a)))
    yield count
    assert count


@pytest.mark.parametrize("strategy", ["buffer", "twice"])
@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_linear_signs_and_queries(on_cpu, key, signs, shared, strategy):
    p = make_pass(key, signs, queries=3)
    groups = 1 if shared else p.groups
    x = tensor(groups * 4, 2, 40, groups=groups, low=-128)
    w = torch.where(ints(9, 40, seed=3) > 100, -128, ints(9, 40, seed=1)).to(torch.int8)
    b = None if (strategy == "twice") == shared else ints(9, seed=2)
    for relu in (False, True):
        linear(
            on_cpu, x, w, b, p, strategy=strategy, rounding="pseudo" if shared else "nearest", weights="slab", relu=relu
        )


@pytest.mark.parametrize("strategy", ["buffer", "twice"])
@pytest.mark.parametrize("most", [1, 128, 200])
def test_many_slabs_of_any_height(monkeypatch, on_cpu, key, written, most, strategy):
    """Of 130 outputs; a bias is perturbed by its place among all of them."""
    monkeypatch.setattr(_int8_slab, "SLAB_BYTES", most * 2 * 48)
    n = 3 if most == 1 else 130
    x, w, b = tensor(2 * 5, 35, groups=2), ints(n, 35, seed=1), ints(n, seed=2)
    linear(on_cpu, x, w, b, make_pass(key), strategy=strategy, weights="slab")
    assert sorted(set(written)) == {1: [0, 1, 2], 128: [0, 128], 200: [0]}[most]


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (33, 6, 84), (130, 17, 65)])
def test_linear_shapes_and_strides(on_cpu, key, rows, n, k):
    p = make_pass(key, r_max=127, p_zero=0.0, query=(1 << 24) - 2)
    x, b = tensor(2 * rows, k, groups=2), ints(2 * n, seed=2)[::2]
    for w in (ints(n, k), ints(k, n).t(), ints(2 * n, 3 * k)[::2, ::3]):
        linear(on_cpu, x, w, b, p, weights="slab")


@pytest.mark.parametrize("tile", [(16, 32, 32), (64, 16, 64), (32, 64, 128)], ids=str)
def test_tiles(monkeypatch, on_cpu, key, tile):
    chosen = dataclasses.replace(
        _int8_slab.int8_plain_tile(40, 100, True, 90), **dict(zip(("bm", "bn", "bk"), tile, strict=True))
    )
    monkeypatch.setattr(_int8_slab_triton, "int8_plain_tile", lambda *_: chosen)
    x, w, b = tensor(66, 128, groups=2), ints(33, 128, seed=1), ints(33, seed=2)
    linear(on_cpu, x, w, b, make_pass(key), weights="slab")


@pytest.mark.parametrize("exponents", [(-64, 64), (64, -64)])
def test_extremes(on_cpu, key, exponents):
    x = tensor(4, 200, groups=2, exponents=exponents, low=-128, high=-127)
    w = torch.full((3, 200), -128, dtype=torch.int8)
    for b_exponent in (-64, 64):
        linear(on_cpu, x, w, torch.full((3,), -128, dtype=torch.int8), make_pass(key), w_exponent=64,
               b_exponent=b_exponent, weights="slab")  # fmt: skip


@pytest.mark.parametrize("name", CONVS)
def test_conv_shapes(on_cpu, key, name):
    shape, weight, options = CONVS[name]
    strategy = "twice" if name in ("lenet2", "odd", "one") else "buffer"
    x = tensor(4, *shape, groups=2, exponents=[-7, -3])
    b = ints(weight[0], seed=2)
    conv(on_cpu, x, ints(*weight, seed=1), b, make_pass(key), strategy=strategy, weights="slab", **options)
    how = {"strategy": "twice", "relu": True, "pool": 1 if name == "one" else 2}
    conv(on_cpu, x, ints(*weight, seed=1), b, make_pass(key), weights="slab", **how, **options)


@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_conv_signs_and_queries(on_cpu, key, signs, shared):
    p = make_pass(key, signs, queries=2, r_max=127)
    groups = 1 if shared else p.groups
    x = tensor(3 * groups, 5, 6, 6, groups=groups, low=-128)
    w = ints(7, 5, 3, 3, seed=1, low=-128)
    if shared:
        conv(on_cpu, x, w, ints(7, seed=2), p, strategy="twice", rounding="pseudo", weights="slab")
    else:
        last = w.to(memory_format=torch.channels_last)
        conv(on_cpu, x, last, None, p, padding=1, strategy="buffer", weights="slab")


def test_conv1d(on_cpu, key):
    options = {"site": 5, "bias_site": 6, "weight_exponent": exponent(-6), "bias_exponent": exponent(-9)}
    x, w, b = tensor(4, 6, 13, groups=2), ints(4, 3, 3, seed=1), ints(4, seed=2)
    how = dict(stride=2, padding=2, dilation=2, groups=2, strategy="twice")
    compare(on_cpu, int8_conv1d, x, w, b, make_pass(key), weights="slab", **how, **options)

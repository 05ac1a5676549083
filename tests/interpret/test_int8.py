"""The integer kernels against the CPU reference: every bit, always."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from ezo_kernels.ops import (
    _int8_conv2d_triton,
    _int8_matmul_triton,
    _int8_triton,
    int8_linear,
    int8_matmul,
    int8_pointwise,
)
from ezo_kernels.ops._tiles import int8_tile
from ezo_kernels.ops._triton import jit, tl
from ezo_kernels.ops.int8_conv2d import int8_conv1d, int8_conv2d
from ezo_kernels.ops.int8_pass import IntegerPerturbation
from ezo_kernels.ops.int8_tensor import Int8Tensor
from ezo_kernels.ops.noise import Noise

SITE, BIAS_SITE = 0xFEDCBA98, 7
SIGNS = [(1, -1), (1,), (-1,), (0,)]


def ints(*shape, seed=0, low=-127, high=128, dtype=torch.int8):
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(dtype)


def tensor(*shape, groups=1, exponents=None, **kwargs):
    exponents = [-7 + i for i in range(groups)] if exponents is None else exponents
    return Int8Tensor(ints(*shape, **kwargs), torch.tensor(exponents, dtype=torch.int32))


def exponent(value):
    return torch.tensor([value], dtype=torch.int32)


def same(ours, theirs):
    """Equal bits of tensors, Int8Tensors, or several of them."""
    if isinstance(ours, Int8Tensor):
        ours, theirs = (ours.values, ours.exponent), (theirs.values, theirs.exponent)
    if isinstance(ours, torch.Tensor):
        ours, theirs = (ours,), (theirs,)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), (a, b)


def compare(on_cpu, fn, *args, **kwargs):
    ours = fn(*args, **kwargs)
    same(ours, on_cpu(fn, *args, **kwargs))
    return ours


def make_pass(key, signs=(1, -1), queries=1, query=3, p_zero=0.5, r_max=15, rounds=7):
    return IntegerPerturbation(key, Noise("sparse_int8", rounds, p_zero, r_max), query, queries, signs)


# -------------------------------------------------------------------------------------------------- shared functions


@jit
def _division_kernel(n_ptr, out_ptr, multiplier, shift, bits_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    n = tl.load(n_ptr + at)
    tl.store(out_ptr + at, _int8_triton.divide(n, multiplier, shift))
    tl.store(bits_ptr + at, _int8_triton.bit_length(n))


@pytest.mark.parametrize(
    "divisor", [1, 2, 3, 5, 7, 12, 127, 128, 12345, 65537, (1 << 30) - 1, (1 << 30) + 1, (1 << 31) - 1]
)
def test_division_and_bits(divisor):
    edges = [0, 1, (1 << 31) - 1, (1 << 31) - 2]
    edges += [v for i in range(1, 20) for v in (i * divisor - 1, i * divisor, (1 << i) - 1) if 0 <= v < 1 << 31]
    multiples = (1 << 31) // divisor
    edges += [v for m in (multiples, multiples - 1) for v in (m * divisor - 1, m * divisor) if 0 <= v < 1 << 31]
    n = torch.tensor((edges * 128)[:128], dtype=torch.int32)
    out, bits = torch.empty_like(n), torch.empty_like(n)
    _division_kernel[(1,)](n, out, *_int8_triton.magic(divisor), bits, BLOCK=128)
    assert out.tolist() == [v // divisor for v in n.tolist()]
    assert bits.tolist() == [v.bit_length() for v in n.tolist()]


# ------------------------------------------------------------------------------------------------------------ linear


def linear(on_cpu, x, w, b, p, b_exponent=-10, w_exponent=-7, **options):
    options = {"site": SITE, "bias_site": BIAS_SITE, "weight_exponent": exponent(w_exponent), **options}
    if b is not None:
        options["bias_exponent"] = exponent(b_exponent)
    return compare(on_cpu, int8_linear, x, w, b, p, **options)


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize(("n", "k"), [(3, 25), (6, 84), (10, 150)])
def test_linear_shapes(on_cpu, key, rows, n, k):
    x, w, b = tensor(2 * rows, k, groups=2), ints(n, k, seed=1), ints(n, seed=2)
    linear(on_cpu, x, w, b, make_pass(key))


@pytest.mark.parametrize("strategy", ["buffer", "twice"])
@pytest.mark.parametrize("signs", SIGNS, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_linear_signs_and_queries(on_cpu, key, signs, shared, strategy):
    p = make_pass(key, signs, queries=3)
    groups = 1 if shared else p.groups
    x = tensor(groups * 4, 2, 40, groups=groups)
    w = torch.where(ints(9, 40, seed=3) > 100, -128, ints(9, 40, seed=1)).to(torch.int8)
    b = None if (strategy == "twice") == shared else ints(9, seed=2)
    linear(on_cpu, x, w, b, p, strategy=strategy, rounding="pseudo" if shared else "nearest", relu=len(signs) == 2)


@pytest.mark.parametrize(("parts", "steps"), [(2, 3), (5, 1)])
@pytest.mark.parametrize("signs", SIGNS[:3], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_parts_of_k_add_up(monkeypatch, on_cpu, key, signs, shared, parts, steps):
    """Accumulators, their peak and the bias, which is added once; K need not fill the last part."""
    p = make_pass(key, signs, queries=2)
    groups = 1 if shared else p.groups
    k = parts * steps * 32 - 9
    x, w, b = tensor(groups * 4, k, groups=groups), ints(40, k, seed=1), ints(40, seed=2)
    module, summed = _int8_matmul_triton, []
    tile = dataclasses.replace(module.int8_tile(4, 40, k, False, 90), bm=16, bn=32, bk=32)
    monkeypatch.setattr(module, "int8_tile", lambda *_: tile)
    monkeypatch.setattr(module, "int8_parts", lambda *_: (parts, steps))
    launch = module.int8_sum_parts_kernel

    class Counted:
        def __getitem__(self, grid):
            return lambda *a, **how: (summed.append(a[5]), launch[grid](*a, **how))

    monkeypatch.setattr(module, "int8_sum_parts_kernel", Counted())
    linear(on_cpu, x, w, None if shared else b, p, strategy="buffer", relu=shared)
    assert summed == [parts]
    linear(on_cpu, x, w, b, p, strategy="twice")  # of its first pass nothing is kept that could be added up
    assert summed == [parts]


def test_linear_without_a_pass_takes_any_groups(on_cpu):
    linear(on_cpu, tensor(15, 25, groups=5), ints(6, 25), ints(6), None)


@pytest.mark.parametrize(("p_zero", "r_max", "rounds"), [(0.0, 127, 7), (0.99, 1, 10), (0.5, 1, 7), (0.33, 15, 7)])
def test_linear_noises(on_cpu, key, p_zero, r_max, rounds):
    p = make_pass(key, queries=2, p_zero=p_zero, r_max=r_max, rounds=rounds, query=(1 << 24) - 2)
    linear(on_cpu, tensor(12, 70, groups=4), ints(5, 70, seed=1), ints(5, seed=2), p)


@pytest.mark.parametrize("b_exponent", [-64, -22, -21, -20, -16, -14, -7, 8, 9, 64])
@pytest.mark.parametrize("signs", [(1, -1), (0,)], ids=str)
def test_bias_alignment(on_cpu, key, b_exponent, signs):
    """Accumulators in units of 2^-14 and 2^-13: shifts by more than everything, halves, and past the limit of 22 bits."""
    p = make_pass(key, signs)
    b = torch.tensor([-128, -127, -3, -1, 0, 1, 2, 64, 127], dtype=torch.int8)
    x = tensor(6, 20, groups=2, low=-3, high=4)
    linear(on_cpu, x, ints(9, 20, seed=1, low=-3, high=4), b, p, b_exponent=b_exponent)


@pytest.mark.parametrize("exponents", [(-64, 64), (64, -64)])
@pytest.mark.parametrize("fill", [0, -128, 127])
def test_linear_extremes(on_cpu, key, exponents, fill):
    x = Int8Tensor(torch.full((4, 200), fill, dtype=torch.int8), torch.tensor(exponents, dtype=torch.int32))
    for of_w in (0, -128) if fill else (-128,):
        w = torch.full((3, 200), of_w, dtype=torch.int8)
        linear(on_cpu, x, w, None, make_pass(key), w_exponent=64)
        linear(on_cpu, x, w, torch.full((3,), of_w, dtype=torch.int8), make_pass(key, (0,)), strategy="twice")


def test_linear_strides_of_the_weight(on_cpu, key):
    x = tensor(6, 20, groups=2)
    for w in (ints(20, 20).t(), ints(20, 60)[::2, ::3], ints(1, 20).expand(20, 20)):
        linear(on_cpu, x, w, ints(40)[:: 40 // len(w)], make_pass(key))


TILES = [(16, 32, 32, True), (64, 16, 64, True), (32, 64, 32, False), (16, 128, 64, False)]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_linear_tiles(monkeypatch, on_cpu, key, tile):
    chosen = dataclasses.replace(
        int8_tile(40, 33, 100, True, 90), **dict(zip(("bm", "bn", "bk", "swap"), tile, strict=True))
    )
    monkeypatch.setattr(_int8_matmul_triton, "int8_tile", lambda *_: chosen)
    x, w, b = tensor(66, 70, groups=2), ints(33, 70, seed=1), ints(33, seed=2)
    linear(on_cpu, x, w, b, make_pass(key))


def test_the_pair_is_its_two_signs(key):
    x, w, b = tensor(40, 70, groups=2), ints(20, 70, seed=1), ints(20, seed=2)
    options = {
        "site": SITE,
        "bias_site": BIAS_SITE,
        "weight_exponent": exponent(-7),
        "bias_exponent": exponent(-9),
    }
    pair = int8_linear(x, w, b, make_pass(key), **options)
    for i, sign in enumerate((1, -1)):
        own = Int8Tensor(x.values.chunk(2)[i], x.exponent[i : i + 1])
        y = int8_linear(own, w, b, make_pass(key, (sign,)), **options)
        assert torch.equal(y.values, pair.values.chunk(2)[i]) and torch.equal(y.exponent, pair.exponent[i : i + 1])


@pytest.mark.parametrize(
    ("queries", "signs", "shared", "relu", "rounding"),
    [
        (1, (1, -1), False, True, "pseudo"),
        (2, (1, -1), True, False, "nearest"),
        (3, (-1,), False, False, "pseudo"),
        (2, (0,), False, True, "nearest"),
    ],
)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 5), (9, 70, 40), (33, 100, 33)])
def test_once_is_what_two_launches_give(on_cpu, key, monkeypatch, rows, n, k, queries, signs, shared, relu, rounding):
    """The last program rounds for all: with tiles of a few outputs there are many, and groups more than a block of it."""
    p = make_pass(key, signs, queries)
    groups = 1 if shared else p.groups
    x, w, b = tensor(groups * rows, k, groups=groups), ints(n, k, seed=1), ints(n, seed=2)
    monkeypatch.setattr(_int8_matmul_triton, "int8_tile", lambda *a: dataclasses.replace(int8_tile(*a), bm=16, bn=32))
    how, found = {"strategy": "buffer", "relu": relu, "rounding": rounding, "weights": "fused"}, []
    for most in (1 << 20, 0):
        monkeypatch.setattr(sys.modules["ezo_kernels.ops.int8_linear"], "MOST_ONCE", most)
        found.append(linear(on_cpu, x, w, b, p, **how))
    assert torch.equal(found[0].values, found[1].values) and torch.equal(found[0].exponent, found[1].exponent)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_gemm(on_cpu, groups, shared):
    w = ints(1 if shared else groups, 70, 6, seed=1).transpose(1, 2)
    compare(on_cpu, int8_matmul.int8_gemm, ints(groups, 33, 70), w)
    compare(on_cpu, int8_matmul.int8_gemm, ints(groups, 70, 5, low=-128).transpose(1, 2), w)
    compare(on_cpu, int8_matmul.int8_gemm, ints(1, 1, 1).expand(groups, 4, 70), w.contiguous()[:, :1])


# -------------------------------------------------------------------------------------------------------------- conv


def conv(on_cpu, x, w, b, p, **options):
    options = {"site": SITE, "bias_site": BIAS_SITE, "weight_exponent": exponent(-6), **options}
    if b is not None:
        options["bias_exponent"] = exponent(-9)
    return compare(on_cpu, int8_conv2d, x, w, b, p, **options)


CONVS = {
    "lenet1": ((1, 9, 9), (6, 1, 5, 5), {}),
    "lenet2": ((6, 7, 7), (16, 6, 5, 5), {"padding": 2}),
    "odd": ((5, 8, 6), (7, 5, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "groups": ((6, 6, 6), (9, 2, 3, 3), {"groups": 3, "padding": 1}),
    "depthwise": ((4, 6, 6), (8, 1, 3, 3), {"groups": 4, "stride": 2}),
    "pointwise": ((40, 3, 3), (10, 40, 1, 1), {}),
    "wide": ((35, 4, 4), (3, 35, 3, 3), {"padding": 1}),
    "one": ((1, 1, 1), (1, 1, 1, 1), {}),
}


def test_conv1d(on_cpu, key):
    """A kernel of one point, as PointNet's, and one of every option."""
    options = {"site": SITE, "bias_site": BIAS_SITE, "weight_exponent": exponent(-6), "bias_exponent": exponent(-9)}
    for x, w, how in (
        (tensor(4, 3, 17, groups=2), ints(9, 3, 1, seed=1), {}),
        (tensor(2, 6, 13, groups=2), ints(4, 3, 3, seed=1), dict(stride=2, padding=2, dilation=2, groups=2)),
    ):
        b = ints(len(w), seed=2)
        for strategy in ("buffer", "twice"):
            compare(on_cpu, int8_conv1d, x, w, b, make_pass(key), strategy=strategy, **how, **options)


@pytest.mark.parametrize("name", CONVS)
def test_conv_shapes(on_cpu, key, name):
    shape, weight, options = CONVS[name]
    strategy = "twice" if name in ("lenet2", "odd", "one") else "buffer"
    x = tensor(4, *shape, groups=2, exponents=[-7, -3])
    conv(on_cpu, x, ints(*weight, seed=1), ints(weight[0], seed=2), make_pass(key), strategy=strategy, **options)


@pytest.mark.parametrize(
    ("name", "relu", "pool"),
    [
        ("lenet1", True, 1),
        ("lenet1", True, 2),
        ("groups", False, 2),
        ("odd", True, 1),
        ("odd", False, 2),
        ("odd", True, 2),
    ],
)
def test_conv_pools(on_cpu, key, name, relu, pool):
    """Heights and widths that are odd, too: the largest magnitude may be in no window."""
    shape, weight, options = CONVS[name]
    x = tensor(4, *shape, groups=2, exponents=[-7, -3])
    how = {"strategy": "twice", "relu": relu, "pool": pool, "rounding": "pseudo" if name == "odd" else "nearest"}
    conv(on_cpu, x, ints(*weight, seed=1), ints(weight[0], seed=2), make_pass(key), **how, **options)


@pytest.mark.parametrize("signs", SIGNS, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_conv_signs_and_queries(on_cpu, key, signs, shared):
    p = make_pass(key, signs, queries=2, r_max=127)
    groups = 1 if shared else p.groups
    x = tensor(3 * groups, 5, 6, 6, groups=groups, low=-128)
    w = ints(7, 5, 3, 3, seed=1, low=-128)
    if shared:
        conv(on_cpu, x, w, ints(7, seed=2), p, strategy="twice", rounding="pseudo")
    else:
        conv(on_cpu, x, w.to(memory_format=torch.channels_last), None, p, padding=1, strategy="buffer")


@pytest.mark.parametrize("cut", [(16, 16, 32, 4), (32, 64, 64, 8), (64, 32, 32, 32)], ids=str)
def test_conv_tiles(monkeypatch, on_cpu, key, cut):
    chosen = _int8_conv2d_triton.int8_conv_tiles(1000, 7, 5, 1, 90)
    if cut[3] < 8:
        shape = (3, 6, 6), (20, 3, 3, 3)
    else:
        shape = (7, 6, 6), (20, 7, 3, 3)
    chosen = dataclasses.replace(chosen, bm=cut[0], bn=cut[1], bk=cut[2], tap=cut[3])
    monkeypatch.setattr(_int8_conv2d_triton, "int8_conv_tiles", lambda *_: chosen)
    x, w = tensor(4, *shape[0], groups=2), ints(*shape[1], seed=1)
    conv(on_cpu, x, w, ints(20, seed=2), make_pass(key), padding=1)
    conv(on_cpu, x, w, ints(20, seed=2), make_pass(key), padding=1, strategy="twice", relu=True, pool=2)


# --------------------------------------------------------------------------------------------------------- pointwise


def magnitudes():
    """Integers of all lengths, ties, and both ends."""
    powers = [1 << i for i in range(31)]
    values = [v for p in powers for v in (p - 1, p, p + 1, 3 * p // 2, p + p // 3)] + [(1 << 31) - 1]
    values = [v for v in values if v < 1 << 31]
    return torch.tensor([*values, *(-v for v in values), -(1 << 31)], dtype=torch.int32)


@pytest.mark.parametrize("rounding", ["nearest", "pseudo", "stochastic"])
def test_round_shift(on_cpu, key, rounding):
    x = magnitudes()
    for shift in (0, 1, 2, 3, 8, 15, 16, 17, 24, 30, 31):
        compare(on_cpu, int8_pointwise.round_shift, x, shift, rounding, key=key, site=SITE, query=5, rounds=7)
    for shape in ((), (1,), (7, 5), (2, 3, 300), (5, 1)):
        x = ints(*shape, low=-(1 << 20), high=1 << 20, dtype=torch.int32)
        compare(on_cpu, int8_pointwise.round_shift, x, 13, rounding, key=key, site=3, query=(1 << 24) - 1, rounds=10)


def test_relu(on_cpu):
    compare(on_cpu, int8_pointwise.int8_relu, tensor(3, 701, low=-128, groups=3))


def test_maximum_over_a_dimension(on_cpu):
    compare(on_cpu, torch.amax, tensor(4, 3, 21, low=-128, groups=2), 2)
    compare(on_cpu, torch.amax, tensor(2, 3, 4, 5, groups=2), 1)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, None, 0), (3, 2, 1), ((3, 2), (1, 3), (1, 0)), (1, 1, 0), (5, 1, 2)], ids=str
)
def test_pool(on_cpu, kind, kernel, stride, padding):
    x = tensor(4, 3, 7, 6, low=-128, groups=2)
    compare(on_cpu, int8_pointwise.int8_pool2d, x, kind, kernel, stride, padding)
    x = Int8Tensor(torch.full((1, 1, 5, 5), -128, dtype=torch.int8), exponent(0))
    compare(on_cpu, int8_pointwise.int8_pool2d, x, kind, kernel, stride, padding)


@pytest.mark.parametrize("apart", [-128, -17, -16, -1, 0, 8, 16, 17, 24, 25])
def test_add(on_cpu, apart):
    a = tensor(6, 71, groups=2, low=-128, exponents=[-64, -60])
    b = tensor(6, 71, groups=2, low=-128, seed=1, exponents=[-64 + apart, -60 + apart])
    compare(on_cpu, int8_pointwise.int8_add, a, b)
    one = Int8Tensor(b.values[:3], b.exponent[:1])
    compare(on_cpu, int8_pointwise.int8_add, a, one)
    compare(on_cpu, int8_pointwise.int8_add, one, a)

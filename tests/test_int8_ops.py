"""Products of integers against int64 arithmetic of torch and the oracle, to the ends of their ranges."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels import ops
from ezo_kernels.ops import Int8Tensor, IntegerPerturbation, Noise, int8_matmul
from ezo_kernels.ops.noise import key_tensor
from tests import int8_oracle as oracle
from tests.int8_models import SEED, SITE, STEP, exponents, given, randint

pytestmark = pytest.mark.usefixtures("poisoned_empty")

BIAS = 17
PASSES = [(1, (1, -1)), (3, (1, -1)), (2, (1,)), (1, (-1,)), (1, (0,)), (3, (0,))]


def a_pass(device="cpu", queries=1, signs=(1, -1), r_max=40, p_zero=0.3, query=4):
    return IntegerPerturbation(
        key_tensor(SEED, STEP, torch.device(device)), Noise("sparse_int8", 7, p_zero, r_max), query, queries, signs
    )


def weights(w, p, site, layout):
    """clamp(w + sign z) of each group, int64."""
    if p is None or p.signs == (0,):
        return [w.cpu().long()] * (1 if p is None else p.groups)
    found = []
    for q in range(p.queries):
        z = ops.materialize(
            w.shape, seed=SEED, step=STEP, site=site, query=p.query + q, noise="sparse_int8", layout=layout,
            p_zero=p.noise.p_zero, r_max=p.noise.r_max,
        )  # fmt: skip
        found += [(w.cpu().long() + sign * z.cpu().long()).clamp(-127, 127) for sign in p.signs]
    return found


def requantised(acc, exponent, how="nearest"):
    shift = max(0, int(acc.abs().max()).bit_length() - 7)
    flat = [oracle.clamp(oracle.round_shift(v, shift, how)) for v in acc.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.int8).view(acc.shape), exponent + shift


def bias_of(b, s_b, s_acc):
    return torch.tensor(oracle.aligned_bias(b.tolist(), s_b, s_acc))


# ---- products


@pytest.fixture(params=[True, False], ids=["library", "numba"])
def multiplier(request, monkeypatch):
    """Both products of the CPU."""
    if request.param and not int8_matmul.library_is_exact():
        pytest.skip("torch's int8 product is not exact on this CPU")
    monkeypatch.setattr(int8_matmul, "library_multiplies", lambda: request.param)
    return request.param


def check_linear(x, w, b, p, how="nearest", s_w=-9, s_b=-3):
    """Both strategies against int64; x, w and b are not written."""
    kept = [t.clone() for t in (x.values, w, b) if t is not None]
    own = weights(w, p, SITE, "matrix")
    biases = weights(b, p, BIAS, "matrix") if b is not None else [None] * len(own)
    groups = x.groups if p is None or p.signs == (0,) else p.groups
    own, biases = ((t * groups)[:groups] for t in (own, biases))
    parts, values, found = x.values.cpu().long().chunk(x.groups), [], []
    for g, (w_g, b_g) in enumerate(zip(own, biases, strict=True)):
        s_acc = x.exponent[g if x.groups > 1 else 0].item() + s_w
        acc = parts[g if x.groups > 1 else 0] @ w_g.t()
        y, s = requantised(acc if b is None else acc + bias_of(b_g, s_b, s_acc), s_acc, how)
        values.append(y)
        found.append(s)
    for strategy in ("buffer", "twice"):
        y = ops.int8_linear(
            x, w, b, p, weight_exponent=exponents(s_w).to(w.device), site=SITE, bias_site=BIAS, rounding=how,
            bias_exponent=None if b is None else exponents(s_b).to(w.device), strategy=strategy,
        )  # fmt: skip
        assert y.exponent.tolist() == found and torch.equal(y.values.cpu(), torch.cat(values)), strategy
    assert all(torch.equal(a, t) for a, t in zip(kept, [t for t in (x.values, w, b) if t is not None], strict=True))


@pytest.mark.parametrize(("queries", "signs"), PASSES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", ["nearest", "pseudo"])
def test_linear_passes(queries, signs, shared, how, multiplier, device):
    p = a_pass(device, queries, signs)
    x = given(1 if shared else p.groups, 3, 33, device=device)
    w, b = randint(10, 33, seed=1).to(device), randint(10, seed=2).to(device)
    for bias in (b, None):
        check_linear(x, w, bias, p, how)
    check_linear(x, w, b, None, how)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 300), (65, 129), (17, 7)])
def test_linear_shapes(rows, n, k, multiplier, device):
    w, b = randint(n, k, seed=1).to(device), randint(n, seed=2).to(device)
    check_linear(given(2, rows, k, device=device), w, b, a_pass(device))


@pytest.mark.parametrize("bytes_", [1, 4 * 5 * 3, 4 * 5 * 7])
def test_linear_in_chunks_is_the_same(bytes_, monkeypatch):
    """The CPU sums a bounded number of rows at a time: one, three, all."""
    monkeypatch.setattr(sys.modules["ezo_kernels.ops.int8_linear"], "CHUNK_BYTES", bytes_)
    for how in ("nearest", "pseudo"):
        check_linear(given(2, 7, 12), randint(5, 12, seed=1), randint(5, seed=2), a_pass(), how)


@pytest.mark.parametrize("library", [True, False], ids=["library", "numba"])
@pytest.mark.parametrize("rows", [1, 5])
def test_linear_of_one_input(rows, library, monkeypatch):
    monkeypatch.setattr(int8_matmul, "library_multiplies", lambda: library)
    check_linear(given(2, rows, 1), randint(10, 1, seed=1), randint(10, seed=2), a_pass())


@pytest.mark.parametrize("library", [True, False], ids=["library", "numba"])
@pytest.mark.parametrize("k", [1, 7])
def test_gradients_of_a_layer_with_one_output(k, library, monkeypatch):
    """As the head makes them: e^T x and the sum of e, over a batch of five."""
    monkeypatch.setattr(int8_matmul, "library_multiplies", lambda: library)
    e, x = randint(2, 5, 1), randint(2, 5, k, seed=1)
    for right in (x, torch.ones((1, 5, 1), dtype=torch.int8)):
        acc, _ = ops.int8_gemm(e.transpose(1, 2), right.transpose(1, 2))
        assert torch.equal(acc.long(), e.long().transpose(1, 2) @ right.long())


def test_linear_of_more_dimensions_and_of_strides(device):
    x, w = given(2, 3, 5, 12, device=device), randint(7, 12, seed=1).to(device)
    check_linear(x, w, None, a_pass(device))
    turned = Int8Tensor(x.values.transpose(0, 1).contiguous().transpose(0, 1), x.exponent)
    check_linear(turned, w, None, a_pass(device))


@pytest.mark.parametrize("s_b", [-64, -30, -14, -13, 3, 8, 9, 64])
def test_bias_alignment(s_b, device):
    """To the right to nearest, to the left by 22 at most."""
    x, w, b = given(1, 4, 6, device=device), randint(5, 6, seed=1).to(device), randint(5, seed=2).to(device)
    check_linear(x, w, b, a_pass(device), s_b=s_b)


@pytest.mark.parametrize("s", [-64, 64])
def test_exponents_at_their_ends(s, device):
    x = Int8Tensor(randint(4, 6).to(device), exponents(s).to(device))
    check_linear(x, randint(5, 6, seed=1).to(device), randint(5, seed=2).to(device), a_pass(device), s_w=s, s_b=-s)


def test_zeros_stay_zeros(device):
    x = Int8Tensor(torch.zeros(4, 6, dtype=torch.int8, device=device), exponents(-5).to(device))
    w = randint(3, 6).to(device)
    y = ops.int8_linear(x, w, None, a_pass(device), weight_exponent=exponents(-9).to(device))
    assert not y.values.any() and y.exponent.tolist() == [-14, -14]


def test_the_largest_sum_fits(multiplier, device):
    """K = 99,336 products of -128 and -127, and a bias of 127 2^22: 29,697 below 2^31."""
    k = 99_336
    x = Int8Tensor(torch.full((1, k), -128, dtype=torch.int8, device=device), exponents(0).to(device))
    w = torch.full((2, k), -127, dtype=torch.int8, device=device)
    w[1] = 127
    b = torch.tensor([127, -127], dtype=torch.int8, device=device)
    total = k * 128 * 127 + (127 << 22)
    assert 2**31 - 128 * 127 <= total < 2**31
    zero, high = exponents(0).to(device), exponents(40).to(device)
    for strategy in ("buffer", "twice"):
        y = ops.int8_linear(x, w, b, None, weight_exponent=zero, bias_exponent=high, strategy=strategy)
        shift = total.bit_length() - 7
        assert shift == 24 and y.exponent.tolist() == [shift]
        assert y.values.tolist() == [[min(127, total + (1 << 23) >> 24), -127]]
    acc, peak = ops.int8_gemm(x.values[None], w[None])
    assert acc.tolist() == [[[k * 128 * 127, -k * 128 * 127]]] and peak.tolist() == [k * 128 * 127]
    with pytest.raises(ValueError, match="99337.*99336"):
        ops.int8_linear(
            Int8Tensor(torch.zeros(1, k + 1, dtype=torch.int8, device=device), zero),
            torch.zeros(1, k + 1, dtype=torch.int8, device=device), None, None, weight_exponent=zero,
        )  # fmt: skip


def test_gemm_of_any_strides(multiplier, device):
    a, b = randint(3, 7, 11, low=-128).to(device), randint(3, 5, 11, seed=1, low=-128).to(device)
    turned = a.transpose(1, 2).contiguous().transpose(1, 2)
    rows, columns = a[:, :1].expand(3, 7, 11), b[:, :, :1].expand(3, 5, 11)
    windows = a.flatten().as_strided((3, 7, 11), (17, 1, 1))
    pairs = [(a, b), (turned, b), (a, b[:1]), (a[:, ::2], b.flip(0))]
    pairs += [(rows, b), (a, columns), (windows, b), (turned, b[:, :1].expand(3, 5, 11)), (turned, columns)]
    for x, w in pairs:
        acc, peak = ops.int8_gemm(x, w)
        want = x.cpu().long() @ w.cpu().long().transpose(1, 2)
        assert torch.equal(acc.cpu().long(), want) and torch.equal(peak.cpu().long(), want.abs().amax((1, 2)))


CONVS = [
    dict(c=1, o=6, kernel=(5, 5), size=(12, 12), padding=2),
    dict(c=6, o=16, kernel=(5, 5), size=(9, 11)),
    dict(c=3, o=8, kernel=(3, 2), size=(11, 7), stride=(2, 3), padding=(1, 0)),
    dict(c=8, o=12, kernel=(3, 3), size=(10, 9), groups=4, dilation=2, padding=2),
    dict(c=10, o=10, kernel=(3, 3), size=(6, 6), groups=10, padding=1),
    dict(c=5, o=10, kernel=(3, 3), size=(6, 6), groups=5, stride=2, dilation=(1, 2), padding=(0, 3)),
    dict(c=37, o=9, kernel=(1, 1), size=(4, 5)),
    dict(c=2, o=3, kernel=(4, 7), size=(4, 7)),
    dict(c=2, o=3, kernel=(1, 3), size=(1, 1), padding=(0, 2), stride=3),
]


def check_conv(x, w, b, p, rounding="nearest", s_w=-9, s_b=-3, **how):
    own, biases = weights(w, p, SITE, "conv"), weights(b, p, BIAS, "matrix") if b is not None else [None]
    groups = x.groups if p is None or p.signs == (0,) else p.groups
    own, biases = ((t * groups)[:groups] for t in (own, biases))
    parts, values, found = x.values.cpu().double().chunk(x.groups), [], []
    for g, (w_g, b_g) in enumerate(zip(own, biases, strict=True)):
        s_acc = x.exponent[g if x.groups > 1 else 0].item() + s_w
        acc = F.conv2d(parts[g if x.groups > 1 else 0], w_g.double(), **how).long()
        if b is not None:
            acc += bias_of(b_g, s_b, s_acc)[:, None, None]
        y, s = requantised(acc, s_acc, rounding)
        values.append(y)
        found.append(s)
    for strategy in ("buffer", "twice"):
        y = ops.int8_conv2d(
            x, w, b, p, weight_exponent=exponents(s_w).to(w.device), site=SITE, bias_site=BIAS, rounding=rounding,
            bias_exponent=None if b is None else exponents(s_b).to(w.device), strategy=strategy, **how,
        )  # fmt: skip
        assert y.exponent.tolist() == found and torch.equal(y.values.cpu(), torch.cat(values)), strategy


@pytest.mark.parametrize("case", CONVS, ids=lambda c: f"{c['kernel']}x{c['c']}g{c.get('groups', 1)}")
def test_conv2d_shapes(case, multiplier, device):
    how = {k: v for k, v in case.items() if k in ("stride", "padding", "dilation", "groups")}
    c, o, kernel, size = (case[k] for k in ("c", "o", "kernel", "size"))
    x = given(2, 3, c, *size, device=device)
    w, b = randint(o, c // case.get("groups", 1), *kernel, seed=1).to(device), randint(o, seed=2).to(device)
    check_conv(x, w, b, a_pass(device), **how)
    last = Int8Tensor(x.values.contiguous(memory_format=torch.channels_last), x.exponent)
    check_conv(last, w, None, a_pass(device), "pseudo", **how)


@pytest.mark.parametrize(("queries", "signs"), PASSES)
@pytest.mark.parametrize("shared", [False, True])
def test_conv2d_passes(queries, signs, shared, multiplier, device):
    p = a_pass(device, queries, signs)
    x = given(1 if shared else p.groups, 2, 4, 7, 5, device=device)
    w, b = randint(6, 4, 3, 3, seed=1).to(device), randint(6, seed=2).to(device)
    check_conv(x, w, b, p)
    check_conv(x, w, b, None)


@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_in_chunks_is_the_same(groups, monkeypatch):
    """The CPU multiplies a bounded number of images at a time."""
    monkeypatch.setattr(sys.modules["ezo_kernels.ops.int8_conv2d"], "CHUNK_BYTES", 1500)
    x, w = given(2, 7, 4, 6, 6), randint(6, 4 // groups, 3, 3, seed=1)
    check_conv(x, w, randint(6, seed=2), a_pass(), padding=1, groups=groups)


def test_conv2d_is_the_oracles():
    x, w, b = given(1, 2, 4, 6, 5), randint(6, 2, 3, 2, seed=1), randint(6, seed=2)
    how = dict(stride=(2, 1), padding=(1, 1), dilation=(1, 2), groups=2)
    acc, size = oracle.conv2d(
        [row.flatten().tolist() for row in x.values], (4, 6, 5), w.flatten().tolist(), w.shape,
        oracle.aligned_bias(b.tolist(), -3, -14), **how,
    )  # fmt: skip
    want, s = oracle.requantise(acc, -14)
    y = ops.int8_conv2d(x, w, b, None, weight_exponent=exponents(-9), bias_exponent=exponents(-3), **how)
    assert y.values.flatten(1).tolist() == want and y.exponent.tolist() == [s] and y.shape[1:] == size


@pytest.mark.parametrize("layout", ["matrix", "conv"])
def test_noise_is_the_oracles(layout):
    shape = (3, 5, 2, 3) if layout == "conv" else (4, 11)
    how = dict(p_zero=0.3, r_max=40)
    z = ops.materialize(shape, seed=SEED, step=STEP, site=SITE, query=9, noise="sparse_int8", layout=layout, **how)
    key = oracle.fold(SEED, STEP)
    want = [oracle.z_at(*at, key=key, site=SITE, query=9, **how) for at in oracle.places(shape, layout == "conv")]
    assert z.flatten().tolist() == want and len(set(want)) > 10


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(x=torch.zeros(2, 6)), TypeError, "float32"),
        (dict(weight=torch.zeros(5, 6)), TypeError, "weight.*float32"),
        (dict(bias=torch.zeros(5)), TypeError, "bias.*float32"),
        (dict(weight_exponent=torch.zeros(1)), TypeError, "weight's exponent"),
        (dict(bias_exponent=None), TypeError, "bias's exponent"),
        (dict(weight=randint(5, 7)), ValueError, r"\(5, 7\)"),
        (dict(bias=randint(4)), ValueError, r"\[5\].*\(4,\)"),
        (dict(rounding="stochastic"), ValueError, "stochastic"),
        (dict(strategy="thrice"), ValueError, "'thrice'"),
        (dict(site=-1), ValueError, "site"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_linear_refuses(change, error, match):
    arguments = dict(
        x=Int8Tensor(randint(2, 6), exponents(0)), weight=randint(5, 6), bias=randint(5), p=None,
        weight_exponent=exponents(0), bias_exponent=exponents(0),
    )  # fmt: skip
    ops.int8_linear(**arguments)
    with pytest.raises(error, match=match):
        ops.int8_linear(**{**arguments, **change})


def test_another_number_of_groups_is_refused():
    with pytest.raises(ValueError, match="3 groups.*2"):
        ops.int8_linear(given(3, 2, 6), randint(5, 6), None, a_pass(), weight_exponent=exponents(0))


@pytest.mark.parametrize("peak", [128, -128, 1 << 14])
def test_a_peak_of_a_power_of_two_takes_one_bit_more(peak):
    """NITI's ceil(log2) gives 128 no shift, and a cast wraps it."""
    value, weight = {128: (64, 2), -128: (64, -2), 1 << 14: (-128, -128)}[peak]
    x = Int8Tensor(torch.tensor([[value, 1]], dtype=torch.int8), exponents(-6))
    w = torch.tensor([[weight, 0], [0, 3]], dtype=torch.int8)
    y = ops.int8_linear(x, w, None, None, weight_exponent=exponents(-7))
    shift = abs(peak).bit_length() - 7
    assert y.exponent.item() == -13 + shift
    assert y.values[0, 0].item() == peak >> shift and abs(y.values[0, 0].item()) == 64

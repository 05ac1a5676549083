"""Integer operators: golden values, int64 arithmetic of torch, the oracle, the ends of their ranges, and torch's checks."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from ezo_kernels import ops
from ezo_kernels.ops import Int8Tensor, IntegerPerturbation, Noise, _int8_cpu, _library, int8_matmul, quantize
from ezo_kernels.ops.int8_update import sum_groups, update_shift
from ezo_kernels.ops.noise import key_tensor, key_words
from tests import int8_oracle as oracle

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SEED, STEP, SITE, BIAS = 3, 5, 0xFEDC_BA98, 17
PASSES = [(1, (1, -1)), (3, (1, -1)), (2, (1,)), (1, (-1,)), (1, (0,)), (3, (0,))]


def randint(*shape, seed=0, low=-127, high=127):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def exponents(*values):
    return torch.tensor(values, dtype=torch.int32)


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


# ---- rounding


PSEUDO = [
    (1000, 4, 63), (1001, 4, 63), (1007, 4, 62), (1008, 4, 63), (1015, 4, 63), (-1000, 4, -63), (3, 1, 2), (-3, 1, -2),
    (6, 2, 2), (7, 2, 1), (5, 2, 1), (-7, 2, -1), (12345, 7, 97), (12349, 7, 96), (12351, 7, 96), (100000, 10, 98),
    (32767, 8, 127), (40000, 8, 127),
]  # fmt: skip


@pytest.mark.parametrize(("x", "n", "want"), PSEUDO)
def test_pseudo_stochastic_rounding_is_nitis(x, n, want, device):
    assert ops.round_shift(torch.tensor([x], dtype=torch.int32, device=device), n, "pseudo").tolist() == [want]
    assert oracle.clamp(oracle.round_shift(x, n, "pseudo")) == want


BIASES = [0.25, -0.125, 0.063, -0.094, 0.016, -0.055, 0.004, -0.029, 0.001, -0.015]


@pytest.mark.parametrize(("n", "bias"), [*enumerate(BIASES, 1)])
def test_mean_bias_of_pseudo_stochastic_rounding(n, bias):
    """Over all discarded bits, exactly; of negative numbers the other way round."""
    q = torch.arange(40, 60).repeat_interleave(1 << n)
    x = (q << n) + torch.arange(1 << n).repeat(20)
    assert oracle.clamp(60) == 60
    for sign in (1, -1):
        y = ops.round_shift((sign * x).int(), n, "pseudo").double()
        mean = (sign * y - x.double() / 2**n).mean().item()
        assert abs(mean - bias) <= 0.0005 + 1e-9


@pytest.mark.parametrize("rounding", ["nearest", "pseudo", "stochastic"])
@pytest.mark.parametrize("n", [*range(18), 24, 31])
def test_rounding_is_the_oracles(rounding, n, device):
    g = torch.Generator().manual_seed(n)
    reach = min(2**31 - 1, 130 << n)
    x = torch.randint(-reach, reach + 1, (7, 19), generator=g).int()
    x[0, :6] = torch.tensor([0, 1, -1, reach, -reach, 1 << max(n - 1, 0)])
    key = key_tensor(SEED, STEP, device)
    y = ops.round_shift(x.to(device), n, rounding, key=key, site=SITE, query=3)
    words = tuple(oracle.fold(SEED, STEP))
    for r in range(7):
        lanes = [oracle.lane_at(r, c, key=words, site=SITE, query=3) for c in range(19)]
        want = [oracle.clamp(oracle.round_shift(v, n, rounding, k)) for v, k in zip(x[r].tolist(), lanes, strict=True)]
        assert y[r].tolist() == want


@pytest.mark.parametrize("n", [1, 4, 7, 12])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.93])
def test_stochastic_rounding_is_unbiased(n, fraction):
    """100,000 lanes: within five standard errors of x / 2^n."""
    for sign in (1, -1):
        value = (5 << n) + round(fraction * (1 << n))
        x = torch.full((100, 1000), sign * value, dtype=torch.int32)
        y = ops.round_shift(x, n, "stochastic", key=key_tensor(1, 1), site=7).double()
        p = (value % (1 << n)) / (1 << n)
        # a lane of n bits is below p out of 2^n times, and "larger" leaves the one that is equal out
        assert abs((sign * y - value / 2**n).mean().item()) <= 5 * math.sqrt(p * (1 - p) / 1e5) + 1e-12


def test_the_oracles_key_is_ours():
    assert tuple(w & 0xFFFFFFFF for w in key_words(key_tensor(SEED, STEP))) == oracle.fold(SEED, STEP)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: ops.round_shift(x.float(), 1), TypeError, "float32"),
        (lambda x: ops.round_shift(x, 32), ValueError, "32"),
        (lambda x: ops.round_shift(x, -1), ValueError, "-1"),
        (lambda x: ops.round_shift(x, 1, "up"), ValueError, "'up'"),
        (lambda x: ops.round_shift(x, 1, "stochastic"), ValueError, "key"),
    ],
)
def test_rounding_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.zeros(3, dtype=torch.int32))


# ---- quantising


@pytest.mark.parametrize("scale", [1e-15, 3e-3, 0.99, 1.0, 127.49, 127.5, 1e9])
def test_quantize_takes_the_least_exponent(scale):
    x = torch.linspace(-1, 1, 33, dtype=torch.float64) * scale
    q = quantize(x)
    s = q.exponent.item()
    assert torch.equal(q.values.double(), torch.sign(x) * torch.floor(x.abs() / 2.0**s + 0.5))
    assert q.values.abs().max() <= 127 and torch.floor(x.abs().max() / 2.0 ** (s - 1) + 0.5) > 127
    assert torch.equal(q.dequantize(torch.float64), q.values.double() * 2.0**s)


def test_quantize_of_zeros_and_with_an_exponent():
    assert quantize(torch.zeros(3)).exponent.tolist() == [-7]
    assert quantize(torch.tensor([0.5, -1.5, 200.0, -200.0]), 0).values.tolist() == [1, -2, 127, -127]
    for exponent in (-64, 64):
        assert quantize(torch.zeros(1), exponent).exponent.tolist() == [exponent]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: quantize(torch.ones(2), 65), ValueError, "65"),
        (lambda: quantize(torch.ones(2), -65), ValueError, "-65"),
        (lambda: quantize(torch.ones(2), 1.5), TypeError, "float"),
        (lambda: quantize(torch.ones(2).int()), TypeError, "int32"),
        (lambda: quantize([1.0]), TypeError, "list"),
        (lambda: quantize(torch.tensor([math.inf])), ValueError, "finite"),
        (lambda: quantize(torch.tensor([1e30])), ValueError, "exponent"),
        (lambda: Int8Tensor(torch.ones(2), exponents(0)), TypeError, "float32"),
        (lambda: Int8Tensor(randint(2), torch.zeros(1)), TypeError, "float32"),
        (lambda: Int8Tensor(randint(3), exponents(0, 0)), ValueError, "3 rows.*2"),
        (lambda: Int8Tensor(randint(3), exponents(0)[0]), ValueError, "groups"),
    ],
)
def test_quantize_and_int8tensor_refuse(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---- products


@pytest.fixture(params=[True, False], ids=["library", "numba"])
def multiplier(request, monkeypatch):
    """Both products of the CPU."""
    if request.param and not int8_matmul.library_multiplies():
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


def given(groups, *shape, seed=0, device="cpu"):
    """x with other exponents and another reach in each group, -128 among its values."""
    x = randint(groups, *shape, seed=seed, low=-128)
    for g in range(groups):
        x[g] >>= g % 3
    return Int8Tensor(x.flatten(0, 1).to(device), exponents(*(-5 - g for g in range(groups))).to(device))


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
    monkeypatch.setattr(int8_matmul, "_CHUNK_BYTES", bytes_)
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
    for x, w in ((a, b), (turned, b), (a, b[:1]), (a[:, ::2], b.flip(0))):
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
    monkeypatch.setattr(sys.modules["ezo_kernels.ops.int8_conv2d"], "_CHUNK_BYTES", 1500)
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


# ---- between the products


def test_relu(device):
    x = given(3, 2, 5, device=device)
    y = ops.int8_relu(x)
    assert torch.equal(y.values, x.values.clamp_min(0)) and torch.equal(y.exponent, x.exponent)


POOLS = [
    dict(kernel=2), dict(kernel=3, stride=2, padding=1), dict(kernel=(2, 3), stride=(1, 2)), dict(kernel=(5, 7)),
    dict(kernel=1), dict(kernel=(3, 2), padding=(1, 1), stride=3), dict(kernel=2, padding=1),
]  # fmt: skip


@pytest.mark.parametrize("how", POOLS, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_max_pool(how, size, device):
    x = given(2, 3, 4, *size, device=device)
    x.values[0, 0] = -128  # padding is below every value
    kernel, others = how["kernel"], {k: v for k, v in how.items() if k != "kernel"}
    y = ops.int8_pool2d(x, "max", **how)
    want = F.max_pool2d(x.values.cpu().double(), kernel, **others)
    assert torch.equal(y.values.cpu().double(), want) and torch.equal(y.exponent, x.exponent)


@pytest.mark.parametrize("how", POOLS, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_avg_pool(how, size, device):
    """Halves away from zero, padding counted as zeros."""
    x = given(2, 3, 4, *size, device=device)
    kernel, others = how["kernel"], {k: v for k, v in how.items() if k != "kernel"}
    count = torch.Size((kernel, kernel) if isinstance(kernel, int) else kernel).numel()
    total = F.avg_pool2d(x.values.cpu().double(), kernel, divisor_override=1, **others).long()
    want = torch.sign(total) * ((2 * total.abs() + count) // (2 * count))
    y = ops.int8_pool2d(x, "avg", **how)
    assert torch.equal(y.values.cpu().long(), want) and torch.equal(y.exponent, x.exponent)
    window = [5, -128, 0, 7]
    assert oracle.average(window) == -29 and oracle.average([1, 2]) == 2 and oracle.average([-1, -2]) == -2


@pytest.mark.parametrize(
    ("how", "match"),
    [(dict(kernel=9), r"\(9, 9\)"), (dict(kernel=2, padding=2), "padding"), (dict(kernel=0), "kernel"),
     (dict(kernel=2, stride=0), "stride"), (dict(kernel=2, kind="min"), "min"), (dict(kernel=(2, 2, 2)), "kernel")],
    ids=str,
)  # fmt: skip
def test_pool_refuses(how, match):
    with pytest.raises(ValueError, match=match):
        ops.int8_pool2d(given(1, 1, 1, 4, 4), **{"kind": "max", **how})


@pytest.mark.parametrize("apart", [0, 1, 3, 7, 15, 16, 17, 22, 40, 128])
@pytest.mark.parametrize("larger", ["a", "b"])
def test_add_is_the_oracles(apart, larger, device):
    s = [-64, -64 + apart]
    a = Int8Tensor(randint(6, 9, low=-128).to(device), exponents(s[larger == "a"], -3).to(device))
    b = Int8Tensor(randint(6, 9, seed=1, low=-128).to(device), exponents(s[larger == "b"], -4).to(device))
    y = ops.int8_add(a, b)
    for g in range(2):
        parts = [t.values.chunk(2)[g].tolist() for t in (a, b)]
        want, exponent = oracle.add(parts[0], a.exponent[g].item(), parts[1], b.exponent[g].item())
        assert y.values.chunk(2)[g].tolist() == want and y.exponent[g].item() == exponent


def test_add_shares_a_summand_of_one_group(device):
    a, b = given(1, 3, 5, device=device), given(4, 3, 5, seed=1, device=device)
    every = Int8Tensor(a.values.repeat(4, 1), a.exponent.repeat(4))
    for left, right in ((a, b), (b, a)):
        y, want = ops.int8_add(left, right), ops.int8_add(every, b)
        assert torch.equal(y.values, want.values) and torch.equal(y.exponent, want.exponent)
    with pytest.raises(ValueError, match="of 2 groups and .* of 4"):
        ops.int8_add(given(2, 6, 5, device=device), b)


def test_functions_without_an_integer_form_are_refused_by_name():
    x = given(1, 2, 3, 4, 4)
    for call, name in ((F.gelu, "gelu"), (torch.sigmoid, "sigmoid"), (torch.exp, "exp"), (F.softmax, "softmax")):
        with pytest.raises(TypeError, match=name):
            call(x) if name != "softmax" else call(x, 1)
    for call in (
        lambda: F.max_pool2d(x, 2, ceil_mode=True),
        lambda: F.avg_pool2d(x, 2, ceil_mode=True),
        lambda: F.adaptive_avg_pool2d(x, 3),
        lambda: torch.add(x, x, alpha=2),
    ):
        with pytest.raises(NotImplementedError):
            call()
    for call in (lambda: x.flatten(), lambda: x.view(-1)):
        with pytest.raises(ValueError, match="first dimension|dimension 1"):
            call()


# ---- losses


LOGITS = [40, -20, 100, 3, 0, -90, 64, 12, 7, -5]


def niti(v, s):
    out = torch.empty(len(v), dtype=torch.int64).numpy()
    _int8_cpu.niti_weights(torch.tensor(v, dtype=torch.int8).numpy(), s, out)
    return out.tolist()


GRADIENTS = [
    (-4, 2, 1108, [27, 0, -152, 1, 1, 0, 116, 5, 1, 1]),
    (-4, 0, 1108, [-2015, 0, 1890, 1, 1, 0, 116, 5, 1, 1]),
    (-9, 2, 5380967, [215, 191, -1801, 200, 199, 167, 226, 204, 202, 197]),
]


@pytest.mark.parametrize(("s", "label", "total", "want"), GRADIENTS)
def test_gradient_of_the_cross_entropy_is_nitis(s, label, total, want):
    """Before the last shift; after it within one unit of that over 16."""
    assert sum(niti(LOGITS, s)) == total
    assert oracle.softmax_weights(LOGITS, s) == niti(LOGITS, s)
    assert oracle.error_before_rounding(LOGITS, s, label) == want
    y = Int8Tensor(torch.tensor([LOGITS], dtype=torch.int8), exponents(s))
    e = ops.int8_cross_entropy_gradient(y, torch.tensor([label]), key_tensor(0, 0))[0].tolist()
    assert all(abs(a - max(-127, min(127, b / 16))) < 1 for a, b in zip(e, want, strict=True))


@pytest.mark.parametrize("s", [-64, -30, -25, -24, -12, -8, -7, -6, -3, 0, 3, 20, 64])
def test_gradient_and_loss_are_the_oracles(s, device):
    """Two groups, each with its own words; every exponent from one end to the other."""
    y = Int8Tensor(randint(10, 7, seed=s + 64, low=-128).to(device), exponents(s, min(s + 1, 64)).to(device))
    labels = torch.tensor([0, 6, 3, 3, 1], device=device)
    e = ops.int8_cross_entropy_gradient(y, labels, key_tensor(SEED, STEP, device), query=6)
    key = oracle.fold(SEED, STEP)
    for g in range(2):
        rows, own = y.values.chunk(2)[g].tolist(), y.exponent[g].item()
        assert e.chunk(2)[g].tolist() == oracle.error_rows(rows, own, labels.tolist(), key, 6 + g)
    if s > 38:
        return  # a left shift is held at 32 bits there, which the document does not say
    for fraction in (0, 1, 5, 8):
        losses = ops.int8_cross_entropy(y, labels, fraction_bits=fraction)
        want = [
            oracle.cross_entropy(part.tolist(), own, labels.tolist(), fraction)
            for part, own in zip(y.values.chunk(2), y.exponent.tolist(), strict=True)
        ]
        assert losses.tolist() == want


def test_gradient_is_unbiased_and_sums_to_about_zero():
    n = 4000
    y = Int8Tensor(torch.tensor([LOGITS], dtype=torch.int8).repeat(n, 1), exponents(-4))
    e = ops.int8_cross_entropy_gradient(y, torch.full((n,), 2), key_tensor(1, 1)).double()
    want = torch.tensor(GRADIENTS[0][3]) / 16
    assert (e.mean(0) - want).abs().max() < 5 * 0.5 / math.sqrt(n)
    assert e.sum(1).mean().abs() < 0.1


@pytest.mark.parametrize("s", range(-12, 5))
def test_cross_entropy_is_close_to_the_floats(s, device):
    """Within four units of 2^-8 a row of log2(e) times the cross-entropy in fp64 (and what 47274 2^-15 is off of log2 e)."""
    rows = randint(64, 10, seed=s + 50, low=-128)
    labels = torch.arange(64) % 10
    for v, label in zip(rows, labels, strict=True):
        y = Int8Tensor(v[None].to(device), exponents(s).to(device))
        found = ops.int8_cross_entropy(y, label[None].to(device)).item() / 256
        bits = v.double() * 2.0**s * (47274 / 32768)
        want = (torch.logsumexp(bits * math.log(2), 0) / math.log(2) - bits[label]).item()
        assert abs(found - want) <= 4 / 256


@pytest.mark.parametrize(("fraction", "share"), [(8, 0.98), (0, 0.85)])
def test_signs_agree_with_the_floats(fraction, share):
    """Logits of standard deviation 4 and a perturbation of about half of one, sums over 64 rows: 88% without fractions."""
    g, agreed, trials = torch.Generator().manual_seed(0), 0, 400
    labels = torch.arange(64) % 10
    for _ in range(trials):
        base = torch.randn(64, 10, generator=g, dtype=torch.float64) * 4
        moved = torch.randn(64, 10, generator=g, dtype=torch.float64) * 0.5
        pair = [quantize(base + sign * moved) for sign in (1, -1)]
        exact = [F.cross_entropy(y.dequantize(torch.float64), labels).item() for y in pair]
        ours = [ops.int8_cross_entropy(y, labels, fraction_bits=fraction).item() for y in pair]
        agreed += (ours[0] > ours[1]) - (ours[0] < ours[1]) == (exact[0] > exact[1]) - (exact[0] < exact[1])
    assert agreed >= share * trials, agreed


def test_cross_entropy_of_ties_one_class_and_one_row(device):
    def loss(rows, labels, s=-4, fraction=8):
        y = Int8Tensor(torch.tensor(rows, dtype=torch.int8, device=device), exponents(s).to(device))
        return ops.int8_cross_entropy(y, torch.tensor(labels, device=device), fraction_bits=fraction).item()

    assert loss([[5, 5, 5, 5]], [2]) == 2 * 256 and loss([[5] * 4], [0], fraction=0) == 2
    assert loss([[77]], [0]) == 0 and loss([[-128], [127]], [0, 0]) == 0
    assert loss([[127, -128]], [0], s=4) == 0
    assert loss([[127, -128]], [1], s=0, fraction=0) == (47274 * 127 >> 15) - (47274 * -128 >> 15)
    assert loss([[1, 2, 3], [3, 1, 2]], [0, 1]) == loss([[1, 2, 3]], [0]) + loss([[3, 1, 2]], [1])


def test_losses_of_extreme_exponents_do_not_wrap():
    y = Int8Tensor(torch.tensor([[127, -128]] * 400, dtype=torch.int8), exponents(64))
    one = ops.int8_cross_entropy(y[:1], torch.ones(1, dtype=torch.int64)).item()
    assert ops.int8_cross_entropy(y, torch.ones(400, dtype=torch.int64)).item() == 400 * one > 2**48


@pytest.mark.parametrize("apart", [-40, -9, -8, -1, 0, 3, 16, 17, 60])
def test_squared_error_is_the_oracles(apart, device):
    y = Int8Tensor(randint(6, 5, low=-128).to(device), exponents(-4 + apart, -5 + apart).to(device))
    t = Int8Tensor(randint(3, 5, seed=1, low=-128).to(device), exponents(-4).to(device))
    losses, error = ops.int8_squared_error(y, t, gradient=True)
    assert torch.equal(losses, ops.int8_squared_error(y, t))
    for g, part in enumerate(y.values.chunk(2)):
        own = y.exponent[g].item()
        assert losses[g].item() == oracle.squared_error(part.tolist(), own, t.values.tolist(), -4)
        for v, u, e in zip(
            part.flatten().tolist(), t.values.flatten().tolist(), error.chunk(2)[g].flatten().tolist(), strict=True
        ):
            d = max(-(2**20), min(2**20, oracle.at_exponent(v, own + 4 + 8, 24) - (u << 8)))
            assert e == oracle.clamp(oracle.round_shift(d, 8))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda y, t: ops.int8_cross_entropy(y, t.float()), TypeError, "float32"),
        (lambda y, t: ops.int8_cross_entropy(y, t[:2]), ValueError, r"\(2,\)"),
        (lambda y, t: ops.int8_cross_entropy(y, t, fraction_bits=9), ValueError, "fraction_bits"),
        (lambda y, t: ops.int8_cross_entropy(y.values, t), TypeError, "int8"),
        (lambda y, t: ops.int8_cross_entropy_gradient(y, t[:1], key_tensor(0, 0)), ValueError, r"\(1,\)"),
        (lambda y, t: ops.int8_squared_error(y, t), TypeError, "target.*int64"),
        (lambda y, t: ops.int8_squared_error(y, y[:2]), ValueError, r"\(2, 4\)"),
    ],
)
def test_losses_refuse(call, error, match):
    with pytest.raises(error, match=match):
        call(Int8Tensor(randint(3, 4), exponents(0)), torch.tensor([0, 1, 2]))


# ---- updates


@pytest.mark.parametrize("rounding", ["nearest", "pseudo", "stochastic"])
@pytest.mark.parametrize("g", [[1], [-1], [0], [1, -1, 1], [0, 1, 0]], ids=str)
@pytest.mark.parametrize("shift", [0, 2, 6, 14])
def test_update_is_the_oracles(rounding, g, shift, device):
    shapes, layouts, sites = [(3, 5), (7,), (4, 3, 2, 2)], ["matrix", "matrix", "conv"], [SITE, 0, 2**31]
    params = [randint(*s, seed=i).to(device) for i, s in enumerate(shapes)]
    before, how = [p.cpu().flatten().tolist() for p in params], dict(p_zero=0.25, r_max=127)
    ops.int8_update_(
        params, key_tensor(SEED, STEP, device), torch.tensor(g, dtype=torch.int32, device=device),
        exponents(shift).to(device), sites=sites, layouts=layouts, noise=Noise("sparse_int8", **how), rounding=rounding,
    )  # fmt: skip
    key = oracle.fold(SEED, STEP)
    for p, w, site, layout in zip(params, before, sites, layouts, strict=True):
        for at, old, new in zip(oracle.places(p.shape, layout == "conv"), w, p.flatten().tolist(), strict=True):
            total = sum(s * oracle.z_at(*at, key=key, site=site, query=q, **how) for q, s in enumerate(g))
            lane = oracle.lane_at(*at, key=key, site=site)
            assert new == oracle.clamp(old - oracle.round_shift(total, shift, rounding, lane))


@pytest.mark.parametrize("rounding", ["nearest", "pseudo", "stochastic"])
@pytest.mark.parametrize("bits", [-8, -1, 0, 1, 4, 7])
def test_head_update_is_the_oracles(rounding, bits, device):
    w, grad = (
        randint(5, 9).to(device),
        torch.randint(-90_000, 90_000, (5, 9), generator=torch.Generator().manual_seed(1)),
    )
    before, grad = w.tolist(), grad.int().to(device)
    peak = grad.abs().max().reshape(1)
    ops.int8_head_update_(
        w, grad, peak, exponents(bits).to(device), key=key_tensor(SEED, STEP, device), site=SITE, rounding=rounding
    )
    n, key = max(0, oracle.bits(peak.item()) - bits), oracle.fold(SEED, STEP)
    for r in range(5):
        for c in range(9):
            move = oracle.round_shift(grad[r, c].item(), n, rounding, oracle.lane_at(r, c, key=key, site=SITE))
            assert w[r, c].item() == oracle.clamp(before[r][c] - move)


def test_head_update_of_no_gradient_changes_nothing(device):
    w = randint(3, 4).to(device)
    before, zero = w.clone(), torch.zeros(3, 4, dtype=torch.int32, device=device)
    for rounding in ("nearest", "pseudo", "stochastic"):
        ops.int8_head_update_(
            w, zero, zero[0, :1], exponents(7).to(device), key=key_tensor(0, 0, device), site=1, rounding=rounding
        )
    assert torch.equal(w, before)


def test_gradients_of_groups_are_summed_at_the_largest_exponent(device):
    acc = torch.tensor([[100, -7, 3], [5, 6, -2], [1, 1, 1]], dtype=torch.int32, device=device)
    total, peak = sum_groups(acc, exponents(-3, -1, -40).to(device))
    assert total.tolist() == [25 + 5, -2 + 6, 1 - 2] and peak.tolist() == [30]


def test_update_shift_leaves_bits():
    for r_max in (1, 2, 3, 4, 100, 127):
        for bits in range(-8, 8):
            assert update_shift(bits, r_max) == max(0, oracle.bits(r_max) - bits)


def test_updates_refuse():
    w, key, g, n = randint(3, 4), key_tensor(0, 0), exponents(1), exponents(0)
    before = w.clone()
    for call, error, match in (
        (lambda: ops.int8_update_([w.float()], key, g, n, sites=[1]), TypeError, "float32"),
        (lambda: ops.int8_update_([w], key, g.float(), n, sites=[1]), TypeError, "float32"),
        (lambda: ops.int8_update_([w], key, g[:0], n, sites=[1]), ValueError, "queries"),
        (lambda: ops.int8_update_([w], key, g, n, sites=[1, 2]), ValueError, "2 sites"),
        (lambda: ops.int8_update_([w.t()], key, g, n, sites=[1]), ValueError, "contiguous"),
        (lambda: ops.int8_update_([w], key, g, n, sites=[1], rounding="up"), ValueError, "'up'"),
        (lambda: ops.int8_update_([w], key, g, n, sites=[1], noise=Noise()), ValueError, "gaussian"),
        (lambda: ops.int8_head_update_(w, exponents(1), n, n, key=key, site=1), ValueError, r"\(1,\)"),
    ):
        with pytest.raises(error, match=match):
            call()
    assert torch.equal(w, before)


# ---- torch's own checks


PASS = (0, 1, [1, -1], 7, 0.3, 40)  # query, queries, signs, rounds, p_zero, r_max


def arguments(op):
    """Of one operator, its outputs among them; two groups."""
    one, two, key = exponents(-5), exponents(-5, -6), key_tensor(1, 2)

    def empty(*shape, dtype=torch.int8):
        return torch.zeros(shape, dtype=dtype)

    peak, sums = empty(2, dtype=torch.int32), empty(6, 4, dtype=torch.int32)
    x = randint(6, 5)
    return {
        "int8_linear": (x, randint(4, 5), randint(4), two, one, one, key, 1, 2, 0, "nearest", *PASS, sums, peak,
                        empty(6, 4), two.clone()),
        "int8_conv2d": (randint(4, 2, 5, 5), randint(3, 2, 3, 3), None, two, one, None, key, 1, 2, [1, 1], [0, 0], [1, 1],
                        1, [3, 3], 3, "pseudo", *PASS, empty(0, dtype=torch.int32), peak, empty(4, 3, 3, 3), two.clone()),
        "int8_requantize": (torch.full((6, 4), 300, dtype=torch.int32), exponents(300, 300), two, one, "nearest",
                            empty(6, 4), two.clone()),
        "int8_gemm": (randint(2, 3, 5), randint(1, 4, 5), empty(2, 3, 4, dtype=torch.int32), peak),
        "int8_round": (sums, 3, "stochastic", key, 1, 2, 7, empty(6, 4)),
        "int8_relu": (x, empty(6, 5)),
        "int8_pool2d": (randint(2, 1, 4, 4), "max", [2, 2], [2, 2], [0, 0], empty(2, 1, 2, 2)),
        "int8_add": (x, x.clone(), two, two.clone(), 2, exponents(300, 300), empty(6, 5), two.clone()),
        "int8_cross_entropy": (x, two, torch.tensor([0, 1, 2]), 8, empty(2, dtype=torch.int64)),
        "int8_cross_entropy_gradient": (x, two, torch.tensor([0, 1, 2]), key, 3, 7, empty(6, 5)),
        "int8_squared_error": (x, two, randint(3, 5), one, 8, empty(2, dtype=torch.int64), empty(6, 5)),
        "int8_update_": ([randint(3, 4), randint(5)], key, exponents(1), one.abs(), empty(0, dtype=torch.int64), [1, 2],
                         [0, 0], 0, "stochastic", 7, 0.3, 40),
        "int8_sum_groups": (sums.view(2, 3, 4), two, empty(3, 4, dtype=torch.int32), exponents(0)),
        "int8_head_update_": (randint(3, 4), torch.full((3, 4), 9, dtype=torch.int32), exponents(9), exponents(1), key, 1,
                              "pseudo", 7),
    }[op]  # fmt: skip


OPERATORS = [
    "int8_linear", "int8_conv2d", "int8_requantize", "int8_gemm", "int8_round", "int8_relu", "int8_pool2d", "int8_add",
    "int8_cross_entropy", "int8_cross_entropy_gradient", "int8_squared_error", "int8_update_", "int8_sum_groups",
    "int8_head_update_",
]  # fmt: skip


@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op):
    result = torch.library.opcheck(getattr(torch.ops.ezo, op).default, arguments(op))
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4


def test_every_integer_operator_is_listed_here():
    assert {name for name, _ in _library.implementations if name.startswith("int8")} == set(OPERATORS)


@pytest.mark.parametrize("op", OPERATORS)
def test_fake_tensors(op):
    """No operator looks at data on the host, which a fake tensor would refuse."""
    with FakeTensorMode() as mode:
        fakes = [
            mode.from_tensor(a) if isinstance(a, torch.Tensor)
            else [mode.from_tensor(t) for t in a] if isinstance(a, list) and isinstance(a[0], torch.Tensor) else a
            for a in arguments(op)
        ]  # fmt: skip
        assert getattr(torch.ops.ezo, op).default(*fakes) is None


def test_a_pass_of_fake_tensors_has_the_real_shapes():
    def run(values, exponent, w, s, labels):
        x = Int8Tensor(values, exponent)
        y = F.max_pool2d(F.relu(ops.int8_conv2d(x, w[0], None, None, weight_exponent=s)), 2).flatten(1)
        y = ops.int8_linear(y, w[1], None, None, weight_exponent=s)
        return y.values, y.exponent, ops.int8_cross_entropy(y, labels)

    real = [randint(4, 2, 6, 6), exponents(-5), [randint(3, 2, 3, 3), randint(5, 12)], exponents(-9), torch.arange(4)]
    want = run(*real)
    with FakeTensorMode() as mode:
        fakes = [[mode.from_tensor(t) for t in a] if isinstance(a, list) else mode.from_tensor(a) for a in real]
        found = run(*fakes)
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in want]


def test_inference_mode_and_versions():
    """In place updates are seen by autograd's version counter, and run in inference mode."""
    w, key = randint(3, 4), key_tensor(0, 0)
    version = w._version
    ops.int8_update_([w], key, exponents(1), exponents(0), sites=[1], noise=Noise("sparse_int8", r_max=127))
    assert w._version > version
    with torch.inference_mode():
        v = randint(3, 4)
        ops.int8_update_([v], key, exponents(1), exponents(0), sites=[1], noise=Noise("sparse_int8", r_max=127))
        assert torch.equal(v.clone(), w)
        given(1, 2, 3).flatten(1)

"""Integers between and after the products: rounding, quantising, pooling, addition, losses, updates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels import ops
from ezo_kernels.ops import Int8Tensor, Noise, quantize
from ezo_kernels.ops.int8_head import HeadGradient, int8_head_step_, sum_groups
from ezo_kernels.ops.int8_update import update_shift
from ezo_kernels.ops.noise import key_tensor, key_words
from tests import int8_oracle as oracle
from tests.int8_models import SEED, SITE, STEP, exponents, given, randint

pytestmark = pytest.mark.usefixtures("poisoned_empty")

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
    below = torch.tensor([0.5, -2.5], dtype=torch.float64)
    assert quantize(torch.nextafter(below, torch.zeros(2, dtype=torch.float64)), 0).values.tolist() == [0, -2]
    assert quantize(torch.tensor([1e308, -1e308], dtype=torch.float64), -64).values.tolist() == [127, -127]
    for exponent in (-64, 64):
        assert quantize(torch.zeros(1), exponent).exponent.tolist() == [exponent]


def test_one_number_without_a_dimension_comes_back():
    for x in (torch.tensor(1.5), torch.tensor(-3e-5, dtype=torch.float64)):
        q = quantize(x)
        assert q.shape == () and q.groups == 1 and q.dequantize().shape == ()
        assert q.dequantize().item() == pytest.approx(x.item(), rel=1 / 127)
    row = quantize(torch.tensor([1.0, -2.0]))[1]
    assert row.dequantize().item() == -2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", [-200, -150, -127, -64, -24, -10, 0, 9, 20, 64, 130])
def test_dequantize_is_exact_where_the_dtype_reaches(dtype, exponent):
    """2^s by itself may be out of reach where v 2^s is not; a zero stays one."""
    v = torch.arange(-128, 128).to(torch.int8)
    want = (v.double() * 2.0**exponent).to(dtype)
    assert torch.equal(Int8Tensor(v, exponents(exponent)).dequantize(dtype), want)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: quantize(torch.ones(2), 65), ValueError, "65"),
        (lambda: quantize(torch.ones(2), -65), ValueError, "-65"),
        (lambda: quantize(torch.ones(2), 1.5), TypeError, "float"),
        (lambda: quantize(torch.ones(2), True), TypeError, "exponent must be an int, got bool"),
        (lambda: quantize(torch.ones(2).int()), TypeError, "int32"),
        (lambda: quantize([1.0]), TypeError, "list"),
        (lambda: quantize(torch.tensor([math.inf])), ValueError, "finite"),
        (lambda: quantize(torch.tensor([1e30])), ValueError, r"reaches 1e\+30.*127 \* 2\^64"),
        (lambda: Int8Tensor(torch.ones(2), exponents(0)), TypeError, "float32"),
        (lambda: Int8Tensor(randint(2), torch.zeros(1)), TypeError, "float32"),
        (lambda: Int8Tensor([1, 2], 0), TypeError, "list and int"),
        (lambda: Int8Tensor(randint(2), 0), TypeError, "torch.int8 and int"),
        (lambda: Int8Tensor(randint(3), exponents(0, 0)), ValueError, "3 rows.*2"),
        (lambda: Int8Tensor(randint(3), exponents(0)[0]), ValueError, "groups"),
        (lambda: Int8Tensor(randint(3)[0], exponents(0, 0)), ValueError, r"shape \(\).*2 groups"),
        (lambda: quantize(torch.ones(2)).dequantize(torch.int32), TypeError, "dequantize.*torch.int32"),
        (lambda: quantize(torch.ones(2)).dequantize(float), TypeError, "dequantize.*float"),
        (lambda: quantize(torch.ones(2)).to(torch.float32), TypeError, r"torch.float32.*dequantize\(torch.float32\)"),
        (lambda: quantize(torch.ones(2)).to(torch.int32), TypeError, r"torch.int32.*dequantize\(\)"),
    ],
)
def test_quantize_and_int8tensor_refuse(call, error, match):
    with pytest.raises(error, match=match):
        call()


# ---- between the products


def test_a_split_of_no_rows_is_refused():
    x = quantize(torch.ones(5, 2))
    assert [len(part) for part in x.split(2)] == [2, 2, 1]
    for rows in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1 row a batch, got {rows}"):
            x.split(rows)


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
    with pytest.raises(NotImplementedError, match="alpha must be 1, got 2"):
        x.add(x, alpha=2)
    for call in (lambda: x.flatten(), lambda: x.view(-1)):
        with pytest.raises(ValueError, match="first dimension|dimension 1"):
            call()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: torch.flatten(x, 4), r"flatten .*\(2, 3, 4, 4\).* no dimension 4"),
        (lambda x: x.flatten(1, 5), "no dimension 5"),
        (lambda x: x.flatten(1, -5), "no dimension -5"),
        (lambda x: x.flatten(3, 1), "start_dim 3 is behind end_dim 1"),
        (lambda x: torch.amax(x, 5), "amax .* no dimension 5"),
        (lambda x: torch.amax(x, -6), "no dimension -6"),
    ],
)
def test_a_dimension_that_is_not_there_is_refused(call, match):
    """As torch does: counted around, it would be another one."""
    with pytest.raises(ValueError, match=match):
        call(given(1, 2, 3, 4, 4))


def test_functions_take_torchs_names():
    x = given(1, 2, 3, 4, 4)
    for call in (
        lambda x: torch.flatten(input=x, start_dim=1),
        lambda x: torch.reshape(input=x, shape=(2, 48)),
        lambda x: torch.relu(input=x),
        lambda x: torch.amax(input=x, dim=1),
        lambda x: F.max_pool2d(input=x, kernel_size=2),
    ):
        assert torch.equal(call(x).values, call(x.values.int()).to(torch.int8))
    for y in (torch.add(input=x, other=x), torch.add(x, other=x)):
        assert torch.equal(y.values, (x + x).values)
    assert F.avg_pool2d(input=x, kernel_size=2).shape == (2, 3, 2, 2)


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

    def head_step(*gradient, **how):
        int8_head_step_([w], [HeadGradient(*gradient)] if gradient else [], n, key=key, sites=[1], **how)

    for call, error, match in (
        (lambda: ops.int8_update_([w.float()], key, g, n, sites=[1]), TypeError, "float32"),
        (lambda: ops.int8_update_([w], key, g.float(), n, sites=[1]), TypeError, "float32"),
        (lambda: ops.int8_update_([w], key, g[:0], n, sites=[1]), ValueError, "queries"),
        (lambda: ops.int8_update_([w], key, g, n, sites=[1, 2]), ValueError, "2 sites"),
        (lambda: ops.int8_update_([w.t()], key, g, n, sites=[1]), ValueError, "contiguous"),
        (lambda: ops.int8_update_([w], key, g, n, sites=[1], rounding="up"), ValueError, "'up'"),
        (lambda: ops.int8_update_([w], key, g, n, sites=[1], noise=Noise()), ValueError, "gaussian"),
        (lambda: ops.int8_head_update_(w, exponents(1), n, n, key=key, site=1), ValueError, r"\(1,\)"),
        (lambda: head_step(), ValueError, "1 params, 0 gradients"),
        (lambda: head_step(g, g), ValueError, r"\(1,\) of 1 groups for w \(3, 4\)"),
        (lambda: head_step(w[0], g), ValueError, r"\(4,\) of 1 groups for w \(3, 4\)"),
        (lambda: head_step(w[None], g), ValueError, r"\(1, 3, 4\) of 1 groups for w \(3, 4\)"),
        (lambda: head_step(w[None].float(), g), TypeError, "float32"),
        (lambda: head_step(w[None].int(), g, exponents(1, 2)), ValueError, "of 1 groups"),
        (lambda: head_step(w[None].int(), g, remainders=[w[:2]]), ValueError, "do not go together"),
        (lambda: head_step(w[None].int(), g, remainders=[w.int()]), TypeError, "int32"),
        (lambda: head_step(w[None].int(), g, remainders=[w, w]), ValueError, "2 remainders"),
        (lambda: head_step(w[None].int(), g, rounding="up"), ValueError, "'up'"),
    ):
        with pytest.raises(error, match=match):
            call()
    assert torch.equal(w, before)

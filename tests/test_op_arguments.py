"""Operators given what lies elsewhere, is out of range or in another context: refused by name, or the same bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.ops import Int8Tensor, IntegerPerturbation, Noise, Perturbation
from ezo_kernels.ops.dropout import dropout_mask
from ezo_kernels.ops.noise import fold_key, key_tensor
from tests.materialised import randn
from tests.tolerance import assert_bitwise_equal

KEY, EPS = key_tensor(3, 4), torch.tensor([1e-2])
ZERO = torch.zeros(1, dtype=torch.int32)


def ints(*shape, device="cpu"):
    return torch.ones(shape, dtype=torch.int8, device=device)


def packed(*shape, device="cpu"):
    return Int8Tensor(ints(*shape, device=device), torch.zeros(1, dtype=torch.int32, device=device))


def layer(**other):
    given = dict(x=packed(4, 5), weight=ints(3, 5), p=IntegerPerturbation(KEY), weight_exponent=ZERO) | other
    return ops.int8_linear(given["x"], given["weight"], None, given["p"], weight_exponent=given["weight_exponent"])


def head(**other):
    one = torch.ones(1, dtype=torch.int32)
    given = dict(w=ints(3, 4), grad=torch.ones(3, 4, dtype=torch.int32), peak=one, bits=one) | other
    ops.int8_head_update_(*(given[n] for n in ("w", "grad", "peak", "bits")), key=given.get("key", KEY), site=1)


FAR, LABELS = KEY.to("meta"), torch.zeros(4, dtype=torch.int64)
ELSEWHERE = {
    "perturb": lambda: ops.perturb(torch.ones(3), Perturbation(FAR, EPS.to("meta")), site=1),
    "perturb, eps": lambda: ops.perturb(torch.ones(3), Perturbation(KEY, EPS.to("meta")), site=1),
    "perturb_outputs": lambda: ops.perturb_outputs(torch.ones(4, 3), Perturbation(FAR, EPS), site=1),
    "output_errors": lambda: ops.output_errors(torch.ones(2, 3), FAR, (6, 4), site=1, noise=Noise()),
    "int8_linear, key": lambda: layer(p=IntegerPerturbation(FAR)),
    "int8_linear, weight": lambda: layer(weight=ints(3, 5, device="meta"), p=None),
    "int8_linear, exponent": lambda: layer(weight_exponent=ZERO.to("meta")),
    "int8_conv2d": lambda: ops.int8_conv2d(
        packed(2, 3, 5, 5), ints(2, 3, 3, 3, device="meta"), None, None, weight_exponent=ZERO
    ),
    "int8_gemm": lambda: ops.int8_gemm(ints(1, 2, 3), ints(1, 2, 3, device="meta")),
    "int8_update_, shift": lambda: ops.int8_update_([ints(2)], KEY, ZERO, ZERO.to("meta"), sites=[1]),
    "int8_cross_entropy": lambda: ops.int8_cross_entropy(packed(4, 3), LABELS.to("meta")),
    "int8_cross_entropy_gradient": lambda: ops.int8_cross_entropy_gradient(packed(4, 3), LABELS, FAR),
    "int8_squared_error": lambda: ops.int8_squared_error(packed(2, 3), packed(2, 3, device="meta")),
    "int8_update_": lambda: ops.int8_update_([ints(3, 4)], FAR, ZERO, ZERO, sites=[1]),
    "int8_head_update_": lambda: head(key=FAR),
    "round_shift": lambda: ops.round_shift(torch.arange(4, dtype=torch.int32), 2, "stochastic", key=FAR),
    "fold_key": lambda: fold_key(torch.tensor([1]), torch.tensor([1]), FAR.clone()),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_argument_on_another_device_is_refused(name):
    """Else a kernel reads an address of another memory, or the result is left as it was allocated."""
    with pytest.raises(ValueError, match="on cpu.* on meta"):
        ELSEWHERE[name]()


@pytest.mark.parametrize(("rounds", "error"), [(8, ValueError), (0, ValueError), (7.0, TypeError), (True, TypeError)])
def test_rounds_are_seven_or_ten(rounds, error):
    whole = torch.arange(4, dtype=torch.int32)
    calls = [
        lambda: dropout_mask(2, 8, 0.5, KEY, site=1, rounds=rounds),
        lambda: ops.round_shift(whole, 2, "stochastic", key=KEY, rounds=rounds),
        lambda: ops.importance_rows(torch.ones(4, 3), LABELS, 2, KEY, rounds=rounds),
        lambda: ops.int8_cross_entropy_gradient(packed(4, 3), LABELS, KEY, rounds=rounds),
        lambda: ops.int8_head_update_(ints(4), whole, whole[3:], ZERO, key=KEY, site=1, rounds=rounds),
    ]
    for call in calls:
        with pytest.raises(error, match="rounds must be"):
            call()


@pytest.mark.parametrize("query", [-1, 1 << 24])
def test_queries_are_in_range(query):
    calls = [
        lambda: ops.round_shift(torch.arange(4, dtype=torch.int32), 2, "stochastic", key=KEY, query=query),
        lambda: ops.int8_cross_entropy_gradient(packed(4, 3), LABELS, KEY, query=query),
        lambda: ops.output_errors(torch.ones(2, 3), KEY, (6, 4), site=1, noise=Noise(), query=query),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="query must be in"):
            call()


@pytest.mark.parametrize("what", ["stride", "padding", "dilation"])
def test_two_numbers_of_one_dimension_are_refused(what):
    with pytest.raises(ValueError, match="int8_conv1d: stride, padding and dilation must be one integer each"):
        ops.int8_conv1d(packed(2, 3, 20), ints(4, 3, 3), None, None, weight_exponent=ZERO, **{what: (1, 2)})


def test_a_batch_whose_rows_share_memory_trains_like_its_copy():
    """The gradient multiplies by the batch as it lies."""
    row, weights = torch.randint(-127, 128, (1, 40), dtype=torch.int8, generator=torch.manual_seed(0)), []
    for batch in (row.expand(16, 40), row.repeat(16, 1)):
        torch.manual_seed(1)
        net = ezo.convert_(nn.Sequential(nn.Linear(40, 10)), head="all", precision="int8")
        ezo.ElasticZOInt8(net, seed=3).train_step(Int8Tensor(batch, ZERO - 6), torch.arange(16) % 10)
        weights.append(net.state_dict()["0.weight"])
    assert torch.equal(*weights)


def test_autocast_around_two_products_changes_no_bit():
    x, w, b = (randn(*s, dtype=torch.bfloat16) for s in ((8, 64), (16, 64), (16,)))
    own = dict(site=1, bias_site=2, strategy="two_products", z_dtype="bfloat16")
    want = ops.perturbed_linear(x, w, b, Perturbation(KEY, EPS), **own)
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise_equal(ops.perturbed_linear(x, w, b, Perturbation(KEY, EPS), **own), want)


@pytest.mark.parametrize("damping", [None, 0.1])
def test_autocast_around_a_decorrelated_gradient_changes_no_bit(damping):
    x, error = randn(20, 6), randn(20, 3)
    want = ops.decorrelated_gradient(x, error, damping, True)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.decorrelated_gradient(x, error, damping, True)
    for a, b in zip(got, want, strict=True):
        assert_bitwise_equal(a, b)


def test_a_pass_of_the_default_noise_is_made_inside_of_a_compiled_function():
    def run(x, w, key, eps):
        return ops.perturbed_linear(x, w, None, Perturbation(key, eps), site=1)

    def integers(values, exponent, w, key):
        y = ops.int8_linear(Int8Tensor(values, exponent), w, None, IntegerPerturbation(key), weight_exponent=ZERO)
        return y.values

    for fn, args in ((run, (randn(4, 5), randn(3, 5), KEY, EPS)), (integers, (ints(4, 5), ZERO, ints(3, 5), KEY))):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(fn, fullgraph=True, backend="eager")(*args), fn(*args))


@pytest.mark.parametrize("outputs", [1, 6])
@pytest.mark.parametrize("relu", [False, True])
def test_a_pointwise_convolution_has_the_bits_of_the_operators_one_after_the_other(outputs, relu):
    x, w, b, p = randn(16, 64, 16, 16), randn(outputs, 64, 1, 1), randn(outputs), Perturbation(KEY, EPS)
    how = dict(site=1, bias_site=2, shared=True)
    want = F.max_pool2d(ops.perturbed_conv2d(x, w, b, p, **how), 2)
    got = ops.perturbed_conv2d(x, w, b, p, pool=2, relu=relu, **how)
    assert_bitwise_equal(got, want.relu() if relu else want)


def test_rows_that_do_not_count_have_no_gradient_that_is_differentiated_either():
    x, target = randn(6, 4).requires_grad_(), torch.full((3,), -100)
    losses = ops.grouped_cross_entropy(x, target, 2)
    for twice in (False, True):
        (grad,) = torch.autograd.grad(losses.sum(), x, create_graph=twice, retain_graph=True)
        assert torch.equal(grad, torch.zeros(6, 4))

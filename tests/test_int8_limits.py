"""Values at and past their limits: losses that wrap or are not finite, exponents, sums, states, and what a layer may load."""

from __future__ import annotations

import copy
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.ops import Int8Tensor
from ezo_kernels.ops.int8_tensor import power_of_two
from ezo_kernels.optim import IntegerSchedule
from tests.int8_models import exponents, randint, same, state, tiny, tiny_batch

# ---- losses


def closure_of(model, losses):
    left = iter(losses)

    def closure():
        model(tiny_batch()[0])
        return torch.as_tensor(next(left))

    return closure


@pytest.mark.parametrize(
    ("dtype", "plus", "minus", "g"),
    [
        (torch.uint8, 3, 5, -1),
        (torch.int8, -128, 127, -1),
        (torch.int32, -(2**31), 2**31 - 1, -1),
        (torch.int64, 2**63 - 1, -(2**63), 1),
        (torch.bool, False, True, -1),
        (torch.float16, 1.0, 1.0009765625, -1),
        (torch.float32, -0.0, 0.0, 0),
        (torch.int64, 7, 7, 0),
    ],
)
def test_g_is_the_sign_of_a_comparison_that_cannot_wrap(dtype, plus, minus, g):
    opt = ezo.ElasticZOInt8(tiny())
    opt.step(closure_of(opt.model, [torch.tensor(v, dtype=dtype) for v in (plus, minus)]))
    assert opt.g.tolist() == [g] and opt.step_count.item() == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8], ids=str)
def test_a_loss_function_may_count(dtype):
    """As a closure may."""
    opt, counts = ezo.ElasticZOInt8(tiny(), loss="float_cross_entropy"), iter((1, 0))
    opt.train_step(*tiny_batch(), lambda logits, y: torch.tensor(next(counts), dtype=dtype))
    assert opt.g.tolist() == [1] and opt.group_losses.tolist() == [1.0, 0.0] and opt.step_count.item() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_float_loss_that_is_not_finite_changes_nothing(bad, mode):
    """Weights of trunk and head, and the step; the next step is as if it had not been. One bad group of four is enough."""
    calls = []

    def loss_fn(logits, y):
        calls.append(len(calls))
        return F.cross_entropy(logits, y) + (bad if len(calls) == 7 else 0.0)

    how = dict(loss="float_cross_entropy", mode=mode, bits=3, head_bits=3, queries=2)
    opts = [ezo.ElasticZOInt8(tiny(("fc2",)), **how) for _ in range(2)]
    for i in range(3):
        before = state(opts[0].model)
        opts[0].train_step(*tiny_batch(i), loss_fn)
        assert same(before, state(opts[0].model)) == (i == 1)
        if i != 1:
            opts[1].train_step(*tiny_batch(i))
    assert opts[0].step_count.item() == 2 and opts[0].skipped.item() == 1 and opts[1].skipped.item() == 0
    assert same(*(state(opt.model) for opt in opts)) and opts[0].g.tolist() == opts[1].g.tolist()


def test_a_closure_whose_loss_is_not_finite_changes_nothing():
    opt = ezo.ElasticZOInt8(tiny(), bits=3)
    before = state(opt.model)
    opt.step(closure_of(opt.model, [float("inf"), 1.0]))
    assert same(before, state(opt.model)) and opt.step_count.item() == 0 and opt.skipped.item() == 1
    assert opt.state_dict()["skipped"].item() == 1


@pytest.mark.parametrize("loss", [lambda y, t: 1.0, lambda y, t: y.sum(1), lambda y, t: y.sum() * 1j])
def test_a_loss_function_that_returns_no_loss_is_refused(loss):
    opt = ezo.ElasticZOInt8(tiny(), loss="float_cross_entropy")
    with pytest.raises(ValueError, match="loss_fn must return a tensor of one element"):
        opt.train_step(*tiny_batch(), loss)
    assert opt.step_count.item() == 0


@pytest.mark.parametrize(
    ("loss", "y", "match"),
    [
        ("cross_entropy", Int8Tensor(randint(3, 4), exponents(0)), "labels"),
        ("float_cross_entropy", Int8Tensor(randint(3, 4), exponents(0)), "labels"),
        ("cross_entropy", [0, 1, 2], "list"),
        ("cross_entropy", None, "NoneType"),
        ("squared_error", torch.zeros(3, 4), "float32"),
        ("squared_error", torch.zeros(3, 4), r"ezo_kernels.quantize\(y\)$"),
        ("squared_error", torch.zeros(3, dtype=torch.int64), "int64"),
        ("squared_error", torch.zeros(3, dtype=torch.int64), r"ezo_kernels.quantize\(y.float\(\)\).*'cross_entropy'"),
    ],
)
def test_targets_of_another_kind_are_refused(loss, y, match):
    opt = ezo.ElasticZOInt8(tiny(), loss=loss)
    with pytest.raises(TypeError, match=match):
        opt.train_step(tiny_batch()[0], y)
    assert opt.step_count.item() == 0


# ---- sums


def test_the_most_rows_of_a_cross_entropy_do_not_wrap_and_one_more_is_refused():
    rows = 1 << 18
    v = torch.tensor([[127, -127]], dtype=torch.int8).expand(2 * rows, 2)
    losses = ops.int8_cross_entropy(Int8Tensor(v, exponents(64, 64)), torch.ones(rows, dtype=torch.int64))
    of_row = 2 * ((127 * 47274) << 20)  # the other class is too far away to count
    assert losses.tolist() == [rows * of_row] * 2 and losses.sum().item() == 2 * rows * of_row
    with pytest.raises(ValueError, match="524290; 524288 is the most"):
        more = Int8Tensor(v[:1].expand(2 * rows + 2, 2), exponents(0, 0))
        ops.int8_cross_entropy(more, torch.ones(rows + 1, dtype=torch.int64))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_the_limit_of_a_step_counts_all_groups_however_they_run(mode):
    model = ezo.convert_(nn.Sequential(nn.Linear(1, 2)), precision="int8")
    opt = ezo.ElasticZOInt8(model, mode=mode)
    rows = 1 << 18
    with pytest.raises(ValueError, match="524290; 524288 is the most"):
        opt.train_step(torch.zeros(rows + 1, 1, dtype=torch.int8), torch.zeros(rows + 1, dtype=torch.int64))
    opt.train_step(torch.zeros(rows, 1, dtype=torch.int8), torch.zeros(rows, dtype=torch.int64))


def test_the_most_squares_do_not_wrap():
    n = 1 << 21
    y = Int8Tensor(torch.full((2 * n, 1), 127, dtype=torch.int8), exponents(60, 60))
    losses = ops.int8_squared_error(y, Int8Tensor(torch.full((n, 1), -127, dtype=torch.int8), exponents(0)))
    assert losses.tolist() == [2**61] * 2


def test_the_widest_convolution_and_one_past_it():
    """Every product 127 * 128, and a bias shifted by all of 22 bits."""
    model = ezo.convert_(nn.Sequential(nn.Conv2d(11_037, 1, 3)), precision="int8")  # 99,333 terms
    x = Int8Tensor(torch.full((1, 11_037, 3, 3), -128, dtype=torch.int8), exponents(0))
    for sign in (1, -1):
        model[0].weight.fill_(-127 * sign)
        model[0].bias.fill_(127 * sign)
        model[0].bias_exponent.fill_(64)
        y = model(x)
        acc = 99_333 * 127 * 128 + 127 * 2**22
        assert y.values.flatten().tolist() == [sign * min(127, (acc + 2**23) >> 24)]
        assert y.exponent.item() == model[0].weight_exponent.item() + 24
    with pytest.raises(NotImplementedError, match=r"0 \(Conv2d\).*99338.*99336"):
        ezo.convert_(nn.Sequential(nn.Conv2d(2 * 49_669, 2, (1, 2), groups=2)), precision="int8")


def test_of_an_empty_batch_the_exponents_are_zero():
    torch.empty(1 << 12).fill_(float("nan"))
    y = ezo.convert_(nn.Sequential(nn.Linear(6, 3)), precision="int8")(Int8Tensor(randint(0, 6), exponents(-7)))
    assert y.shape == (0, 3) and y.exponent.tolist() == [0]


# ---- exponents


@pytest.mark.parametrize("exponent", [65, -65, 1000, 2**31 - 1, -(2**31)])
def test_exponents_out_of_range_are_refused(exponent):
    x, y = tiny_batch()
    model = tiny()
    opt = ezo.ElasticZOInt8(model)
    with pytest.raises(ValueError, match=rf"exponent of x must be in \[-64, 64\], got {exponent}"):
        opt.train_step(Int8Tensor(x.values, exponents(exponent)), y)
    regression = ezo.ElasticZOInt8(tiny(), loss="squared_error")
    with pytest.raises(ValueError, match="exponent of y"):
        regression.train_step(x, Int8Tensor(randint(3, 4), exponents(exponent)))
    saved = state(model)
    saved["fc1.bias_exponent"].fill_(exponent)
    before = state(model)
    with pytest.raises(RuntimeError, match=rf"fc1.bias_exponent is {exponent}"):
        model.load_state_dict(saved)
    assert torch.equal(model.fc1.weight, before["fc1.weight"]) and same(state(model), before)
    model.fc1.weight_exponent.fill_(exponent)
    with pytest.raises(ValueError, match=rf"fc1.weight_exponent is {exponent}"):
        ezo.ElasticZOInt8(model)


def test_a_float_state_is_refused_by_an_int8_model_and_changes_nothing():
    """torch alone would cut the floats off, weight by weight, and complain of the missing exponents afterwards."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    floats = state(plain)
    model = ezo.convert_(plain, precision="int8")
    before = state(model)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="0.weight is torch.float32, and this layer holds int8"):
            model.load_state_dict(floats, strict=strict)
    spoilt = {**state(model), "2.bias": torch.full((3,), -128, dtype=torch.int8)}
    with pytest.raises(RuntimeError, match="2.bias holds -128"):
        model.load_state_dict(spoilt)
    assert same(before, state(model))
    model.load_state_dict(before)


# ---- rows, states, types


def test_rows_of_a_pass_cannot_be_taken():
    """Their memory would go to others while they are read."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.a(x)[:])

    x = Int8Tensor(randint(4, 6), exponents(-7))
    for mode in ("stacked", "sequential"):
        model = ezo.convert_(Half(), precision="int8")
        with pytest.raises(ValueError, match="rows of a pass"):
            ezo.ElasticZOInt8(model, mode=mode).train_step(x, torch.arange(4) % 3)
    assert x[1:3].shape == (2, 6) and x.to("cpu") is x


class Loop(nn.Module):
    """Cannot be traced, so that no conversion warns of what it calls."""

    def __init__(self, call) -> None:
        super().__init__()
        self.inner, self.call = Inner(call), call

    def forward(self, x):
        return self.inner(x) if len(x) else x


class Inner(nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.fc, self.call = nn.Linear(6, 3), call

    def forward(self, x):
        return self.call(self.fc(x))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: x * 2, TypeError, "mul of an Int8Tensor"),
        (lambda x: 1 - x, TypeError, "sub of an Int8Tensor"),
        (lambda x: -x, TypeError, "neg of an Int8Tensor"),
        (lambda x: x.mean(1), AttributeError, "has no 'mean'"),
        (lambda x: x.argmax(1), AttributeError, r"has no 'argmax'.*\.values.*\.dequantize\(\).*\.to\('cpu'\)"),
        (torch.sigmoid, TypeError, r"sigmoid has no integer form.*\.values.*\.dequantize\(\)"),
        (lambda x: x + 1, TypeError, "takes two Int8Tensors, got one and int"),
        (lambda x: 1 + x, TypeError, "takes two Int8Tensors, got one and int"),
        (lambda x: torch.ones(3) + x, TypeError, "takes two Int8Tensors, got one and torch.float32"),
        (lambda x: (F.relu_(x), x + x)[1], ValueError, "used again after an in-place relu"),
        (lambda x: (F.relu(x, inplace=True), x.flatten(1))[1], ValueError, "used again after an in-place relu"),
        (lambda x: (operator.iadd(x, x), F.relu(x))[1], ValueError, r"used again after \+="),
        (lambda x: F.max_pool1d(x[:, None], 2), ValueError, "rows of a pass"),
        (lambda x: F.max_pool1d(x, 2), ValueError, r"max_pool1d.*\[B, C, L\], got \(8, 3\)"),
        (lambda x: F.adaptive_avg_pool2d(x.view(-1, 1, 1, 3), (1, 2)), NotImplementedError, r"\(1, 3\).*\(1, 2\).*divides"),
        (lambda x: F.adaptive_avg_pool2d(x.view(-1, 1, 1, 3), 0), ValueError, "at least 1 by 1"),
    ],
)  # fmt: skip
def test_what_has_no_integer_form_is_named_with_its_layer_and_the_way_out(call, error, match):
    model = ezo.convert_(Loop(call), precision="int8")
    opt, before = ezo.ElasticZOInt8(model), state(model)
    with pytest.raises(error, match=rf"^inner \(Inner\): .*{match}"):
        opt.train_step(Int8Tensor(randint(4, 6), exponents(-7)), torch.arange(4) % 3)
    assert same(before, state(model)) and opt.step_count.item() == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.update(step=torch.zeros(3, dtype=torch.int64)),
        lambda s: s.update(step=torch.zeros(1)),
        lambda s: s.update(step=5),
        lambda s: s.update(skipped=None),
    ],
)
def test_a_damaged_state_is_refused_before_anything_is_copied(spoil):
    opt = ezo.ElasticZOInt8(tiny())
    saved = copy.deepcopy(opt.state_dict())
    saved["seed"] += 5
    spoil(saved)
    with pytest.raises(ValueError, match="int64 tensor of one element"):
        opt.load_state_dict(saved)
    assert opt.state_dict()["seed"].item() == 0


def test_a_state_of_before_skipped_steps_were_counted_is_taken():
    opt = ezo.ElasticZOInt8(tiny())
    saved = opt.state_dict()
    del saved["skipped"]
    saved["step"] += 3
    opt.load_state_dict(saved)
    assert opt.step_count.item() == 3


@pytest.mark.parametrize(
    "arguments",
    [dict(p_zero="0.5"), dict(p_zero=None), dict(p_zero=True), dict(rounds=7.0), dict(rounds="7"), dict(r_max="3"),
     dict(queries=True), dict(fraction_bits=True), dict(seed=True), dict(seed=1.5)],
    ids=str,
)  # fmt: skip
def test_arguments_of_another_type_are_named(arguments):
    (name,) = arguments
    with pytest.raises(TypeError, match=f"^{name} must be"):
        ezo.ElasticZOInt8(tiny(), **arguments)


def test_a_schedule_of_another_optimizer_is_refused():
    with pytest.raises(TypeError, match="ElasticZOInt8, got SGD"):
        IntegerSchedule(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), {1: {"bits": 1}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_powers_of_two_are_exact(dtype):
    info = torch.finfo(dtype)
    least, most = math.frexp(info.smallest_normal)[1] - 1, math.frexp(info.max)[1] - 1
    exponents = torch.arange(least, most + 1, dtype=torch.int32)
    found = power_of_two(exponents, dtype)
    assert found.dtype == dtype and found.tolist() == [2.0**s for s in exponents.tolist()]
    beyond = torch.tensor([least - 1, most + 1, -(1 << 31), (1 << 31) - 1], dtype=torch.int32)
    assert power_of_two(beyond, dtype).tolist() == [0.0, math.inf, 0.0, math.inf]

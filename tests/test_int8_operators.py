"""Every integer operator by torch's own checks: its schema, and that it looks at no data on the host."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from ezo_kernels import ops
from ezo_kernels.ops import Int8Tensor, Noise, _library
from ezo_kernels.ops.noise import key_tensor
from tests.int8_models import exponents, given, randint

PASS = (0, 1, [1, -1], 7, 0.3, 40)  # query, queries, signs, rounds, p_zero, r_max


def arguments(op):
    """Of one operator, its outputs among them; two groups."""
    one, two, key = exponents(-5), exponents(-5, -6), key_tensor(1, 2)

    def empty(*shape, dtype=torch.int8):
        return torch.zeros(shape, dtype=dtype)

    peak, sums = empty(2, dtype=torch.int32), empty(6, 4, dtype=torch.int32)
    x, signs = randint(6, 5), (True, exponents(0), torch.tensor(0), exponents(0))
    return {
        "int8_linear": (x, randint(4, 5), randint(4), two, one, one, key, 1, 2, 0, "nearest", "auto", True, *PASS, sums, peak,
                        empty(6, 4), two.clone()),
        "int8_linear_once": (x, randint(4, 5), randint(4), two, one, one, key, 1, 2, "nearest", "auto", True, *PASS, sums, peak,
                             empty(6, 4), two.clone(), peak.clone()),
        "int8_conv2d": (randint(4, 2, 5, 5), randint(3, 2, 3, 3), None, two, one, None, key, 1, 2, [1, 1], [0, 0], [1, 1],
                        1, [3, 3], 3, "pseudo", "slab", True, 2, *PASS, empty(0, dtype=torch.int32), peak, empty(4, 3, 1, 1),
                        two.clone()),
        "int8_requantize": (torch.full((6, 4), 300, dtype=torch.int32), exponents(300, 300), two, one, "nearest", True,
                            randint(1, 12), empty(6, 4), two.clone()),
        "int8_gemm": (randint(2, 3, 5), randint(1, 4, 5), empty(2, 3, 4, dtype=torch.int32), peak),
        "int8_round": (sums, 3, "stochastic", key, 1, 2, 7, empty(6, 4)),
        "int8_relu": (x, empty(6, 5)),
        "int8_pool2d": (randint(2, 1, 4, 4), "max", [2, 2], [2, 2], [0, 0], empty(2, 1, 2, 2)),
        "int8_add": (x, x.clone(), two, two.clone(), 2, exponents(300, 300), empty(6, 5), two.clone()),
        "int8_cross_entropy": (x, two, torch.tensor([0, 1, 2]), 8, empty(2, dtype=torch.int64), *signs),
        "int8_cross_entropy_gradient": (x, two, torch.tensor([0, 1, 2]), key, 3, 7, empty(6, 5)),
        "int8_squared_error": (x, two, randint(3, 5), one, 8, empty(2, dtype=torch.int64), *signs, empty(6, 5)),
        "int8_update_": ([randint(3, 4), randint(5)], key, exponents(1), one.abs(), empty(0, dtype=torch.int64), [1, 2],
                         [0, 0], 0, "stochastic", 7, 0.3, 40, empty(1, dtype=torch.int64)),
        "int8_signs": (torch.tensor([5, 3]), *signs[:3], empty(1, dtype=torch.int64)),
        "int8_sum_groups": (sums.view(2, 3, 4), two, empty(3, 4, dtype=torch.int32), exponents(0)),
        "int8_head_step_": (
            [randint(3, 4), randint(4)], [randint(3, 4), randint(4)], [sums.view(2, 3, 4), randint(2, 3, 4)],
            [two, two.clone()], [one, None], torch.tensor(True), exponents(1), key, [1, 2], "pseudo", 7, exponents(*[0] * 12),
        ),
        "int8_head_update_": (randint(3, 4), randint(3, 4), torch.full((3, 4), 9, dtype=torch.int32), exponents(9),
                              exponents(1), key, 1, "pseudo", 7),
    }[op]  # fmt: skip


OPERATORS = [
    "int8_linear", "int8_linear_once",
    "int8_conv2d", "int8_requantize", "int8_gemm", "int8_round", "int8_relu", "int8_pool2d", "int8_add",
    "int8_cross_entropy", "int8_cross_entropy_gradient", "int8_squared_error", "int8_update_", "int8_sum_groups",
    "int8_head_step_", "int8_head_update_", "int8_signs",
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
            else [t if t is None else mode.from_tensor(t) for t in a]
            if isinstance(a, list) and isinstance(a[0], torch.Tensor) else a
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

"""The head's linear layer for all groups at once: the launch against a call a group. A step of it is in test_step.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels.ops.grouped_linear import grouped_linear
from tests.tolerance import assert_bitwise_equal, assert_within_torch_error


def problem(shape, n, dtype, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).to(dtype)
    w = torch.randn(n, shape[-1], generator=generator).to(dtype)
    return x, w, torch.randn(n, generator=generator).to(dtype) if bias else None


def run(function, x, w, b):
    """The outputs, and the gradients of their weighted sum."""
    tensors = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
    y = function(*tensors, *([None] * (3 - len(tensors))))
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    return [y.detach(), *(t.grad for t in tensors)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("groups", "shape", "n"), [(1, (5, 7), 3), (2, (64, 84), 10), (6, (18, 4, 33), 17), (3, (99, 64), 40)]
)
def test_outputs_and_gradients(groups, shape, n, dtype, bias):
    tensors = problem(shape, n, dtype, bias)
    ours = run(lambda x, w, b: grouped_linear(x, w, b, groups), *tensors)
    same = run(F.linear, *tensors)
    truth = run(F.linear, *(None if t is None else t.double() for t in tensors))
    for mine, torchs, exact in zip(ours, same, truth, strict=True):
        assert_within_torch_error(mine, torchs, exact)


def test_a_group_has_the_bits_of_its_own():
    x, w, b = problem((4 * 33, 84), 10, torch.float32, True)
    whole = grouped_linear(x, w, b, 4)
    for part, own in zip(x.chunk(4), whole.chunk(4), strict=True):
        assert_bitwise_equal(grouped_linear(part, w, b, 1), own)

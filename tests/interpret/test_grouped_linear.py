"""The head's linear layer for all groups at once: the launch against a call a group. A step of it is in test_step.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels.ops import _grouped_linear_triton as T
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


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("most_rows", [512, 0], ids=["one launch", "apart"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("groups", "shape", "n"), [(1, (5, 7), 3), (2, (64, 84), 10), (6, (18, 4, 33), 17), (3, (99, 64), 90)]
)
def test_outputs_and_gradients(monkeypatch, groups, shape, n, dtype, bias, most_rows, relu):
    monkeypatch.setattr(T, "MOST_ROWS", most_rows)
    tensors = problem(shape, n, dtype, bias)

    def by_torch(x, w, b):
        return F.relu(F.linear(x, w, b)) if relu else F.linear(x, w, b)

    ours = run(lambda x, w, b: grouped_linear(x, w, b, groups, relu), *tensors)
    same = run(by_torch, *tensors)
    truth = run(by_torch, *(None if t is None else t.double() for t in tensors))
    for mine, torchs, exact in zip(ours, same, truth, strict=True):
        assert_within_torch_error(mine, torchs, exact)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_some_of_the_gradients(wanted):
    tensors = [t.requires_grad_(i in wanted) for i, t in enumerate(problem((64, 84), 40, torch.float32, True))]
    share = torch.linspace(-1, 1, 64 * 40).view(64, 40)
    ours = torch.autograd.grad(grouped_linear(*tensors, 2, True), [tensors[i] for i in wanted], share)
    theirs = torch.autograd.grad(F.relu(F.linear(*tensors)), [tensors[i] for i in wanted], share)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_a_relu_of_nan_lets_its_gradient_through():
    x, w, b = problem((4, 8), 3, torch.float32, True)
    x[1] = float("nan")
    _, _, _, ours = run(lambda x, w, b: grouped_linear(x, w, b, 1, True), x, w, b)
    _, _, _, theirs = run(lambda x, w, b: F.relu(F.linear(x, w, b)), x, w, b)
    torch.testing.assert_close(ours, theirs)


def test_a_group_has_the_bits_of_its_own():
    x, w, b = problem((4 * 33, 84), 10, torch.float32, True)
    whole = grouped_linear(x, w, b, 4)
    for part, own in zip(x.chunk(4), whole.chunk(4), strict=True):
        assert_bitwise_equal(grouped_linear(part, w, b, 1), own)

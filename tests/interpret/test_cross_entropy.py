"""Cross-entropy of every group and its gradient: the kernels against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels.ops import _cross_entropy_triton as T
from ezo_kernels.ops import grouped_cross_entropy
from ezo_kernels.ops.cross_entropy import cross_entropy_and_gradient
from tests.tolerance import FLOORS, assert_bitwise_equal, assert_within_torch_error, error

IGNORED = -100


def problem(groups, rows, classes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(groups * rows, classes, generator=generator)).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    target[::5] = IGNORED
    target[-1] = classes - 1
    return logits, target, torch.linspace(-1, 2, groups)


def results(logits, target, share):
    """Losses and the gradient of their sum weighted by ``share``, by the library."""
    logits = logits.clone().requires_grad_()
    losses = grouped_cross_entropy(logits, target, len(share))
    losses.backward(share)
    return losses.detach(), logits.grad


def by_torch(logits, target, share):
    logits = logits.clone().requires_grad_()
    losses = torch.stack([F.cross_entropy(part, target) for part in logits.chunk(len(share))])
    losses.backward(share.to(losses.dtype))
    return losses.detach(), logits.grad


def assert_right(logits, target, share):
    losses, grad = results(logits, target, share)
    truth, slope = by_torch(logits.double(), target, share)
    near, _ = by_torch(logits.float(), target, share)
    assert_within_torch_error(losses, near, truth)
    # an exp of a GPU's special function unit is good to 2^-22, and a row of many blocks takes several
    for a, b in zip(cross_entropy_and_gradient(logits, target, share), (losses, grad), strict=True):
        assert_bitwise_equal(a, b)
    floor = max(FLOORS[grad.dtype], 2.0**-21)
    assert error(grad, slope) <= 2 * error(by_torch(logits, target, share)[1], slope) + floor


@pytest.mark.parametrize(
    ("groups", "rows", "classes", "dtype"),
    [
        (1, 1, 1, torch.float16),
        (2, 32, 10, torch.float32),
        (4, 7, 3, torch.float32),
        (3, 33, 130, torch.float16),
        (2, 3, 5000, torch.float32),
        (2, 5, 4096, torch.float16),
        (2, 4099, 2, torch.float32),
    ],
    ids=str,
)
def test_losses_and_gradient(groups, rows, classes, dtype):
    assert_right(*problem(groups, rows, classes, dtype))


@pytest.mark.parametrize(("groups", "rows", "classes"), [(2, 16, 10), (2, 4099, 2), (1, 3, 4097)])
def test_rows_that_have_weights(groups, rows, classes):
    """Of a program a group, of many, and of rows of several blocks, against torch's loss of each row."""
    logits, target, share = problem(groups, rows, classes)
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(1)) * 3
    weight[0] = 0
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    losses = grouped_cross_entropy(ours, target, groups, weight=weight)
    losses.backward(share)
    each = F.cross_entropy(theirs, target.repeat(groups), reduction="none").view(groups, rows)
    truth = (each * weight).sum(1) / (target != IGNORED).sum()
    truth.backward(share.double())
    torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)
    for a, b in zip(cross_entropy_and_gradient(logits, target, share, weight=weight), (losses, ours.grad), strict=True):
        assert_bitwise_equal(a, b)


def test_groups_of_several_programs(monkeypatch):
    """What one program does for few logits, many do for a large group, whose parts another adds up."""
    monkeypatch.setattr(T, "WHOLE", 64)
    monkeypatch.setattr(T, "_BLOCK", 64)
    monkeypatch.setattr(T, "_PARTS", 4)
    for rows, classes in ((50, 10), (9, 200), (2, 65)):
        assert T.cross_entropy_tile(rows, classes)[2] < rows
        assert_right(*problem(3, rows, classes))


@pytest.mark.parametrize("rows", [32, 3000])
def test_a_group_has_the_bits_of_its_own(rows):
    logits, target, share = problem(4, rows, 50)
    losses, grad = results(logits, target, share)
    for g, part in enumerate(logits.chunk(4)):
        own, slope = results(part, target, share[g : g + 1])
        assert_bitwise_equal(own, losses[g : g + 1])
        assert_bitwise_equal(slope, grad.chunk(4)[g])


def test_values_that_are_not_finite():
    """-inf is a class without a chance; NaN, +inf and rows of -inf give NaN, as with torch, and so does no row that counts."""
    logits, target, share = problem(4, 6, 5)
    logits[0, 1] = float("-inf")
    target[0] = 0
    for group, value in ((1, "nan"), (2, "inf")):
        logits[6 * group + 1, 2] = float(value)
    logits[3 * 6 + 1] = float("-inf")
    losses, grad = results(logits, target, share)
    truth, slope = by_torch(logits, target, share)
    assert losses.isfinite().tolist() == [True, False, False, False] and grad[0, 1] == 0
    torch.testing.assert_close(losses, truth, equal_nan=True)
    torch.testing.assert_close(grad[:6], slope[:6])
    assert results(logits, torch.full_like(target, IGNORED), share)[0].isnan().all()


@pytest.mark.parametrize("wrong", [5, -1, 1 << 40])
def test_a_target_that_is_no_class_reads_nothing(wrong):
    logits, target, share = problem(2, 6, 5)
    target[2] = wrong
    losses, _ = results(logits, target, share)
    assert losses.isnan().all()


def test_rows_that_do_not_count_have_no_gradient():
    logits, target, share = problem(2, 10, 5)
    logits[0] = float("nan")
    logits[10 + 5] = float("inf")
    losses, grad = results(logits, target, share)
    assert losses.isfinite().all() and not grad[target.repeat(2) == IGNORED].any()


def test_no_rows(on_cpu):
    logits, target, share = torch.empty(0, 5), torch.empty(0, dtype=torch.int64), torch.ones(2)
    losses, grad = results(logits, target, share)
    assert losses.isnan().all() and grad.shape == (0, 5)
    assert_bitwise_equal(on_cpu(results, logits, target, share)[0].isnan(), losses.isnan())

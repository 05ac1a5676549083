"""Cross-entropy by chunks and of all groups at once, and what train_step uses them for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ezo_kernels import chunked_cross_entropy
from ezo_kernels.ops import _library, cross_entropy, grouped_cross_entropy
from ezo_kernels.optim import losses
from tests.tolerance import assert_bitwise_equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 40, 1 << 24])
def test_is_cross_entropy(dtype, chunk):
    torch.manual_seed(0)
    logits, target = torch.randn(17, 13).to(dtype), torch.randint(0, 13, (17,))
    target[3] = -100
    want = F.cross_entropy(logits.double(), target)
    assert chunked_cross_entropy(logits, target, chunk_elements=chunk).item() == pytest.approx(want.item(), rel=1e-6)


def test_differentiates():
    logits, target = torch.randn(7, 5, requires_grad=True), torch.randint(0, 5, (7,))
    (ours,) = torch.autograd.grad(chunked_cross_entropy(logits, target, chunk_elements=10), logits)
    (want,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    torch.testing.assert_close(ours, want)


def test_refuses_shapes():
    with pytest.raises(ValueError, match="rows, classes"):
        chunked_cross_entropy(torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.long))
    assert chunked_cross_entropy(torch.empty(0, 5), torch.empty(0, dtype=torch.long)).isnan()
    with pytest.raises(ValueError, match="rows, classes"):
        chunked_cross_entropy(torch.randn(3, 4), torch.zeros(2, dtype=torch.long))


def test_large_vocabularies_go_by_chunks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 20)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 20)
    seen = []

    def spy(*args, **kwargs):
        seen.append(1)
        return chunked_cross_entropy(*args, **kwargs)

    monkeypatch.setattr(cross_entropy, "chunked_cross_entropy", spy)
    logits, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    assert losses.loss_for(F.cross_entropy, logits, target).item() == pytest.approx(
        F.cross_entropy(logits, target).item()
    )
    assert seen == [1]
    losses.loss_for(lambda o, t: F.cross_entropy(o, t), logits.detach(), target)  # the user's own function stays
    assert seen == [1]
    ours, theirs = (logits.clone().requires_grad_() for _ in "ab")
    losses.grouped_losses(F.cross_entropy, torch.cat([ours] * 2), target, 2).sum().backward()
    (2 * F.cross_entropy(theirs, target)).backward()
    assert seen == [1] * 3
    torch.testing.assert_close(ours.grad, theirs.grad)


def problem(groups, rows, classes, dtype=torch.float32):
    torch.manual_seed(groups)
    target = torch.randint(classes, (rows,))
    target[::4] = -100
    return torch.randn(groups * rows, classes).to(dtype), target, torch.linspace(-1, 2, groups)


@pytest.mark.parametrize(("groups", "rows", "classes"), [(1, 1, 2), (2, 33, 10), (7, 5, 3)])
def test_all_groups_at_once_have_the_bits_of_a_call_each(groups, rows, classes):
    logits, target, share = problem(groups, rows, classes)
    ours, theirs = (logits.clone().requires_grad_() for _ in "ab")
    together = grouped_cross_entropy(ours, target, groups)
    apart = torch.stack([F.cross_entropy(part, target) for part in theirs.chunk(groups)])
    together.backward(share)
    apart.backward(share)
    assert_bitwise_equal(together.detach(), apart.detach())
    assert_bitwise_equal(ours.grad, theirs.grad)


def test_differentiates_twice():
    logits, target, share = problem(3, 5, 4)

    def penalty(losses, x):
        (slope,) = torch.autograd.grad(losses, x, share, create_graph=True)
        return torch.autograd.grad((slope**2).sum(), x)[0]

    ours, theirs = (logits.clone().requires_grad_() for _ in "ab")
    apart = torch.stack([F.cross_entropy(part, target) for part in theirs.chunk(3)])
    torch.testing.assert_close(penalty(grouped_cross_entropy(ours, target, 3), ours), penalty(apart, theirs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_loss_of_16_bits_is_not_rounded_to_them(dtype):
    """An eps of 1e-3 moves a loss of 2.3 by less than the 0.008 between two numbers of bf16."""
    logits, target, _ = problem(2, 32, 10, dtype)
    found = losses.grouped_losses(F.cross_entropy, logits, target, 2)
    for loss, part in zip(found, logits.chunk(2), strict=True):
        assert loss.item() == pytest.approx(F.cross_entropy(part.double(), target).item(), rel=1e-6)
    assert found.dtype == torch.float32
    assert_bitwise_equal(losses.loss_for(F.cross_entropy, logits[:32], target)[0], found[0])
    logits.requires_grad_()
    losses.grouped_losses(F.cross_entropy, logits, target, 2).sum().backward()
    assert logits.grad.dtype == dtype and bool(logits.grad.any())


class Doubled(nn.CrossEntropyLoss):
    def forward(self, output, target):
        return 2 * super().forward(output, target)


def hooked():
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, args, out: 2 * out)
    return loss


def test_only_plain_cross_entropy_is_taken(monkeypatch):
    """Whatever else a loss does, a step does too, for each group."""
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    logits, target, _ = problem(2, 8, 5)
    target = target.clamp(min=0)
    for loss_fn, ignored in (
        (F.cross_entropy, -100),
        (nn.CrossEntropyLoss(), -100),
        (nn.CrossEntropyLoss(ignore_index=2), 2),
    ):
        found = losses.grouped_losses(loss_fn, logits, target, 2)
        assert_bitwise_equal(found, grouped_cross_entropy(logits, target, 2, ignore_index=ignored))
    others = [
        lambda output, target: F.cross_entropy(output, target), nn.CrossEntropyLoss(label_smoothing=0.1), Doubled(), hooked(),
        nn.CrossEntropyLoss(weight=torch.ones(5)), nn.CrossEntropyLoss(reduction="sum"), F.nll_loss, nn.NLLLoss(),
    ]  # fmt: skip
    assert all(losses.grouped_losses(loss_fn, logits, target, 2) is None for loss_fn in others)
    chances = F.one_hot(target.clamp(min=0), 5).float()
    shaped = [
        (logits.view(16, 5, 1), target[:, None]), (logits.double(), target), (logits, chances), (logits, target.int()),
        (logits, target[:7]), ((logits,), target), (logits, target.to("meta")), (logits[:0], target[:0]),
    ]  # fmt: skip
    assert all(losses.grouped_losses(F.cross_entropy, *both, 2) is None for both in shaped)


def test_rows_that_have_weights(monkeypatch):
    """At once, by chunks, differentiated twice, and as a loss function of one group."""
    logits, target, share = problem(2, 8, 5)
    weight = torch.linspace(0, 2, 8)

    def by_torch(logits):
        each = F.cross_entropy(logits, target.repeat(2), reduction="none").view(2, 8)
        return (each * weight).sum(1) / (target != -100).sum()

    loss_fn = losses.WeightedCrossEntropy(-100, weight)
    for chunk in (1 << 20, 4):
        monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
        ours, theirs = (logits.clone().requires_grad_() for _ in "ab")
        found = losses.grouped_losses(loss_fn, ours, target, 2)
        torch.testing.assert_close(found, by_torch(theirs))
        torch.testing.assert_close(loss_fn(ours[:8], target)[0], found[0])
        assert_bitwise_equal(losses.losses_and_gradient(loss_fn, logits, target, share)[0], found)
        slopes = [
            torch.autograd.grad(f, of, share, create_graph=True)[0]
            for f, of in ((found, ours), (by_torch(theirs), theirs))
        ]
        torch.testing.assert_close(*slopes)
        torch.testing.assert_close(losses.losses_and_gradient(loss_fn, logits, target, share)[1], slopes[1].detach())
        torch.testing.assert_close(
            *(torch.autograd.grad(s.square().sum(), of)[0] for s, of in zip(slopes, (ours, theirs), strict=True))
        )
    for wrong, error, text in ((weight.double(), TypeError, "float64"), (weight[:5], ValueError, r"\(5,\)")):
        with pytest.raises(error, match=text):
            grouped_cross_entropy(logits, target, 2, weight=wrong)


def test_refusals():
    logits, target, _ = problem(2, 8, 5)
    for wrong, error, text in (
        ((logits.double(), target, 2), TypeError, "float64"),
        ((logits, target.int(), 2), TypeError, "int32"),
        ((logits, target, 2.0), TypeError, "float"),
        ((logits, target, 0), ValueError, "at least 1, got 0"),
        ((logits[0], target, 2), ValueError, r"\(5,\)"),
        ((logits, target, 3), ValueError, "16 rows, no multiple of 3 groups"),
        ((logits, target[:5], 2), ValueError, "2 groups of 8 rows need as many targets as one of them, got 5"),
        ((logits, target.to("meta"), 2), ValueError, "meta"),
    ):
        with pytest.raises(error, match=text):
            grouped_cross_entropy(*wrong)
    with pytest.raises(IndexError, match="out of bounds"):
        grouped_cross_entropy(logits, target.clamp(min=0) + 5, 2)

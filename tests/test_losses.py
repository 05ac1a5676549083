"""Chunked cross-entropy, and what train_step uses it for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels import chunked_cross_entropy
from ezo_kernels.optim import losses


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
    with pytest.raises(ValueError, match="rows, classes"):
        chunked_cross_entropy(torch.randn(3, 4), torch.zeros(2, dtype=torch.long))


def test_large_vocabularies_go_by_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 20)
    seen = []
    monkeypatch.setattr(losses, "chunked_cross_entropy", lambda o, t: seen.append(1) or chunked_cross_entropy(o, t))
    logits, target = torch.randn(6, 5), torch.randint(0, 5, (6,))
    assert losses.loss_for(F.cross_entropy, logits, target).item() == pytest.approx(
        F.cross_entropy(logits, target).item()
    )
    assert seen == [1]
    losses.loss_for(F.cross_entropy, logits.requires_grad_(), target)  # autograd's own, for the head
    losses.loss_for(lambda o, t: F.cross_entropy(o, t), logits.detach(), target)  # the user's own function stays
    assert seen == [1]

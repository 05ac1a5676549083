"""Cross-entropy whose fp32 softmax never exists for all rows at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Logits of one group beyond which :func:`cross_entropy_for` switches to chunks, and the size of a chunk.
CHUNK_ELEMENTS = 1 << 24


def chunked_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int = -100, chunk_elements: int = CHUNK_ELEMENTS
) -> torch.Tensor:
    """Mean cross-entropy, in fp32, over chunks of rows of at most ``chunk_elements`` logits.

    Args:
        logits: [rows, classes], any float dtype.
        target: int64 [rows]; rows with ``ignore_index`` do not count.

    Returns:
        A scalar in fp32. Not bitwise that of ``F.cross_entropy``: the rows' sum is taken chunk by chunk.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be [rows, classes] and target [rows], got {tuple(logits.shape)}, {tuple(target.shape)}"
        )
    step = max(1, chunk_elements // max(1, logits.shape[1]))
    total = logits.new_zeros((), dtype=torch.float32)
    for part, want in zip(logits.split(step), target.split(step), strict=True):
        total = total + F.cross_entropy(part.float(), want, ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum()


def loss_for(loss_fn, output, target):
    """``loss_fn(output, target)``; plain cross-entropy of a large vocabulary without autograd goes by chunks."""
    large = isinstance(output, torch.Tensor) and output.dim() == 2 and output.numel() > CHUNK_ELEMENTS
    if loss_fn is F.cross_entropy and large and not output.requires_grad and target.dim() == 1:
        return chunked_cross_entropy(output, target)
    return loss_fn(output, target)

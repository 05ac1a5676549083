"""The losses of a step's groups: of plain cross-entropy all at once, of any other function one by one."""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor

from ..ops import _library
from ..ops._perturbation import FLOATS
from ..ops.cross_entropy import CHUNK_ELEMENTS, MOST_ROWS, cross_entropy_and_gradient, grouped_cross_entropy
from .batches import parts_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, eq=False)
class WeightedCrossEntropy:
    """Plain cross-entropy of rows that were drawn: each has a weight, fp32 [B] (:mod:`ezo_kernels.ops.importance`)."""

    ignore_index: int
    weight: torch.Tensor

    def __call__(self, output, target) -> torch.Tensor:
        return grouped_cross_entropy(output, target, 1, ignore_index=self.ignore_index, weight=self.weight)


def ignored_by(loss_fn) -> int | None:
    """The ``ignore_index`` of a loss that is plain mean cross-entropy, or None for any other."""
    if type(loss_fn) is WeightedCrossEntropy:
        return loss_fn.ignore_index
    if loss_fn is F.cross_entropy:
        return -100
    if type(loss_fn) is not nn.CrossEntropyLoss or any(getattr(loss_fn, hooks) for hooks in _HOOKS):
        return None
    plain = loss_fn.weight is None and loss_fn.reduction == "mean" and not loss_fn.label_smoothing
    return loss_fn.ignore_index if plain else None


def _at_once(loss_fn, output, target, groups: int) -> int | None:
    """The ``ignore_index`` of a loss that is taken for all groups at once; None for one that must be called for each.

    At once goes plain cross-entropy of class indices (``F.cross_entropy``, or ``nn.CrossEntropyLoss`` with its defaults but
    ``ignore_index``), in fp32 whatever the logits are.
    """
    ignored = ignored_by(loss_fn)
    if ignored is None or not all(type(t) is torch.Tensor or isinstance(t, FakeTensor) for t in (output, target)):
        return None
    fits = (
        output.dim() == 2
        and target.dim() == 1
        and output.numel() > 0
        and output.shape[0] == groups * target.shape[0]
        and target.shape[0] < MOST_ROWS
        and output.dtype in FLOATS
        and target.dtype == torch.int64
        and output.device == target.device
    )
    if not fits or output.device.type not in ("cpu", "cuda"):
        return None
    # torch's own rounds the loss of 16 bits to them, and makes an fp32 softmax of all rows at once
    needed = (
        type(loss_fn) is WeightedCrossEntropy
        or output.dtype != torch.float32
        or output.numel() > groups * CHUNK_ELEMENTS
    )
    return ignored if needed or _library.bound_by_launches(output.device) else None


def _weight(loss_fn) -> torch.Tensor | None:
    return loss_fn.weight if type(loss_fn) is WeightedCrossEntropy else None


def grouped_losses(loss_fn, output, target, groups: int) -> torch.Tensor | None:
    """``loss_fn`` of each group's rows of a stacked output, fp32 [groups], by autograd; None where it is called for each."""
    ignored = _at_once(loss_fn, output, target, groups)
    if ignored is None:
        return None
    return grouped_cross_entropy(output, target, groups, ignore_index=ignored, weight=_weight(loss_fn))


def losses_and_gradient(loss_fn, output, target, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The losses [groups], and the gradient of their sum weighted by ``shares`` by the output; None as above."""
    ignored = _at_once(loss_fn, output, target, shares.shape[0])
    if ignored is None:
        return None
    return cross_entropy_and_gradient(output, target, shares, ignore_index=ignored, weight=_weight(loss_fn))


def loss_for(loss_fn, output, target):
    """``loss_fn(output, target)`` of one group."""
    loss = grouped_losses(loss_fn, output, target, 1)
    return loss_fn(output, target) if loss is None else loss


def by_row(loss_fn):
    """``loss_fn`` before it takes the mean, as torch's losses have it; NotImplementedError for one that has no such form."""
    if isinstance(loss_fn, nn.Module):
        if getattr(loss_fn, "reduction", None) == "mean":
            own = copy.copy(loss_fn)
            own.reduction = "none"
            return own
    else:
        try:
            if "reduction" in inspect.signature(loss_fn).parameters:
                return functools.partial(loss_fn, reduction="none")
        except (TypeError, ValueError):  # a function of C
            pass
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    raise NotImplementedError(
        f"node_perturbation needs the loss of each row: {name} takes no reduction='none', as F.cross_entropy and nn.MSELoss "
        "do; give it such an argument"
    )


@torch.no_grad()
def counted_rows(loss_fn, output, target) -> torch.Tensor | None:
    """Rows that have a part in the mean, fp64 [] on the device and at least 1; None where all have."""
    ignored = ignored_by(loss_fn)
    if ignored is None or not isinstance(output, torch.Tensor) or output.dim() < 2 or target.dtype != torch.int64:
        return None
    return (target != ignored).view(len(target), -1).any(1).sum().clamp(min=1).double()


@torch.no_grad()
def row_shares(loss_fn, output, target, groups: int) -> torch.Tensor:
    """What each row adds to its group's loss, fp32 [groups, B]: the loss is their sum, where it is a mean over rows.

    Raises:
        NotImplementedError: a loss that does not say what it is before its mean.
        ValueError: not one value a row, or several whose first dimension is the rows.
    """
    ignored = ignored_by(loss_fn)
    if ignored is not None and isinstance(output, torch.Tensor) and output.dim() > 1 and target.dtype == torch.int64:
        rows = F.cross_entropy(output.float(), torch.cat([target] * groups), ignore_index=ignored, reduction="none")
        rows, weight = rows.view(groups, len(target), -1).sum(2), _weight(loss_fn)
        return (rows if weight is None else rows * weight) / (target != ignored).sum()
    loss, shares = by_row(loss_fn), []
    for own in parts_of(output, groups):
        rows = loss(own, target)
        if not isinstance(rows, torch.Tensor) or not rows.dim():
            raise ValueError(
                "node_perturbation: with reduction='none' the loss must give a tensor with a row's in each row"
            )
        if isinstance(own, torch.Tensor) and rows.dim() > own.dim():
            raise ValueError(
                f"node_perturbation: the loss of outputs {tuple(own.shape)} has values {tuple(rows.shape)}: the target was "
                "broadcast"
            )
        rows = rows.float().flatten(1).mean(1) if rows.dim() > 1 else rows.float()
        shares.append(rows / len(rows))
    return torch.stack(shares)

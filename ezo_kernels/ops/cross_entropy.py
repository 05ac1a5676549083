"""Mean cross-entropy of every group of a pass, and its gradient: one launch for both or for each, whatever the groups.

    losses_g = sum over rows r of group g that count of w_r (log sum_c exp(x_rc) - x_r,target(r)) / n
    d x_rc   = grad_g w_r (exp(x_rc) / sum_c exp(x_rc) - [c = target(r)]) / n        0 in rows that do not count

| tensor | shape |
|---|---|
| logits x | fp32, fp16 or bf16 [groups * B, classes], group-major |
| target | int64 [B], the same for all groups; rows with ``ignore_index`` do not count |
| weight w | fp32 [B], the same for all groups, of rows drawn by :mod:`.importance`; 1 without |
| losses, grad | fp32 [groups] |
| count n | fp32 [1]: rows that count; with none the losses are NaN, as torch's are |

In fp32 whatever the logits are, with the bits of a group by itself. ``torch.nn.functional.cross_entropy`` rounds the loss of
16-bit logits to 16 bits, by more than a perturbation moves it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._library import launcher, register
from ._perturbation import FLOATS, NotStackedError

#: Logits of a chunk on the CPU, where fp32 copies of all rows at once would be memory that a pass has no other need of.
CHUNK_ELEMENTS = 1 << 24
#: Rows of a group: they are counted in fp32.
MOST_ROWS = 1 << 24


def chunked_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    chunk_elements: int = CHUNK_ELEMENTS,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy, in fp32, over chunks of rows of at most ``chunk_elements`` logits.

    Args:
        logits: [rows, classes], any float dtype.
        target: int64 [rows]; rows with ``ignore_index`` do not count.
        weight: fp32 [rows], of each row's loss, or None; the mean is over rows all the same.

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
    weights = [None] * max(1, -(-target.numel() // step)) if weight is None else weight.split(step)
    for part, want, own in zip(logits.split(step), target.split(step), weights, strict=True):
        total = total + _sum(torch.log_softmax(part.float(), 1), want, ignore_index, own)
    return total / (target != ignore_index).sum()


def _sum(log_p: torch.Tensor, target: torch.Tensor, ignore_index: int, weight: torch.Tensor | None) -> torch.Tensor:
    if weight is None:
        return F.nll_loss(log_p, target, ignore_index=ignore_index, reduction="sum")
    return (F.nll_loss(log_p, target, ignore_index=ignore_index, reduction="none") * weight).sum()


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, 1, dtype=torch.float32)


def _cross_entropy_cpu(logits, target, weight, ignore_index, grad, losses, count, out) -> None:
    groups = losses.numel()
    if logits.numel() > groups * CHUNK_ELEMENTS:
        parts = [chunked_cross_entropy(part, target, ignore_index, weight=weight) for part in logits.chunk(groups)]
        counted = (target != ignore_index).sum()
    elif weight is not None:
        counted = (target != ignore_index).sum()
        parts = [_sum(part, target, ignore_index, weight) / counted for part in _log_softmax(logits).chunk(groups)]
    else:
        pairs = [
            torch.ops.aten.nll_loss_forward(part, target, None, 1, ignore_index)  # 1: the mean
            for part in _log_softmax(logits).chunk(groups)
        ]
        parts, counted = [loss for loss, _ in pairs], pairs[0][1]
    torch.stack(parts, out=losses)
    count.copy_(counted)
    if grad is not None:
        _backward_cpu(logits, target, weight, ignore_index, grad, count, out)


def _backward_cpu(logits, target, weight, ignore_index, grad, count, out) -> None:
    log_p, groups = _log_softmax(logits), grad.numel()
    n = count[0]
    errors = [
        torch.ops.aten.nll_loss_backward(own, part, target, None, 1, ignore_index, n)
        for own, part in zip(grad.unbind(), log_p.chunk(groups), strict=True)
    ]
    if weight is not None:
        errors = [error * weight[:, None] for error in errors]
    error = errors[0] if groups == 1 else torch.cat(errors)
    out.copy_(torch.ops.aten._log_softmax_backward_data(error, log_p, 1, torch.float32))


_cross_entropy = register(
    "cross_entropy",
    "(Tensor logits, Tensor target, Tensor? weight, int ignore_index, Tensor? grad, Tensor(a!) losses, Tensor(b!) count, "
    "Tensor(c!)? out) -> ()",
    cpu=_cross_entropy_cpu,
    cuda=launcher("_cross_entropy_triton", "launch_cross_entropy"),
)
_cross_entropy_backward = register(
    "cross_entropy_backward",
    "(Tensor logits, Tensor target, Tensor? weight, int ignore_index, Tensor grad, Tensor count, Tensor(a!) out) -> ()",
    cpu=_backward_cpu,
    cuda=launcher("_cross_entropy_triton", "launch_cross_entropy_backward"),
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, weight, groups, ignore_index):
        losses, count = (logits.new_empty(n, dtype=torch.float32) for n in (groups, 1))
        _cross_entropy(logits, target, weight, ignore_index, None, losses, count, None)
        ctx.save_for_backward(logits, target, weight, count)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    def backward(ctx, grad):
        logits, target, weight, count = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: this backward is differentiated, too
            groups = grad.shape[0]
            rows = target.repeat(groups)
            counts = rows != ctx.ignore_index
            own = F.one_hot(torch.where(counts, rows, 0), logits.shape[1])
            share = (grad / count.clamp(min=1)).repeat_interleave(target.shape[0]) * counts
            share = share if weight is None else share * weight.repeat(groups)
            error = (torch.softmax(logits.float(), 1) - own) * share[:, None]
            return error.to(logits.dtype), None, None, None, None
        out = torch.empty_like(logits)
        _cross_entropy_backward(logits, target, weight, ctx.ignore_index, grad.contiguous(), count, out)
        return out, None, None, None, None


def _check(logits: torch.Tensor, target: torch.Tensor, groups: int, weight: torch.Tensor | None) -> None:
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be class indices, int64, got {target.dtype}")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {type(groups).__name__}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if logits.dim() != 2 or target.dim() != 1 or not logits.shape[1]:
        raise ValueError(
            f"logits must be [groups * B, classes] and target [B], got {tuple(logits.shape)}, {tuple(target.shape)}"
        )
    if logits.shape[0] % groups:
        raise NotStackedError(f"logits have {logits.shape[0]} rows, no multiple of {groups} groups")
    if logits.shape[0] // groups != target.shape[0]:
        raise ValueError(
            f"{groups} groups of {logits.shape[0] // groups} rows need as many targets as one of them, got {target.shape[0]}"
        )
    if logits.device != target.device:
        raise ValueError(f"logits are on {logits.device} but target is on {target.device}")
    if target.shape[0] >= MOST_ROWS:
        raise ValueError(f"a group has {target.shape[0]} rows; at most {MOST_ROWS - 1} are counted in fp32")
    if weight is None:
        return
    if weight.dtype != torch.float32:
        raise TypeError(f"weight must be float32, got {weight.dtype}")
    if weight.shape != target.shape or weight.device != logits.device:
        raise ValueError(
            f"weight must be {tuple(target.shape)} on {logits.device}, as target is; got {tuple(weight.shape)} on "
            f"{weight.device}"
        )


def grouped_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    groups: int = 1,
    *,
    ignore_index: int = -100,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean cross-entropy of each group, with autograd; formulas and shapes above.

    Args:
        logits: [groups * B, classes], group-major.
        target: class indices int64 [B] on the same device. On CUDA one that is no class and not ``ignore_index`` makes its
            group's loss NaN, for nothing waits to look at it; on a CPU it is refused.
        groups: how many.
        ignore_index: of rows that do not count.
        weight: of each row's loss, fp32 [B] without gradient; None: 1.

    Returns:
        fp32 [groups].

    Raises:
        TypeError: logits, targets or weights of another dtype.
        ValueError: shapes or devices that do not fit; on a CPU a target that is no class.
        NotStackedError: rows that are no multiple of the groups (a ValueError, too).
    """
    _check(logits, target, groups, weight)
    weight = None if weight is None else weight.detach().contiguous()
    return _CrossEntropy.apply(logits.contiguous(), target.contiguous(), weight, groups, ignore_index)


@torch.no_grad()
def cross_entropy_and_gradient(
    logits: torch.Tensor,
    target: torch.Tensor,
    grad: torch.Tensor,
    *,
    ignore_index: int = -100,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of :func:`grouped_cross_entropy`, and what its backward would make of ``grad``: the same bits, a launch less.

    Args:
        logits, target, ignore_index, weight: as there; nothing is recorded for autograd.
        grad: fp32 [groups], of the losses.

    Returns:
        fp32 [groups], and the gradient of sum(grad * losses), of the logits' shape and dtype.

    Raises:
        TypeError, ValueError, NotStackedError: as there, and for a ``grad`` of another dtype or shape.
    """
    if grad.dtype != torch.float32:
        raise TypeError(f"grad must be float32, got {grad.dtype}")
    if grad.dim() != 1 or grad.device != logits.device:
        raise ValueError(f"grad must be [groups] on {logits.device}, got {tuple(grad.shape)} on {grad.device}")
    _check(logits, target, grad.shape[0], weight)
    logits, weight = logits.contiguous(), None if weight is None else weight.contiguous()
    losses, count, out = torch.empty_like(grad), grad.new_empty(1), torch.empty_like(logits)
    _cross_entropy(logits, target.contiguous(), weight, ignore_index, grad.contiguous(), losses, count, out)
    return losses, out

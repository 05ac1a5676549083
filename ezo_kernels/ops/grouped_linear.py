"""Linear layer of the head for all groups of a pass, with autograd: one launch, and one in its backward.

    y_g = x_g W^T + b          the bits of a group by itself, whatever the number of groups; perhaps with a relu
    dW = sum over all rows of dy x^T,   db = sum of dy,   dx = dy W          dy is 0 where a relu's y is

| tensor | shape |
|---|---|
| x, y | [groups * B, ..., K] and [groups * B, ..., N], group-major |
| W, b | [N, K], [N] |

The forward is the fused kernel of :mod:`.linear` without noise, whose tiles are chosen from the rows of one group: a library's
product may choose by the number of groups, and then equal groups would not give equal losses. Where products cost more than
launches (:data:`MOST_PRODUCTS`) torch's own is the faster one, a call a group. So is the backward's of many rows, a call for
each of the three.
"""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor

from . import _library
from ._library import register
from ._perturbation import FLOATS, aligned
from .linear import input_precision
from .noise import Noise

#: Multiplications of one group up to which its launch is what a layer costs: at most a microsecond of a GPU.
MOST_PRODUCTS = 1 << 24
#: What the fused kernel is told where it makes none: the noise whose tiles are cheapest.
_NONE = Noise("rademacher")


def _forward_cpu(x, w, b, groups, relu, out) -> None:
    w = w.t()
    for part, to in zip(x.chunk(groups), out.chunk(groups), strict=True):
        if b is None:
            torch.mm(aligned(part), w, out=to)
        else:
            torch.addmm(b, aligned(part), w, out=to)
    if relu:
        out.relu_()


def _forward_cuda(x, w, b, groups, relu, out) -> None:
    from ._linear_triton import launch_linear

    precision = input_precision(x.dtype, "")
    launch_linear(x, w, b, None, None, 0, 0, False, False, precision, 0, groups, [0], _NONE, out, relu=relu)


def _through_relu(grad: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    return grad if y is None else torch.ops.aten.threshold_backward(grad, y, 0)


def _backward_cpu(grad, x, w, y, groups, dx, dw, db) -> None:
    """Group by group from the last one on, as autograd goes through groups that ran one by one: its bits."""
    grad = _through_relu(grad, y)
    errors, rows = grad.chunk(groups), x.chunk(groups)
    if dx is not None:
        for error, to in zip(errors, dx.chunk(groups), strict=True):
            torch.mm(error, w, out=to)
    if dw is not None:
        torch.mm(errors[-1].t(), aligned(rows[-1]), out=dw)
    if db is not None:
        torch.sum(errors[-1], 0, out=db)
    for g in reversed(range(groups - 1)):
        if dw is not None:
            dw.add_(torch.mm(errors[g].t(), aligned(rows[g])))
        if db is not None:
            db.add_(errors[g].sum(0))


def _backward_cuda(grad, x, w, y, groups, dx, dw, db) -> None:
    from ._grouped_linear_triton import launch_grouped_linear_backward, takes

    if takes(grad, x, w):
        launch_grouped_linear_backward(grad, x, w, y, dx, dw, db)
        return
    grad = _through_relu(grad, y)
    if dx is not None:
        torch.mm(grad, w, out=dx)
    if dw is not None:
        torch.mm(grad.t(), x, out=dw)
    if db is not None:
        torch.sum(grad, 0, out=db)


_forward = register(
    "grouped_linear",
    "(Tensor x, Tensor w, Tensor? b, int groups, bool relu, Tensor(a!) out) -> ()",
    cpu=_forward_cpu,
    cuda=_forward_cuda,
)
_backward = register(
    "grouped_linear_backward",
    "(Tensor grad, Tensor x, Tensor w, Tensor? y, int groups, Tensor(a!)? dx, Tensor(b!)? dw, Tensor(c!)? db) -> ()",
    cpu=_backward_cpu,
    cuda=_backward_cuda,
)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, relu):
        ctx.groups = groups
        out = x.new_empty((x.shape[0], weight.shape[0]))
        _forward(x, weight, bias, groups, relu, out)
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, y = ctx.saved_tensors
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: this backward is differentiated, too
            grad = _through_relu(grad, y)
            dx, dw = grad @ weight if of_x else None, grad.t() @ x if of_weight else None
            return dx, dw, grad.sum(0) if of_bias else None, None, None
        dx = torch.empty_like(x) if of_x else None
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if of_weight else None
        db = grad.new_empty(grad.shape[1]) if of_bias else None
        _backward(grad.contiguous(), x, weight.contiguous(), y, ctx.groups, dx, dw, db)
        return dx, dw, db, None, None


def _plain(t: torch.Tensor) -> bool:
    if t.layout is not torch.strided or t.is_nested:
        return False
    return type(t) in (torch.Tensor, torch.nn.Parameter) or isinstance(t, FakeTensor)


def is_for_groups(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> bool:
    """Whether :func:`grouped_linear` takes these, and should; if not, a call of torch's for each group does.

    It depends on one group's rows alone, so a pass made one group at a time goes the same way.
    """
    tensors = [t for t in (x, weight, bias) if t is not None]
    if (
        not _library.bound_by_launches(x.device)
        or not all(map(_plain, tensors))
        or any(t.device != x.device for t in tensors)
    ):
        return False
    if _library.transformed():
        return False
    kinds = {t.dtype for t in tensors}
    if torch.is_autocast_enabled(x.device.type):
        kinds.add(torch.get_autocast_dtype(x.device.type))
    elif len(kinds) > 1:
        return False
    if not kinds <= set(FLOATS):
        return False
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.shape[0] % groups:
        return False
    return 0 < x.numel() // groups * weight.shape[0] <= MOST_PRODUCTS


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int, relu: bool = False
) -> torch.Tensor:
    """``F.linear`` of every group of a stacked ``x``; what :func:`is_for_groups` allows. Autocast is honoured.

    Args:
        x: [groups * B, ..., K], fp32, fp16 or bf16.
        weight: [N, K], bias: [N] or None; of x's dtype unless autocast is on. Not perturbed.
        groups: of the pass.
        relu: of the outputs, too.

    Returns:
        [groups * B, ..., N]; twice differentiable.
    """
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
    if x.dim() == 2:
        return _GroupedLinear.apply(x.contiguous(), weight, bias, groups, relu)
    y = _GroupedLinear.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, groups, relu)
    return y.view(*x.shape[:-1], weight.shape[0])

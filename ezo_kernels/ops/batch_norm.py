"""Batch norm of every group of a pass by the statistics of its own rows: two launches, however many groups there are.

    y_g = (x_g - mean_g) / sqrt(var_g + eps) * w_g + b_g          var_g over n = B S values, mean_g too
    running <- running + momentum (mean over groups of mean_g or n / (n - 1) var_g, - running)       where a step is taken

| tensor | shape |
|---|---|
| x, y | [groups * B, C, ...], group-major, S positions behind C; contiguous or channels last |
| w, b | [groups, C] (perturbed copies) or [C], any float dtype; or None |
| mean, var | fp32 [groups, C]; var is n / (n - 1) of the one above, as running statistics take it |

No autograd: these are the layers of a trunk. (Ioffe and Szegedy, arXiv 1502.03167.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import _library
from ._library import launcher, register
from ._perturbation import FLOATS


def _of_group(t: torch.Tensor | None, g: int) -> torch.Tensor | None:
    return None if t is None else (t if t.dim() == 1 else t[g]).float()


def _batch_norm_cpu(x, w, b, groups, eps, y, mean, var) -> None:
    for g, (own, to) in enumerate(zip(x.chunk(groups), y.chunk(groups), strict=True)):
        mean[g].zero_()
        var[g].fill_(1.0)
        # momentum 1 makes it write this batch's own mean and unbiased variance into its "running" ones
        to.copy_(F.batch_norm(own, mean[g], var[g], _of_group(w, g), _of_group(b, g), True, 1.0, eps))


def _running_cpu(running_mean, running_var, mean, var, ok, momentum) -> None:
    for running, own in ((running_mean, mean), (running_var, var)):
        new = own.mean(0).to(running.dtype)
        running.copy_(torch.where(ok, running + (new - running) * momentum, running))


_batch_norm = register(
    "batch_norm",
    "(Tensor x, Tensor? w, Tensor? b, int groups, float eps, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) var) -> ()",
    cpu=_batch_norm_cpu,
    cuda=launcher("_batch_norm_triton", "launch_batch_norm"),
)
_running_statistics = register(
    "running_statistics",
    "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, Tensor ok, float momentum) -> ()",
    cpu=_running_cpu,
    cuda=launcher("_batch_norm_triton", "launch_running_statistics"),
)


def _positions_at_one_stride(x: torch.Tensor) -> bool:
    axes = [(n, step) for n, step in zip(x.shape[2:], x.stride()[2:], strict=True) if n != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in zip(axes, axes[1:], strict=False))


def takes(x: torch.Tensor, groups: int) -> bool:
    """Whether :func:`batch_norm` is the way for this input; if not, torch's own, a call a group, is."""
    if not _library.bound_by_launches(x.device) or _library.transformed() or x.requires_grad:
        return False
    return (
        x.dim() >= 2 and x.layout is torch.strided and x.dtype in FLOATS and x.shape[0] % groups == 0 and x.numel() > 0
    )


def batch_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, groups: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, mean and var of every group; shapes above, what :func:`takes` allows.

    Raises:
        ValueError: one value a channel and group, which has no variance.
    """
    rows = x.shape[0] // groups
    if rows * x[0, 0].numel() == 1:
        raise ValueError(f"expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    y = torch.empty_like(x)
    if y.stride() != x.stride() or not _positions_at_one_stride(x):
        x = x.contiguous()
        y = torch.empty_like(x)
    mean, var = (x.new_empty(groups, x.shape[1], dtype=torch.float32) for _ in range(2))
    _batch_norm(x, weight, bias, groups, eps, y, mean, var)
    return y, mean, var


def move_running_statistics(
    running_mean: torch.Tensor, running_var: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, ok: torch.Tensor,
    momentum: float,
) -> None:  # fmt: skip
    """Move both by the mean over the rows of ``mean`` and ``var``, fp32 [groups, C]; not where ``ok`` (bool []) is false."""
    _running_statistics(running_mean, running_var, mean, var, ok, momentum)

"""What a step makes of its losses, in one launch: g of each query, the update's coefficients, and whether it is skipped.

| tensor | shape |
|---|---|
| losses | fp32 [groups]: [2 queries] of a pass with both signs (+, -, +, -), [queries] of one with one sign, else any |
| lr, eps | fp32 [1] |
| bad | fp32 [1], not zero where a gradient of the head is not finite; or None |
| g, coef | fp32 [queries]; empty without a trunk |
| ok, skip | bool [] and fp32 []: losses, g and gradients are finite; 1 where one is not |
| mean | fp32 []: of the losses |
| step, skipped | int64 [1] and []: the counts of steps that were and were not taken, brought up to date |

    g of query q, both signs    (L(w + eps z_q) - L(w - eps z_q)) / (2 eps)
    g of query q, one sign      (L(w + eps z_q) - mean over p != q of L(w + eps z_p)) / eps
    coef                        lr clip(g) / queries, or 0 in a step that is skipped

The first is that of MeZO (arXiv 2305.17333) and ElasticZO (arXiv 2501.04287). Both are unbiased for the gradient of the loss
smoothed by the noise. The mean over the others takes L(w) away, and the mean of the curvature's eps / 2 z^T H z, which a
difference with L(w) itself would keep; it is the leave-one-out baseline of Kool et al. (2019).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ._library import launcher, register


def projected_gradient(losses: torch.Tensor, eps: torch.Tensor, antithetic: bool) -> torch.Tensor:
    """g [queries] from losses fp32 [groups]; eps fp32 [1]."""
    if antithetic:
        return (losses[0::2] - losses[1::2]) / (2.0 * eps)
    n = losses.numel()
    return (losses - losses.mean()) * (n / (n - 1)) / eps  # own - (n mean - own) / (n - 1)


def _coefficients_cpu(losses, lr, eps, bad, antithetic, clip, g, coef, ok, skip, mean, step, skipped) -> None:
    fine = bool(torch.isfinite(losses).all()) and (bad is None or bad.item() == 0)
    if g.numel():
        own = projected_gradient(losses, eps, antithetic)
        fine = fine and bool(torch.isfinite(own).all())
        g.copy_(own if math.isinf(clip) else own.clamp(-clip, clip))
        torch.div(lr * g, g.numel(), out=coef)
        if not fine:
            coef.zero_()
    ok.fill_(fine)
    skip.fill_(not fine)
    torch.mean(losses, 0, out=mean)
    step += fine
    skipped += not fine


_coefficients = register(
    "coefficients",
    "(Tensor losses, Tensor lr, Tensor eps, Tensor? bad, bool antithetic, float clip, Tensor(a!) g, Tensor(b!) coef, "
    "Tensor(c!) ok, Tensor(d!) skip, Tensor(e!) mean, Tensor(f!) step, Tensor(g!) skipped) -> ()",
    cpu=_coefficients_cpu,
    cuda=launcher("_coefficients_triton", "launch_coefficients"),
)


class Coefficients(NamedTuple):
    """What :func:`coefficients` makes, as in the table above."""

    g: torch.Tensor
    coef: torch.Tensor
    ok: torch.Tensor
    skip: torch.Tensor
    mean: torch.Tensor


def coefficients(
    losses: torch.Tensor,
    lr: torch.Tensor,
    eps: torch.Tensor,
    *,
    queries: int,
    antithetic: bool,
    clip: float | None,
    bad: torch.Tensor | None,
    step: torch.Tensor,
    skipped: torch.Tensor,
) -> Coefficients:
    """g, clipped, and what follows from it; ``step`` or ``skipped`` counts one more.

    Args:
        losses, lr, eps, bad, step, skipped: as in the table above.
        queries: of the pass, 0 without a trunk.
        antithetic: both signs of each query.
        clip: largest magnitude of g, or None.
    """
    if queries and losses.numel() != queries * (1 + antithetic):
        raise ValueError(f"{queries} queries have {queries * (1 + antithetic)} losses, got {losses.numel()}")
    g, coef = losses.new_empty(queries), losses.new_empty(queries)
    ok = torch.empty((), dtype=torch.bool, device=losses.device)
    skip, mean = losses.new_empty(()), losses.new_empty(())
    clip = math.inf if clip is None else clip
    _coefficients(losses, lr, eps, bad, antithetic, clip, g, coef, ok, skip, mean, step, skipped)
    return Coefficients(g, coef, ok, skip, mean)

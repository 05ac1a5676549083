"""What a step makes of its losses, in one launch: g of each query, the update's coefficients, whether it is skipped, and the
head's own step where that is plain SGD of few parameters.

| tensor | shape |
|---|---|
| losses | fp32 [groups]: [2 queries] of a pass with both signs (+, -, +, -), [queries] of one with one sign, else any |
| lr, eps | fp32 [1] |
| bad | fp32 [1], not zero where a gradient of the head is not finite, and set to zero; or None |
| grads | gradients of the head to look at here, any float dtype, contiguous |
| weights, head_lr | the head's parameters that have these gradients, and fp32 [] |
| g, coef | fp32 [queries]; empty without a trunk |
| ok, skip | bool [] and fp32 []: losses, g and gradients are finite; 1 where one is not |
| mean | fp32 []: of the losses |
| step, skipped | int64 [1] and []: the counts of steps that were and were not taken, brought up to date |

    g of query q, both signs    (L(w + eps z_q) - L(w - eps z_q)) / (2 eps)
    g of query q, one sign      (L(w + eps z_q) - mean over p != q of L(w + eps z_p)) / eps
    coef                        lr clip(g) / queries, or 0 in a step that is skipped
    weights                     w - head_lr grad, in fp32 and rounded once, or w in a step that is skipped

The first is that of MeZO (arXiv 2305.17333) and ElasticZO (arXiv 2501.04287). Both are unbiased for the gradient of the loss
smoothed by the noise. The mean over the others takes L(w) away, and the mean of the curvature's eps / 2 z^T H z, which a
difference with L(w) itself would keep; it is the leave-one-out baseline of Kool et al. (2019).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ._library import launcher, register
from ._perturbation import FLOATS

#: Tensors, and elements of all, that the one program of a GPU goes through: heads such as LeNet-5's fc2 and fc3.
MOST_TENSORS, MOST_ELEMENTS = 4, 1 << 14


def in_one_launch(tensors: list[torch.Tensor]) -> bool:
    """Whether gradients or parameters like these may be given to :func:`coefficients`."""
    return (
        len(tensors) <= MOST_TENSORS
        and sum(t.numel() for t in tensors) <= MOST_ELEMENTS
        and all(t.layout is torch.strided and t.dtype in FLOATS and t.is_contiguous() for t in tensors)
    )


def projected_gradient(losses: torch.Tensor, eps: torch.Tensor, antithetic: bool) -> torch.Tensor:
    """g [queries] from losses fp32 [groups]; eps fp32 [1]."""
    if antithetic:
        return (losses[0::2] - losses[1::2]) / (2.0 * eps)
    n = losses.numel()
    return (losses - losses.mean()) * (n / (n - 1)) / eps  # own - (n mean - own) / (n - 1)


def _coefficients_cpu(
    losses, lr, eps, grads, head_lr, antithetic, clip, bad, weights, g, coef, ok, skip, mean, step, skipped
) -> None:
    fine = all(bool(torch.isfinite(t).all()) for t in (losses, *grads)) and (bad is None or bad.item() == 0)
    if bad is not None:
        bad.zero_()
    if g.numel():
        own = projected_gradient(losses, eps, antithetic)
        fine = fine and bool(torch.isfinite(own).all())
        g.copy_(own if math.isinf(clip) else own.clamp(-clip, clip))
        torch.div(lr * g, g.numel(), out=coef)
        if not fine:
            coef.zero_()
    if fine:
        for w, grad in zip(weights, grads, strict=False):
            w.copy_(w.float() - head_lr * grad.float())
    ok.fill_(fine)
    skip.fill_(not fine)
    torch.mean(losses, 0, out=mean)
    step += fine
    skipped += not fine


_coefficients = register(
    "coefficients",
    "(Tensor losses, Tensor lr, Tensor eps, Tensor[] grads, Tensor? head_lr, bool antithetic, float clip, Tensor(h!)? bad, "
    "Tensor(i!)[] weights, Tensor(a!) g, Tensor(b!) coef, Tensor(c!) ok, Tensor(d!) skip, Tensor(e!) mean, "
    "Tensor(f!) step, Tensor(g!) skipped) -> ()",
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
    bad: torch.Tensor | None = None,
    grads: list[torch.Tensor] = (),
    weights: list[torch.Tensor] = (),
    head_lr: torch.Tensor | None = None,
    step: torch.Tensor,
    skipped: torch.Tensor,
) -> Coefficients:
    """g, clipped, and what follows from it; ``step`` or ``skipped`` counts one more.

    Args:
        losses, lr, eps, bad, step, skipped: as in the table above.
        grads: what :func:`in_one_launch` allows; one that is not finite skips the step.
        weights: none, or one for each of ``grads``, of its shape and dtype, which take a step of SGD at ``head_lr``.
        queries: of the pass, 0 without a trunk.
        antithetic: both signs of each query.
        clip: largest magnitude of g, or None.
    """
    if queries and losses.numel() != queries * (1 + antithetic):
        raise ValueError(f"{queries} queries have {queries * (1 + antithetic)} losses, got {losses.numel()}")
    if weights and [(w.shape, w.dtype) for w in weights] != [(t.shape, t.dtype) for t in grads]:
        raise ValueError("weights and grads differ in shape or dtype")
    g, coef = losses.new_empty(queries), losses.new_empty(queries)
    ok = torch.empty((), dtype=torch.bool, device=losses.device)
    skip, mean = losses.new_empty(()), losses.new_empty(())
    clip = math.inf if clip is None else clip
    _coefficients(
        losses, lr, eps, list(grads), head_lr, antithetic, clip, bad, list(weights), g, coef, ok, skip, mean, step, skipped
    )  # fmt: skip
    return Coefficients(g, coef, ok, skip, mean)

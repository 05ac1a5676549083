"""g, the derivative along each direction, from the losses of a pass.

| option | losses of a pass | g of query q |
|---|---|---|
| antithetic | [2 queries]: +, -, +, - | (L(w + eps z_q) - L(w - eps z_q)) / (2 eps) |
| one sign | [queries] | (L(w + eps z_q) - mean over p != q of L(w + eps z_p)) / eps |

The first is that of MeZO (arXiv 2305.17333) and ElasticZO (arXiv 2501.04287). Both are unbiased for the gradient of the loss
smoothed by the noise. The mean over the others takes L(w) away, and the mean of the curvature's eps / 2 z^T H z, which a
difference with L(w) itself would keep; it is the leave-one-out baseline of Kool et al. (2019).
"""

from __future__ import annotations

import torch


def check_antithetic(antithetic: bool, queries: int, head_grad: str) -> None:
    """TypeError or ValueError for what goes with no estimate."""
    if not isinstance(antithetic, bool):
        raise TypeError(f"antithetic must be a bool, got {type(antithetic).__name__}")
    if not antithetic and (queries < 2 or head_grad != "mean"):
        raise ValueError(
            f"antithetic=False, one sign a query, needs 2 queries or more and head_grad 'mean', got {queries} and {head_grad!r}"
        )


def projected_gradient(losses: torch.Tensor, eps: torch.Tensor, antithetic: bool) -> torch.Tensor:
    """g [queries] from losses fp32 [groups]; eps fp32 [1]."""
    if antithetic:
        return (losses[0::2] - losses[1::2]) / (2.0 * eps)
    n = losses.numel()
    return (losses - losses.mean()) * (n / (n - 1)) / eps  # own - (n mean - own) / (n - 1)

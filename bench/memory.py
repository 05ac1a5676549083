"""The ElasticZO paper's tally of the bytes of training (arXiv 2501.04287): every buffer at once, none released."""

from __future__ import annotations

import torch
from torch import nn


def paper_tally(model: nn.Module, sample: torch.Tensor, batch: int) -> tuple[int, int]:
    """Bytes of Full ZO in fp32 and in int8, 4 (P + B A) and P + B A + 4 B A32.

    P counts parameters; A32 the outputs of the weight layers for one sample, which int8 also keeps in int32; A those, the
    output of a ReLU after each of them but the last, and that of a pooling where the next weight layer takes less than that.
    The input counts as nothing.

    Args:
        model: weight layers one after the other, in floats.
        sample: one row of input, [1, ...].
        batch: B.
    """
    seen: list[tuple[int, int]] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_hook(lambda m, x, y: seen.append((x[0].numel(), y.numel()))) for m in layers]
    try:
        with torch.no_grad():
            model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    accumulators = sum(out for _, out in seen)
    relus = sum(out for _, out in seen[:-1])
    pools = sum(taken for (_, out), (taken, _) in zip(seen, seen[1:], strict=False) if taken != out)
    parameters, activations = sum(p.numel() for p in model.parameters()), accumulators + relus + pools
    return 4 * (parameters + batch * activations), parameters + batch * activations + 4 * batch * accumulators

"""How the models here start."""

from __future__ import annotations

import torch
from torch import nn


def kaiming_(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Weights N(0, 2 / fan_in), biases zero, for every linear and convolution of ``model``, in place.

    Activations then keep their scale through the ReLUs; torch's own default (a uniform of variance 1 / (3 fan_in))
    shrinks the signal by sqrt(6) a layer, and with it the differences of losses that zeroth-order training lives on.

    Args:
        model: any module; parameters of other layers are left alone.
        generator: where the draws come from; torch's global generator if None.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model

"""A multi-layer perceptron of any depth."""

from __future__ import annotations

import torch
from torch import nn

from ..nn.linear import linear_relu
from ._init import kaiming_


class MLP(nn.Module):
    """Linear layers ``fc1``, ``fc2``, ... with ReLU between them: ``MLP(784, 256, 128, 10)`` has three.

    Weights start as in :func:`ezo_kernels.models._init.kaiming_`: N(0, 2 / fan_in), biases zero.

    Args:
        widths: the input's width, those of the hidden layers (none is fine), the output's; at least two, all positive.
        generator: where the initial weights come from; torch's global generator if None.

    Raises:
        ValueError: fewer than two widths, or one below 1.
    """

    def __init__(self, *widths: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(
                f"an MLP takes at least two widths (input, hidden ..., output), all positive, not {widths}"
            )
        self.depth = len(widths) - 1
        for i in range(self.depth):
            # Named layers, not a ModuleList: a head is chosen by name ("fc3").
            self.add_module(f"fc{i + 1}", nn.Linear(widths[i], widths[i + 1]))
        kaiming_(self, generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Anything [B, ...] with widths[0] elements a row, in the dtype of the weights, to [B, widths[-1]]."""
        x = x.flatten(1)
        for i in range(1, self.depth):
            x = linear_relu(self.get_submodule(f"fc{i}"), x)
        return self.get_submodule(f"fc{self.depth}")(x)

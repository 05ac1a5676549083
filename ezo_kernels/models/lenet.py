"""LeNet-5 with 107,786 parameters: both convolutions padded, so that fc1 sees 16 x 7 x 7."""

from __future__ import annotations

import torch
from torch import nn

from ..nn.conv import conv_pool_relu
from ..nn.linear import linear_relu
from ._init import kaiming_


class LeNet5(nn.Module):
    """Two convolutions and three linear layers for 28 x 28 images with one channel.

    | layer | output | parameters |
    |---|---|---|
    | conv1, 5 x 5, relu, max-pool 2 | [B, 6, 14, 14] | 156 |
    | conv2, 5 x 5, relu, max-pool 2 | [B, 16, 7, 7] | 2,416 |
    | fc1, relu | [B, 120] | 94,200 |
    | fc2, relu | [B, 84] | 10,164 |
    | fc3 | [B, classes] | 850 |

    Weights start as in :func:`ezo_kernels.models._init.kaiming_`: N(0, 2 / fan_in), biases zero.

    Args:
        classes: width of the output.
        generator: where the initial weights come from; torch's global generator if None.
    """

    def __init__(self, classes: int = 10, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5, padding=2)
        self.fc1 = nn.Linear(16 * 7 * 7, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)
        kaiming_(self, generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, 1, 28, 28] in the dtype of the weights to logits [B, classes]."""
        x = conv_pool_relu(self.conv1, x)
        x = conv_pool_relu(self.conv2, x)
        x = x.flatten(1)
        x = linear_relu(self.fc1, x)
        x = linear_relu(self.fc2, x)
        return self.fc3(x)

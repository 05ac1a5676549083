"""PointNet without its alignment networks: 819,624 parameters for 40 classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ._init import kaiming_


class PointNet(nn.Module):
    """The same MLP on every point, the maximum over points, and three linear layers (arXiv 1612.00593, "vanilla").

    | layer | output | parameters, batch norm included |
    |---|---|---|
    | conv1, bn1, relu | [B, 64, N] | 256 + 128 |
    | conv2, bn2, relu | [B, 64, N] | 4,160 + 128 |
    | conv3, bn3, relu | [B, 64, N] | 4,160 + 128 |
    | conv4, bn4, relu | [B, 128, N] | 8,320 + 256 |
    | conv5, bn5, maximum over points, relu | [B, 1024] | 132,096 + 2,048 |
    | fc1, bn6, relu | [B, 512] | 524,800 + 1,024 |
    | fc2, bn7, relu | [B, 256] | 131,328 + 512 |
    | fc3 | [B, classes] | 10,280 for 40 |

    The convolutions have kernels of one point, so that the order of the points does not matter. Weights start as in
    :func:`ezo_kernels.models._init.kaiming_`: N(0, 2 / fan_in), biases zero.

    Args:
        classes: width of the output.
        norm: batch norm behind all layers but the last. Without it there are 815,400 parameters for 40 classes, and
            ``convert_(model, precision="int8")`` has an integer form of every layer.
        generator: where the initial weights come from; torch's global generator if None.

    Raises:
        ValueError: classes < 1.
    """

    def __init__(self, classes: int = 40, *, norm: bool = True, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes is {classes}: at least 1 is needed")
        self.norm = norm
        widths = (3, 64, 64, 64, 128, 1024)
        # Registered in the order of the forward: a summary reads like the table above.
        for i in range(1, 6):
            self.add_module(f"conv{i}", nn.Conv1d(widths[i - 1], widths[i], kernel_size=1))
            if norm:
                self.add_module(f"bn{i}", nn.BatchNorm1d(widths[i]))
        for i, (inputs, outputs) in enumerate([(1024, 512), (512, 256)], 1):
            self.add_module(f"fc{i}", nn.Linear(inputs, outputs))
            if norm:
                self.add_module(f"bn{i + 5}", nn.BatchNorm1d(outputs))
        self.fc3 = nn.Linear(256, classes)
        kaiming_(self, generator)

    def _normed(self, x: torch.Tensor, i: int) -> torch.Tensor:
        return self.get_submodule(f"bn{i}")(x) if self.norm else x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Clouds [B, 3, N] in the dtype of the weights to logits [B, classes]."""
        for i in range(1, 5):
            x = F.relu(self._normed(self.get_submodule(f"conv{i}")(x), i))
        # The maximum commutes with relu, which has 1024 values a cloud to do instead of 1024 N.
        x = F.relu(torch.amax(self._normed(self.conv5(x), 5), 2))
        x = F.relu(self._normed(self.fc1(x), 6))
        x = F.relu(self._normed(self.fc2(x), 7))
        return self.fc3(x)

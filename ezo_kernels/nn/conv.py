"""Fused convolutions: drop-in for nn.Conv1d and nn.Conv2d."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import perturbed_conv1d, perturbed_conv2d
from .context import ZOContext
from .int8_layers import Int8Conv2d
from .linear import become


def _explicit_padding(conv: nn.modules.conv._ConvNd, x: torch.Tensor):
    """x and the zero padding that is left for the kernel; modes and uneven 'same' are padded here."""
    if conv.padding_mode != "zeros":
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0,) * len(conv.kernel_size)
    if conv.padding == "valid":
        return x, (0,) * len(conv.kernel_size)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            x = F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
            return x, (0,) * len(total)
        return x, tuple(t // 2 for t in total)
    return x, conv.padding


def conv_strategy(asked: str) -> str:
    """A model's strategy for its convolutions: linear layers alone have two of them, beside which these choose."""
    return "auto" if asked in ("two_products", "specialized") else asked


class _ZOConv:
    zo: ZOContext
    site: int
    bias_site: int | None

    @classmethod
    def from_conv(cls, conv: nn.Module, zo: ZOContext, sites: dict[str, int]):
        """Turn ``conv`` into one, in place; ``sites`` maps "weight" (and "bias") to ids."""
        return become(conv, cls, zo=zo, site=sites["weight"], bias_site=sites.get("bias"))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if self.zo.p is None else self._perturbed(input)

    def _perturbed(self, input: torch.Tensor, **finish) -> torch.Tensor:
        self.zo.visit(self.site, self.bias_site)
        single = input.dim() == self.weight.dim() - 1  # torch's unbatched form
        x, padding = _explicit_padding(self, input.unsqueeze(0) if single else input)
        shared = self.zo.require_rows(x, self.plain_class.__name__, self.site)
        y = self._operator(
            x,
            self.weight,
            self.bias,
            self.zo.of(self.site),
            site=self.site,
            bias_site=self.bias_site or 0,
            shared=shared,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            strategy=conv_strategy(self.zo.strategy),
            **finish,
        )
        return self.zo.made(y.squeeze(0) if single else y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, site={self.site}"


class ZOConv1d(_ZOConv, nn.Conv1d):
    """nn.Conv1d whose weight and bias are perturbed during a zeroth-order pass, inside the implicit GEMM or by slabs.

    Shapes as nn.Conv1d; in a stacked pass x is [groups * B, C, L], group-major. Outside a pass it is nn.Conv1d.
    """

    _operator = staticmethod(perturbed_conv1d)


class ZOConv2d(_ZOConv, nn.Conv2d):
    """nn.Conv2d whose weight and bias are perturbed during a zeroth-order pass, inside the implicit GEMM or by slabs.

    Shapes as nn.Conv2d; in a stacked pass x is [groups * B, C, H, W], group-major. Outside a pass it is nn.Conv2d.
    """

    _operator = staticmethod(perturbed_conv2d)

    def forward(self, input: torch.Tensor, *, pooled: bool = False) -> torch.Tensor:
        """``pooled``, in a pass alone: :func:`conv_pool_relu` of it."""
        return self._perturbed(input, relu=True, pool=2) if pooled else super().forward(input)


@torch.fx.wrap  # one node of a trace: the branch is about speed and cannot be seen by one
def max_pool_2x2(x: torch.Tensor) -> torch.Tensor:
    """F.max_pool2d(x, 2); on a CPU without autograd in a fifth of its time, with the same bits."""
    # not a tensor: int8 with its exponents; less than a window: torch's error
    if not isinstance(x, torch.Tensor) or x.is_cuda or x.requires_grad or min(x.shape[-2:]) < 2:
        return F.max_pool2d(x, 2)
    # torch would write indices that nobody reads
    height, width = (n // 2 * 2 for n in x.shape[-2:])
    rows = torch.maximum(x[..., :height:2, :width], x[..., 1:height:2, :width])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


def conv_pool_relu(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """``F.relu(F.max_pool2d(conv(x), 2))``, for the forward of a model, with the same bits.

    During a zeroth-order pass of a converted ``conv`` it is one kernel, and what the convolution gives before the pooling is
    never in memory; so a forward hook of ``conv`` then sees the result of all three.
    """
    if isinstance(conv, (ZOConv2d, Int8Conv2d)) and conv.zo.p is not None:
        return conv(x, pooled=True)
    # The maximum commutes with relu: pooling first leaves relu a quarter of the work and the same bits.
    return F.relu(max_pool_2x2(conv(x)))

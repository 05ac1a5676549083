"""Fused linear layers: drop-in for nn.Linear and for Hugging Face's Conv1D."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import perturbed_linear
from .context import ZOContext


def become(module: nn.Module, cls: type, **state) -> nn.Module:
    """Turn ``module`` into a ``cls`` in place: same object, Parameters, buffers, hooks and mode.

    Nothing is copied, so optimizers, state_dicts, ties and references that hold the module or its Parameters stay valid.
    """
    module.__dict__.update(state, plain_class=type(module), converted=tuple(state))
    module.__class__ = cls
    return module


def release(module: nn.Module) -> nn.Module:
    """Undo :func:`become`, in place."""
    plain, added = module.plain_class, (*module.converted, "plain_class", "converted")
    for name in added:
        del module.__dict__[name]
    module.__class__ = plain
    return module


class ZOLinear(nn.Linear):
    """nn.Linear whose weight and bias are perturbed inside the matmul during a zeroth-order pass.

    Shapes as nn.Linear; in a stacked pass x is [groups * B, ..., in_features], group-major. Outside a pass it is nn.Linear.
    """

    zo: ZOContext
    site: int
    bias_site: int | None

    @classmethod
    def from_linear(cls, linear: nn.Linear, zo: ZOContext, sites: dict[str, int]) -> ZOLinear:
        """Turn ``linear`` into one, in place; ``sites`` maps "weight" (and "bias") to ids."""
        return become(linear, cls, zo=zo, site=sites["weight"], bias_site=sites.get("bias"))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.zo.p is None:
            return super().forward(input)
        self.zo.visit(self.site, self.bias_site)
        return perturbed_linear(
            input, self.weight, self.bias, self.zo.of(self.site), site=self.site, bias_site=self.bias_site or 0,
            strategy=self.zo.strategy, z_dtype=self.zo.z_dtype(self.site, self.weight),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, site={self.site}"


class ZOTransposedLinear(nn.Module):
    """Hugging Face's Conv1D (y = x W + b, W [in, out]) whose weight and bias are perturbed inside the matmul."""

    zo: ZOContext
    site: int
    bias_site: int | None
    plain_class: type

    @classmethod
    def from_conv1d(cls, conv1d: nn.Module, zo: ZOContext, sites: dict[str, int]) -> ZOTransposedLinear:
        """Turn a ``transformers`` Conv1D into one, in place; ``sites`` maps "weight" and "bias" to ids."""
        return become(conv1d, cls, zo=zo, site=sites["weight"], bias_site=sites.get("bias"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.zo.p is None:
            return self.plain_class.forward(self, x)
        self.zo.visit(self.site, self.bias_site)
        return perturbed_linear(
            x, self.weight, self.bias, self.zo.of(self.site), site=self.site, bias_site=self.bias_site or 0, transposed=True,
            strategy=self.zo.strategy,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, site={self.site}"

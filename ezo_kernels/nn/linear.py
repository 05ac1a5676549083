"""Fused linear layers: drop-in for nn.Linear and for Hugging Face's Conv1D."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import perturb_outputs, perturbed_linear
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


class EndsInRelu:
    """A layer with a context ``zo`` whose kernel can end in a relu: ``forward(x, relu=True)``."""


class ZOLinear(EndsInRelu, nn.Linear):
    """nn.Linear whose weight and bias are perturbed inside the matmul during a zeroth-order pass.

    Shapes as nn.Linear; in a stacked pass x is [groups * B, ..., in_features], group-major. Outside a pass it is nn.Linear.
    Where an optimizer asks for it (``node_perturbation``), its outputs are perturbed in place of its parameters.
    """

    zo: ZOContext
    site: int
    bias_site: int | None

    @classmethod
    def from_linear(cls, linear: nn.Linear, zo: ZOContext, sites: dict[str, int]) -> ZOLinear:
        """Turn ``linear`` into one, in place; ``sites`` maps "weight" (and "bias") to ids."""
        return become(linear, cls, zo=zo, site=sites["weight"], bias_site=sites.get("bias"))

    def forward(self, input: torch.Tensor, *, relu: bool = False) -> torch.Tensor:
        """``relu``: of the outputs, too; :func:`linear_relu`."""
        if self.zo.p is None:
            y = super().forward(input)
            return F.relu(y) if relu else y
        self.zo.visit(self.site, self.bias_site)
        shared = self.zo.require_rows(input, "Linear", self.site)
        if self.site in self.zo.nodes:
            y = self.zo.node_forward(self, input, shared)
            return self.zo.made(F.relu(y) if relu else y)
        y = perturbed_linear(
            input, self.weight, self.bias, self.zo.of(self.site), site=self.site, bias_site=self.bias_site or 0,
            shared=shared, strategy=self.zo.strategy, z_dtype=self.zo.z_dtype(self.site, self.weight), relu=relu,
        )  # fmt: skip
        return self.zo.made(y)

    def with_perturbed_outputs(self, x: torch.Tensor, shared: bool) -> torch.Tensor:
        """The plain layer, and noise on what it gives; ``x``, which the update needs, is kept."""
        p = self.zo.of(self.site)
        plain = replace(p, query=0, queries=1 if shared else p.groups, signs=(0,))
        y = perturbed_linear(x, self.weight, self.bias, plain, site=self.site, strategy=self.zo.strategy)
        if self.zo.inputs is not None:
            self.zo.inputs.add(self.site, x, 1 if shared else p.groups, p.groups)
        return perturb_outputs(y, p, site=self.site, shared=shared)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, site={self.site}"


def linear_relu(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """``F.relu(linear(x))``, for the forward of a model, with the same bits.

    During a zeroth-order pass of a converted ``linear`` it is one kernel; so a forward hook of ``linear`` then sees the result
    of both.
    """
    if isinstance(linear, EndsInRelu) and linear.zo.p is not None:
        return linear(x, relu=True)
    return F.relu(linear(x))


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
        shared = self.zo.require_rows(x, "Conv1D", self.site)
        y = perturbed_linear(
            x, self.weight, self.bias, self.zo.of(self.site), site=self.site, bias_site=self.bias_site or 0, shared=shared,
            transposed=True, strategy=self.zo.strategy,
        )  # fmt: skip
        return self.zo.made(y)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, site={self.site}"

"""Integer layers: nn.Linear, nn.Conv1d and nn.Conv2d whose weights are int8, perturbed inside the product during a pass."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from ..ops._perturbation import PassError
from ..ops.int8_conv2d import int8_conv1d, int8_conv2d
from ..ops.int8_linear import int8_linear
from ..ops.int8_matmul import check_input
from ..ops.int8_tensor import LEAST_EXPONENT, MOST_EXPONENT, Int8Tensor
from .context import ZOContext
from .linear import EndsInRelu, become


def parameter_faults(name: str, values, exponent) -> list[str]:
    """What is wrong with an integer parameter and its exponent, either of which may be None; waits for their device."""
    faults = []
    if values is not None and values.dtype != torch.int8:
        faults.append(
            f"{name} is {values.dtype}, and this layer holds int8: load floats before convert_(precision='int8'), or after "
            "unconvert_"
        )
    elif values is not None and values.numel() and not values.is_meta and int(values.min()) < -127:
        faults.append(f"{name} holds -128: int8 parameters are in [-127, 127]")
    if exponent is not None and (exponent.dtype != torch.int32 or exponent.shape != (1,)):
        faults.append(f"{name}_exponent must be int32 [1], got {exponent.dtype} {tuple(exponent.shape)}")
    elif exponent is not None and not exponent.is_meta and not LEAST_EXPONENT <= int(exponent) <= MOST_EXPONENT:
        faults.append(f"{name}_exponent is {int(exponent)}: an exponent must be in [{LEAST_EXPONENT}, {MOST_EXPONENT}]")
    return faults


class _Int8Layer:
    """What all have: int8 Parameters with an exponent buffer each, and a place in the trunk, the head, or neither.

    Attributes:
        zo: the model's context.
        sites: "weight" (and "bias") -> id of a trunk parameter; empty if frozen or in the head.
        head_names: "weight" (and "bias") -> qualified name of a head parameter; empty elsewhere.
        rounding, strategy, weights: as in :func:`ezo_kernels.ops.int8_linear`.
        was: "weight" (and "bias") -> (requires_grad, dtype) of the float parameter.
    """

    zo: ZOContext
    sites: dict[str, int]
    head_names: dict[str, str]
    rounding: str
    strategy: str
    weights: str
    was: dict[str, tuple[bool, torch.dtype]]
    _kind = "linear"

    @classmethod
    def adopt(cls, module: nn.Module, zo: ZOContext, **state) -> nn.Module:
        """Turn ``module``, whose Parameters are int8 by now, into one, in place."""
        return become(module, cls, zo=zo, **state)

    def forward(self, input: Int8Tensor, **finish) -> Int8Tensor:
        check_input(input, type(self).__name__)
        zo = self.zo
        if input.memory is not None:
            input.memory.owner = self
        p = zo.of(next(iter(self.sites.values()))) if self.sites else None
        if self.sites and input.tape is not None:
            raise PassError(
                "a layer of the head runs before this one of the trunk: give every layer from that one on to the head, or "
                "freeze this one",
                next(iter(self.sites.values())),
            )
        if zo.p is not None:
            zo.visit(*self.sites.values())
        y = self._multiply(
            input,
            p,
            weight_exponent=self.weight_exponent,
            bias_exponent=self.bias_exponent if self.bias is not None else None,
            site=self.sites.get("weight", 0),
            bias_site=self.sites.get("bias", 0),
            rounding=self.rounding,
            strategy=self.strategy,
            weights=self.weights,
            **finish,
        )
        if zo.tape is not None and (self.head_names or input.tape is not None):
            y = dataclasses.replace(y, tape=zo.tape)
            zo.tape.note(self._kind, y, (input,), layer=self, relu=finish.get("relu", False))
        return y

    def _load_from_state_dict(self, state, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        """As torch's, but what is no integer parameter is refused: a copy into int8 would cut its floats off."""
        problems = []
        for leaf in ("weight", "bias"):
            values, exponent = (state.get(prefix + leaf + end) for end in ("", "_exponent"))
            faults = parameter_faults(prefix + leaf, values, exponent)
            if not faults and (values is None) != (exponent is None):  # strict=False would pair it with an old one
                there, lacking = (leaf, leaf + "_exponent") if exponent is None else (leaf + "_exponent", leaf)
                faults.append(f"{prefix}{there} comes without {prefix}{lacking}, and means nothing without it")
            problems += faults
        errors += problems
        if not problems:
            super()._load_from_state_dict(state, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8, strategy={self.strategy}"


class Int8Linear(EndsInRelu, _Int8Layer, nn.Linear):
    """nn.Linear in integers: takes and gives :class:`ezo_kernels.Int8Tensor`, [..., in] to [..., out]."""

    def _multiply(self, x, p, **options):
        return int8_linear(x, self.weight, self.bias, p, **options)

    def forward(self, input: Int8Tensor, *, relu: bool = False) -> Int8Tensor:
        """``relu``: :func:`.linear.linear_relu` of it."""
        return super().forward(input, **({"relu": True} if relu else {}))


class _Int8Conv(_Int8Layer):
    _kind = "a convolution"

    def _multiply(self, x, p, **options):
        padding = self.padding
        if padding == "valid":
            padding = 0
        elif padding == "same":
            padding = tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return self._operator(
            x, self.weight, self.bias, p, stride=self.stride, padding=padding, dilation=self.dilation,
            groups=self.groups, **options,
        )  # fmt: skip


class Int8Conv1d(_Int8Conv, nn.Conv1d):
    """nn.Conv1d in integers, zero padding: [B, C, L] to [B, O, L']."""

    _operator = staticmethod(int8_conv1d)


class Int8Conv2d(_Int8Conv, nn.Conv2d):
    """nn.Conv2d in integers, zero padding: [B, C, H, W] to [B, O, H', W']."""

    _operator = staticmethod(int8_conv2d)

    def forward(self, input: Int8Tensor, *, pooled: bool = False) -> Int8Tensor:
        """``pooled``: :func:`.conv.conv_pool_relu` of it."""
        if pooled and (self.head_names or input.tape is not None):  # the head's backward goes through each of the three
            return F.relu(F.max_pool2d(super().forward(input), 2))
        return super().forward(input, **({"relu": True, "pool": 2} if pooled else {}))

"""int8 values with a power-of-two exponent a group: what flows between integer layers (docs/numerics.md, section Integers)."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, field
from typing import ClassVar

import torch

#: Exponents that a tensor may be given; those that are computed stay far inside of int32.
LEAST_EXPONENT, MOST_EXPONENT = -64, 64


def check_exponent(exponent, what: str = "an exponent") -> int:
    """``exponent`` as a Python int in [-64, 64], or TypeError / ValueError."""
    try:
        if isinstance(exponent, bool):  # an index, too
            raise TypeError
        exponent = operator.index(exponent)
    except TypeError:
        raise TypeError(f"{what} must be an int, got {type(exponent).__name__}") from None
    if not LEAST_EXPONENT <= exponent <= MOST_EXPONENT:
        raise ValueError(f"{what} must be in [{LEAST_EXPONENT}, {MOST_EXPONENT}], got {exponent}")
    return exponent


@functools.cache
def _functions() -> dict:
    from .int8_functions import FUNCTIONS

    return FUNCTIONS


@dataclass(frozen=True, eq=False)
class Int8Tensor:
    """``values * 2**exponent``, one exponent for each group of rows.

    It is not a torch.Tensor: torch's functions that have an integer form take it (``F.relu``, pooling, ``flatten``, ``+``, ...)
    and all others refuse it.

    In a step its values lie in memory that others get once nobody refers to the Int8Tensor. What a hook keeps beyond the
    layer's call is the Int8Tensor itself, ``values.clone()`` or ``dequantize()``; ``values`` alone are soon another layer's.

    Attributes:
        values: int8 [G * B, ...], contiguous, group-major.
        exponent: int32 [G], on the same device.
        memory: where the results of operations on it live; None is torch's allocator.
        block: what keeps the memory of ``values`` alive.
        tape: records what the head's backward needs; None outside of the head.
        spent: the function of a pass that was to change it in place; None where there was none.
    """

    spent: ClassVar[str | None] = None

    values: torch.Tensor
    exponent: torch.Tensor
    memory: object = field(default=None, repr=False)
    block: object = field(default=None, repr=False)
    tape: object = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not (torch.is_tensor(self.values) and torch.is_tensor(self.exponent)) or (
            self.values.dtype != torch.int8 or self.exponent.dtype != torch.int32
        ):
            kinds = [getattr(part, "dtype", type(part).__name__) for part in (self.values, self.exponent)]
            raise TypeError(
                f"values must be an int8 tensor and exponent an int32 tensor, got {kinds[0]} and {kinds[1]}; "
                "ezo_kernels.quantize(x) makes one of a float tensor"
            )
        if self.exponent.dim() != 1 or not self.exponent.numel():
            raise ValueError(f"exponent must be [groups], got {tuple(self.exponent.shape)}")
        if self.exponent.device != self.values.device:
            raise ValueError(f"values are on {self.values.device} and exponent on {self.exponent.device}")
        if not self.values.dim() and self.groups != 1:
            raise ValueError(f"values of shape () have no rows for {self.groups} groups")
        if self.values.dim() and self.values.shape[0] % self.groups:
            raise ValueError(f"{self.values.shape[0]} rows are no multiple of {self.groups} groups")

    @property
    def groups(self) -> int:
        return self.exponent.numel()

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def is_cuda(self) -> bool:
        return self.values.is_cuda

    @property
    def ndim(self) -> int:
        return self.values.dim()

    def dim(self) -> int:
        return self.values.dim()

    def size(self, dim: int | None = None):
        return self.values.size() if dim is None else self.values.size(dim)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows) -> Int8Tensor:
        """Rows of a tensor of one group, such as a batch of a data set.

        Raises:
            ValueError: a tensor of several groups, or of a pass, whose memory ends with the tensor that it was given to.
        """
        if self.groups != 1 or self.memory is not None:
            raise ValueError("rows of a pass or of several groups cannot be taken: a model takes all of its input")
        return Int8Tensor(self.values[rows], self.exponent)

    def index_select(self, dim: int, rows: torch.Tensor) -> Int8Tensor:
        """As torch's, along dimension 0."""
        if dim != 0:
            raise ValueError(f"index_select of an Int8Tensor takes dimension 0, got {dim}")
        return self[rows]

    def to(self, device) -> Int8Tensor:
        """As torch's, to a device.

        Raises:
            TypeError: a dtype.
        """
        if isinstance(device, torch.dtype):
            way = f"dequantize({device})" if device.is_floating_point else "dequantize()"
            raise TypeError(
                f"an Int8Tensor moves to devices and stays int8, got {device}: {way} gives its values as floats"
            )
        if torch.device(device) == self.device:
            return self
        return Int8Tensor(self.values.to(device), self.exponent.to(device))

    def split(self, rows: int) -> tuple[Int8Tensor, ...]:
        """Batches of at most ``rows`` rows of a tensor of one group.

        Raises:
            ValueError: less than one row.
        """
        if rows < 1:  # a range of such steps is empty
            raise ValueError(f"split takes at least 1 row a batch, got {rows}")
        return tuple(self[first : first + rows] for first in range(0, len(self), rows))

    def require_unspent(self, by: str = "") -> None:
        """Refuse what a function was to change in place: another one of the model's would read what was there before.

        A relu of what a relu was to change finds the same: no branch that begins with one is another function.
        """
        if self.spent is not None and not (by == "int8_relu" and self.spent == IN_PLACE_RELU):
            raise ValueError(
                f"this Int8Tensor is used again after {self.spent} was to change it in place, which integers never are: use "
                "what that returned from there on (h = relu(h)), or what is not in place"
            )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values as floats: exactly, where ``dtype`` reaches that far (float16 reaches from 2^-24 to 65504).

        On a GPU, where nothing waits to look at them, exponents outside of [-126, 127] are beyond float32 and bfloat16.

        Raises:
            TypeError: a dtype that is not of floats.
        """
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dequantize gives floats: its dtype must be a floating one of torch's, got {dtype}")
        if not self.values.dim():
            return Int8Tensor(self.values[None], self.exponent).dequantize(dtype)[0]
        # 2^s by itself may be out of dtype's reach where v 2^s is not
        wide = torch.float32 if dtype == torch.float16 else dtype
        if self._beyond_float32():
            wide = torch.float64
        per_row = self.exponent.repeat_interleave(self.values.shape[0] // self.groups)
        scale = power_of_two(per_row, wide)
        return (self.values.to(wide) * scale.view(-1, *(1,) * (self.values.dim() - 1))).to(dtype)

    def _beyond_float32(self) -> bool:
        """Whether an exponent is none that float32 has a normal power of two for: looked at where that costs no wait."""
        if self.exponent.device.type != "cpu" or type(self.exponent) is not torch.Tensor:
            return False
        return not all(-126 <= s <= 127 for s in self.exponent.tolist())

    # ------------------------------------------------------------------------------------ what torch's functions do to it

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        functions = _functions()
        if func not in functions:
            raise TypeError(
                f"{getattr(func, '__name__', func)} has no integer form: {integer_forms()}. Of an Int8Tensor, {_PARTS}"
            )
        kwargs = dict(kwargs or {})
        if "input" in kwargs:  # as torch calls the first one
            args = (kwargs.pop("input"), *args)
        return functions[func](*args, **kwargs)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Int8Tensor:
        return torch.flatten(self, start_dim, end_dim)

    def relu(self) -> Int8Tensor:
        return torch.relu(self)

    def view(self, *shape) -> Int8Tensor:
        return torch.reshape(self, shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    reshape = view

    def add(self, other, *, alpha=1) -> Int8Tensor:
        return torch.add(self, other, alpha=alpha)

    __add__ = __radd__ = add

    def __iadd__(self, other) -> Int8Tensor:
        return torch.add(self, other).in_place_of(self, "+=")

    def in_place_of(self, before: Int8Tensor, function: str) -> Int8Tensor:
        """This result; in a pass, ``before``, which ``function`` would have changed in floats, may not be used again."""
        if before.memory is not None:  # outside of one it is often a batch, which the user goes on with
            object.__setattr__(before, "spent", function)
        return self

    def __getattr__(self, name: str):
        raise AttributeError(f"an Int8Tensor has no {name!r}: {_PARTS}; in a forward, {integer_forms()}")


#: dtype -> bits of its fraction, bias of its exponent, integers of its size.
_FORMS = {
    torch.float32: (23, 127, torch.int32),
    torch.bfloat16: (7, 127, torch.int16),
    torch.float64: (52, 1023, torch.int64),
}


def power_of_two(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2^exponent by its bits, 0 or infinite beyond the normal numbers: a GPU's ``pow``, and so its ``ldexp``, is off by one."""
    if dtype not in _FORMS:
        return torch.ldexp(torch.ones_like(exponent, dtype=dtype), exponent)
    fraction, bias, whole = _FORMS[dtype]
    return ((exponent.long() + bias).clamp(0, 2 * bias + 1) << fraction).to(whole).view(dtype)


#: What :attr:`Int8Tensor.spent` says after a relu.
IN_PLACE_RELU = "an in-place relu"
#: What people ask an Int8Tensor for, for messages.
_PARTS = ".values are its integers, .dequantize() gives floats, and .to('cpu') moves it"


def integer_forms() -> str:
    """What may be done to an Int8Tensor instead, for messages."""
    names = ", ".join(sorted({f.__name__ for f in _functions()}))
    return f"use one of {names}, or train the model in floating point (precision='float')"


def _no_form(name: str):
    def refused(self, *others):
        raise TypeError(f"{name} of an Int8Tensor has no integer form: {integer_forms()}")

    return refused


for _name in ("sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"):
    for _prefix in ("", "r"):
        setattr(Int8Tensor, f"__{_prefix}{_name}__", _no_form(_name))
for _name in ("neg", "abs", "lt", "le", "gt", "ge"):
    setattr(Int8Tensor, f"__{_name}__", _no_form(_name))


def new(like: Int8Tensor, shape, groups: int | None = None) -> Int8Tensor:
    """An uninitialised tensor in ``like``'s memory: of ``groups`` groups, or of like's own exponents."""
    make = torch.empty if math.prod(shape) else torch.zeros  # no kernel writes the exponents of no values
    exponent = like.exponent if groups is None else make(groups, dtype=torch.int32, device=like.device)
    if like.memory is None:
        values, block = torch.empty(shape, dtype=torch.int8, device=like.device), None
    else:
        values, block = like.memory.allocate(shape, torch.int8)
    return Int8Tensor(values, exponent, like.memory, block, like.tape)


def scratch(like: Int8Tensor, shape, dtype: torch.dtype):
    """An uninitialised tensor in ``like``'s memory, and what keeps it there."""
    if like.memory is None:
        return torch.empty(shape, dtype=dtype, device=like.device), None
    return like.memory.allocate(shape, dtype)


def counters(like: Int8Tensor, count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """``count`` zeros beside ``like``: of a pass with an arena all of them are made in one launch."""
    if like.memory is None:
        return torch.zeros(count, dtype=dtype, device=like.device)
    return like.memory.counters(count, dtype)


def quantize(x: torch.Tensor, exponent: int | None = None) -> Int8Tensor:
    """A float tensor as int8 with one exponent: ``clamp(round(x / 2**exponent), -127, 127)``.

    Args:
        x: float, any shape, finite.
        exponent: by default the smallest one that nothing is clamped by.

    Raises:
        TypeError: x is no float tensor.
        ValueError: x is not finite, too large for any exponent, or the exponent is out of [-64, 64].
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"quantize takes a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    x = x.detach().double()
    if not bool(torch.isfinite(x).all()):
        raise ValueError("quantize: the tensor is not finite")
    if exponent is None:
        reach = x.abs().max().item() if x.numel() else 0.0
        exponent = least_exponent(reach)
        if exponent > MOST_EXPONENT:
            raise ValueError(
                f"quantize: the tensor reaches {reach:.3g}, and int8 holds 127 * 2^{MOST_EXPONENT} at most: scale it down"
            )
    exponent = check_exponent(exponent)
    scaled = (x * 2.0**-exponent).clamp(-128, 128)
    whole = torch.trunc(scaled)
    rounded = whole + torch.trunc(2 * (scaled - whole))  # of half of a float64 less its last bit, plus a half is one
    values = rounded.clamp(-127, 127).to(torch.int8).contiguous()
    return Int8Tensor(values, torch.tensor([exponent], dtype=torch.int32, device=x.device))


def least_exponent(largest: float) -> int:
    """The smallest exponent at which ``largest`` rounds to at most 127; of zero, -7."""
    if largest == 0.0:
        return -7
    exponent = max(LEAST_EXPONENT, math.frexp(largest)[1] - 7)
    return exponent + (largest * 2.0**-exponent >= 127.5)

"""What torch's functions do to an :class:`Int8Tensor`: those that have an integer form."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from .int8_matmul import check_input
from .int8_pointwise import int8_add, int8_pool2d, int8_relu
from .int8_tensor import IN_PLACE_RELU, Int8Tensor

#: What the pools of torch can do and these cannot.
MAX_POOL = "no dilation, ceil_mode or return_indices"
AVG_POOL = "no ceil_mode or divisor_override, and padding counts (count_include_pad=True)"


def _record(kind: str, y: Int8Tensor, *inputs: Int8Tensor, **info) -> Int8Tensor:
    """Leave a note for the head's backward, where one is recorded."""
    if y.tape is not None:
        y.tape.note(kind, y, inputs, **info)
    return y


def _axis(x, dim: int, name: str) -> int:
    """A dimension, counted from the first.

    Raises:
        ValueError: x has no such dimension.
    """
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{name} of an Int8Tensor {tuple(x.shape)}: it has no dimension {dim}")
    return dim % x.dim()


def relu(x, inplace: bool = False):
    y = _record("relu", int8_relu(x), x)
    return y.in_place_of(x, IN_PLACE_RELU) if inplace else y


def relu_(x):
    return relu(x, inplace=True)


def max_pool2d(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    if dilation not in (1, (1, 1), [1, 1]) or ceil_mode or return_indices:
        raise NotImplementedError(f"max_pool2d in integers: {MAX_POOL}")
    y = int8_pool2d(x, "max", kernel_size, stride, padding)
    return _record("max_pool2d", y, x, kernel=kernel_size, stride=stride, padding=padding)


def max_pool1d(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    if dilation not in (1, (1,), [1]) or ceil_mode or return_indices:
        raise NotImplementedError(f"max_pool1d in integers: {MAX_POOL}")
    return _pool1d("max", x, kernel_size, stride, padding)


def avg_pool1d(x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True):
    if ceil_mode or (padding not in (0, (0,), [0]) and not count_include_pad):
        raise NotImplementedError(f"avg_pool1d in integers: {AVG_POOL}")
    return _pool1d("avg", x, kernel_size, stride, padding)


def _pool1d(kind: str, x, kernel, stride, padding):
    """Images of one row: no kernel of its own."""
    check_input(x, f"{kind}_pool1d")
    if x.dim() != 3:
        raise ValueError(f"{kind}_pool1d of an Int8Tensor takes [B, C, L], got {tuple(x.shape)}")
    kernel, padding = _single(kernel), _single(padding)
    stride = kernel if stride is None or stride in ((), []) else _single(stride)
    rows = dataclasses.replace(x, values=x.values.unsqueeze(2))
    y = int8_pool2d(rows, kind, (1, kernel), (1, stride), (0, padding))
    return _record(f"{kind}_pool1d", dataclasses.replace(y, values=y.values.squeeze(2)), x)


def _single(value) -> int:
    return value if isinstance(value, int) else value[0]


def amax(x, dim, keepdim=False):
    """The maximum over one dimension: a max-pool whose window is the whole of it."""
    check_input(x, "amax")
    dims = [_axis(x, d, "amax") for d in ([dim] if isinstance(dim, int) else dim)]
    if len(dims) != 1 or dims[0] == 0:
        raise NotImplementedError(f"amax in integers: one dimension, and not the rows' (0), got dim={dim}")
    axis = dims[0]
    before, n, after = x.shape[1:axis], x.shape[axis], x.shape[axis + 1 :]
    planes = x.values.reshape(x.shape[0], math.prod(before), n, math.prod(after))
    y = int8_pool2d(dataclasses.replace(x, values=planes), "max", (n, 1))
    shape = (x.shape[0], *before, *((1,) if keepdim else ()), *after)
    return _record("amax", dataclasses.replace(y, values=y.values.view(shape)), x)


def avg_pool2d(x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
    if ceil_mode or (padding not in (0, (0, 0)) and not count_include_pad) or divisor_override is not None:
        raise NotImplementedError(f"avg_pool2d in integers: {AVG_POOL}")
    y = int8_pool2d(x, "avg", kernel_size, stride, padding)
    return _record("avg_pool2d", y, x, kernel=kernel_size, stride=stride, padding=padding)


def _windows(x, output_size, dims: int, name: str) -> tuple[int, ...]:
    """The window of an adaptive pool over the last ``dims`` dimensions, where all of its windows are of one size."""
    size = (output_size,) * dims if isinstance(output_size, int) else tuple(output_size)
    size = tuple(n if s is None else s for s, n in zip(size, x.shape[-dims:], strict=True))
    if min(size) < 1:
        raise ValueError(f"{name}: the output must be at least {' by '.join('1' * dims)}, got {size}")
    if any(n % s for n, s in zip(x.shape[-dims:], size, strict=True)):
        raise NotImplementedError(
            f"{name} in integers: {tuple(x.shape[-dims:])} is no multiple of {size}, so windows would differ in size: "
            f"ask for a size that divides it, or use {name.removeprefix('adaptive_')}"
        )
    return tuple(n // s for n, s in zip(x.shape[-dims:], size, strict=True))


def adaptive_avg_pool2d(x, output_size):
    return avg_pool2d(x, _windows(x, output_size, 2, "adaptive_avg_pool2d"))


def adaptive_avg_pool1d(x, output_size):
    return avg_pool1d(x, _windows(x, output_size, 1, "adaptive_avg_pool1d"))


def adaptive_max_pool2d(x, output_size, return_indices=False):
    kernel = _windows(x, output_size, 2, "adaptive_max_pool2d")
    return max_pool2d(x, kernel, return_indices=return_indices)


def adaptive_max_pool1d(x, output_size, return_indices=False):
    kernel = _windows(x, output_size, 1, "adaptive_max_pool1d")
    return max_pool1d(x, kernel, return_indices=return_indices)


def reshape(x, shape):
    """The first dimension stays: rows belong to groups."""
    check_input(x, "reshape")
    values = x.values.reshape(shape)
    if values.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"reshape of an Int8Tensor keeps the first dimension: {tuple(x.shape)} to {tuple(values.shape)}"
        )
    return _record("reshape", Int8Tensor(values, x.exponent, x.memory, x.block, x.tape), x)


def flatten(x, start_dim: int = 0, end_dim: int = -1):
    start, end = (_axis(x, d, "flatten") for d in (start_dim, end_dim))
    if start == 0:
        raise ValueError("flatten of an Int8Tensor begins at dimension 1: rows belong to groups")
    if end < start:
        raise ValueError(
            f"flatten of an Int8Tensor {tuple(x.shape)}: start_dim {start_dim} is behind end_dim {end_dim}"
        )
    shape = x.shape
    return reshape(x, (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]))


def add(x, other, alpha=1):
    if alpha != 1:
        raise NotImplementedError(f"add in integers: alpha must be 1, got {alpha}")
    for part in (x, other):
        if not isinstance(part, Int8Tensor):
            what = getattr(part, "dtype", type(part).__name__)
            raise TypeError(
                f"addition in integers takes two Int8Tensors, got one and {what}: ezo_kernels.quantize makes one of a float "
                "tensor, and a bias belongs to a layer"
            )
    return _record("add", int8_add(x, other), x, other)


def dropout(x, p: float = 0.5, training: bool = True, inplace: bool = False):
    if training and p:
        raise NotImplementedError(f"dropout in integers: its rate must be 0, got {p}")
    return x


FUNCTIONS = {
    F.dropout: dropout,
    F.relu: relu,
    torch.relu: relu,
    torch.relu_: relu_,
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
    F.max_pool1d: max_pool1d,
    torch.max_pool1d: max_pool1d,
    torch.amax: amax,
    F.avg_pool2d: avg_pool2d,
    F.avg_pool1d: avg_pool1d,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    F.adaptive_avg_pool1d: adaptive_avg_pool1d,
    F.adaptive_max_pool2d: adaptive_max_pool2d,
    F.adaptive_max_pool1d: adaptive_max_pool1d,
    torch.flatten: flatten,
    torch.reshape: reshape,
    torch.add: add,
    torch.Tensor.add: add,
}

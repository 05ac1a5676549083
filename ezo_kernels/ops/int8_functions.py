"""What torch's functions do to an :class:`Int8Tensor`: those that have an integer form."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from .int8_pointwise import int8_add, int8_pool2d, int8_relu
from .int8_tensor import Int8Tensor

#: What the pools of torch can do and these cannot.
MAX_POOL = "no dilation, ceil_mode or return_indices"
AVG_POOL = "no ceil_mode or divisor_override, and padding counts (count_include_pad=True)"


def _record(kind: str, y: Int8Tensor, *inputs: Int8Tensor, **info) -> Int8Tensor:
    """Leave a note for the head's backward, where one is recorded."""
    if y.tape is not None:
        y.tape.note(kind, y, inputs, **info)
    return y


def relu(x, inplace: bool = False):
    return _record("relu", int8_relu(x), x)


def max_pool2d(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    if dilation not in (1, (1, 1), [1, 1]) or ceil_mode or return_indices:
        raise NotImplementedError(f"max_pool2d in integers: {MAX_POOL}")
    y = int8_pool2d(x, "max", kernel_size, stride, padding)
    return _record("max_pool2d", y, x, kernel=kernel_size, stride=stride, padding=padding)


def amax(x, dim, keepdim=False):
    """The maximum over one dimension: a max-pool whose window is the whole of it."""
    dims = [dim] if isinstance(dim, int) else list(dim)
    if len(dims) != 1 or dims[0] % x.dim() == 0:
        raise NotImplementedError(f"amax in integers: one dimension, and not the rows' (0), got dim={dim}")
    axis = dims[0] % x.dim()
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


def adaptive_avg_pool2d(x, output_size):
    size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    size = tuple(n if s is None else s for s, n in zip(size, x.shape[2:], strict=True))
    if min(size) < 1:
        raise ValueError(f"adaptive_avg_pool2d: the output must be at least 1 by 1, got {size}")
    if any(n % s for n, s in zip(x.shape[2:], size, strict=True)):
        raise NotImplementedError(
            f"adaptive_avg_pool2d in integers: {tuple(x.shape[2:])} is no multiple of {size}, so windows would differ in size: "
            "ask for a size that divides it, or use avg_pool2d"
        )
    kernel = tuple(n // s for n, s in zip(x.shape[2:], size, strict=True))
    return avg_pool2d(x, kernel)


def reshape(x, shape):
    """The first dimension stays: rows belong to groups."""
    values = x.values.reshape(shape)
    if values.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"reshape of an Int8Tensor keeps the first dimension: {tuple(x.shape)} to {tuple(values.shape)}"
        )
    return _record("reshape", Int8Tensor(values, x.exponent, x.memory, x.block, x.tape), x)


def flatten(x, start_dim: int = 0, end_dim: int = -1):
    start, end = (d % x.dim() for d in (start_dim, end_dim))
    if start == 0:
        raise ValueError("flatten of an Int8Tensor begins at dimension 1: rows belong to groups")
    shape = x.shape
    return reshape(x, (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]))


def add(a, b, alpha=1):
    if alpha != 1:
        raise NotImplementedError(f"add in integers: alpha must be 1, got {alpha}")
    return _record("add", int8_add(a, b), a, b)


def dropout(x, p: float = 0.5, training: bool = True, inplace: bool = False):
    if training and p:
        raise NotImplementedError(f"dropout in integers: its rate must be 0, got {p}")
    return x


FUNCTIONS = {
    F.dropout: dropout,
    F.relu: relu,
    torch.relu: relu,
    torch.relu_: relu,
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
    torch.amax: amax,
    F.avg_pool2d: avg_pool2d,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    torch.flatten: flatten,
    torch.reshape: reshape,
    torch.add: add,
}

"""Addresses of a strided tensor by logical row, tap and channel, for kernels.

    matrix: offset = sum_i index_i(row) stride_i + channel * channel_stride
    conv:   offset = row * row_stride + sum_i index_i(tap) stride_i + channel * channel_stride

Dimensions that lie behind one another in memory are collapsed, so that almost every tensor has one stride here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._triton import jit, tl

MOST_DIMS = 4


@dataclass(frozen=True)
class Address:
    """Strides of one tensor in elements.

    ``sizes`` and ``strides`` belong to the index of several dimensions (rows of a matrix, taps of a conv weight),
    outermost first and filled up to :data:`MOST_DIMS`; ``dims`` of them count.
    """

    dims: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    row: int
    channel: int

    def index_args(self, prefix: str = "") -> dict:
        """Run-time arguments of :func:`strided`, each name with ``prefix``."""
        values = {f"n{i}": n for i, n in enumerate(self.sizes) if i}
        values |= {f"s{i}": s for i, s in enumerate(self.strides)}
        return {prefix + name: value for name, value in values.items()}

    def args(self, prefix: str = "") -> dict:
        """Run-time arguments of :func:`offsets`, each name with ``prefix``."""
        return self.index_args(prefix) | {prefix + "row_stride": self.row, prefix + "channel_stride": self.channel}


def collapse(sizes, strides) -> tuple[list[int], list[int]]:
    """The same index with dimensions of one element dropped and neighbours in memory merged."""
    out: list[tuple[int, int]] = []
    for n, s in zip(sizes, strides, strict=True):
        if n == 1:
            continue
        if out and out[-1][1] == n * s:
            out[-1] = (out[-1][0] * n, s)
        else:
            out.append((n, s))
    return [n for n, _ in out] or [1], [s for _, s in out] or [0]


def address(tensor: torch.Tensor, layout: str) -> Address | None:
    """Where a tensor's rows, taps and channels lie; None if more than :data:`MOST_DIMS` dimensions do not collapse."""
    shape, strides = tensor.shape, tensor.stride()
    if layout == "conv":
        many, row, channel = (shape[2:], strides[2:]), strides[0], strides[1]
    elif not shape:
        many, row, channel = ((), ()), 0, 1
    else:
        many, row, channel = (shape[:-1], strides[:-1]), 0, strides[-1] if shape[-1] > 1 else 1
    sizes, steps = collapse(*many)
    dims = len(sizes)
    if dims > MOST_DIMS:
        return None
    fill = MOST_DIMS - dims
    return Address(dims, (1,) * fill + tuple(sizes), (0,) * fill + tuple(steps), row, channel)


@jit
def strided(index, n1, n2, n3, s0, s1, s2, s3, DIMS: tl.constexpr):
    """int64 offset of a flat index over up to four dimensions, the last DIMS of them real."""
    if DIMS == 1:
        offset = index.to(tl.int64) * s3
    else:
        offset = (index % n3).to(tl.int64) * s3
        index = index // n3
        if DIMS == 2:
            offset += index.to(tl.int64) * s2
        else:
            offset += (index % n2).to(tl.int64) * s2
            index = index // n2
            if DIMS == 3:
                offset += index.to(tl.int64) * s1
            else:
                offset += (index % n1).to(tl.int64) * s1
                offset += (index // n1).to(tl.int64) * s0
    return offset


@jit
def offsets(
    rows, taps, channels, n1, n2, n3, s0, s1, s2, s3, row_stride, channel_stride,
    DIMS: tl.constexpr, CONV: tl.constexpr,
):  # fmt: skip
    """int64 offsets [R, C] of rows [R, 1], taps [1, C] and channels [1, C]."""
    if CONV:
        offset = rows.to(tl.int64) * row_stride + strided(taps, n1, n2, n3, s0, s1, s2, s3, DIMS)
    else:
        offset = strided(rows, n1, n2, n3, s0, s1, s2, s3, DIMS)
    return offset + channels.to(tl.int64) * channel_stride

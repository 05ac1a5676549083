"""Logical rows and columns of a parameter (docs/rng.md, section Rows and columns)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

LAYOUTS = ("matrix", "conv")


def default_layout(shape) -> str:
    """The layout that a tensor of this shape has unless its layer says otherwise."""
    return "conv" if len(shape) >= 4 else "matrix"


@dataclass(frozen=True)
class Grid:
    """Rows and columns of one parameter for one noise segment.

    ``taps * padded`` columns a row; of each tap's ``padded`` columns the first ``channels`` are real.
    """

    rows: int
    taps: int
    channels: int
    padded: int

    @property
    def columns(self) -> int:
        return self.taps * self.padded

    def array(self, tensor: torch.Tensor):
        """A contiguous CPU parameter as a numpy array [rows, taps, channels] over the same memory."""
        flat = (tensor.detach() if tensor.requires_grad else tensor).numpy()
        if self.taps == 1:
            return flat.reshape(self.rows, 1, self.channels)
        return flat.reshape(self.rows, self.channels, self.taps).transpose(0, 2, 1)

    def view(self, buffer: torch.Tensor, shape) -> torch.Tensor:
        """``buffer`` [rows, columns] seen in the parameter's own shape."""
        z = buffer.view(self.rows, self.taps, self.padded)[:, :, : self.channels]
        if self.taps == 1:
            return z.reshape(shape) if len(shape) != 2 else z[:, 0, :]
        return z.transpose(1, 2).reshape(shape)


@functools.lru_cache(maxsize=4096)
def grid(shape, layout: str, segment: int) -> Grid:
    """Rows and columns of a parameter of ``shape``; ``segment`` pads the channels of a conv tap, or the row's end."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if layout == "conv":
        if len(shape) < 2:
            raise ValueError(f"layout 'conv' needs a weight [O, I/g, *kernel], got shape {tuple(shape)}")
        rows, taps, channels = shape[0], math.prod(shape[2:]), shape[1]
    elif len(shape) == 0:
        rows, taps, channels = 1, 1, 1
    else:
        rows, taps, channels = math.prod(shape[:-1]), 1, shape[-1]
    return Grid(rows, taps, channels, -(-channels // segment) * segment)


def pointer(t: torch.Tensor) -> int:
    """Where a tensor's memory is; 0 of a fake one, which has none and warns if it is asked."""
    return 0 if isinstance(t, torch._subclasses.FakeTensor) else t.data_ptr()

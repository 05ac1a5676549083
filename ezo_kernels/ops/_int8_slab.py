"""Which way perturbed int8 weights reach a product on a GPU: a pure function of shape and signs, never measured.

| way | what it does |
|---|---|
| ``fused`` | clamp(W + z) and clamp(W - z) are formed in the tile that multiplies; any shape, no memory |
| ``slab`` | they go to memory, of some outputs at a time, then through plain int8 products; for many rows |

Both give the same integers, so a choice changes no bit, and a CPU, which writes perturbed weights in any case, takes either
name. The numbers are predicted from instruction counts; no GPU has measured them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from ._tiles import LARGE, SLAB_BYTES, LinearTile

WAYS = ("auto", "fused", "slab")
#: Rows of a group that a slab is worth its memory for: the fused kernels make z once for every 128 of them.
SLAB_LEAST_ROWS = 192
#: Values of z that a GPU makes in the time of the launch that the slab costs.
SLAB_LEAST_NOISE = 1 << 22


@dataclass(frozen=True)
class Way:
    """What was chosen.

    Args:
        name: ``fused`` or ``slab``.
        workspace_bytes: memory for perturbed weights that it takes, if there is as much.
    """

    name: str
    workspace_bytes: int = 0


def check_way(way: str) -> str:
    if way not in WAYS:
        raise ValueError(f"weights must be one of {', '.join(WAYS)}, got {way!r}")
    return way


def pitch_of(columns: int) -> int:
    """Bytes from one row of a slab to the next: vector loads begin at multiples of 16."""
    return -(-columns // 16) * 16


def slabs_of(outputs: int, most: int) -> list[tuple[int, int]]:
    """(first output, outputs) of each slab of at most ``most``; their heights are multiples of 128 but for the last."""
    height = outputs if most >= outputs else max(most // 128 * 128, min(most, 128))
    return [(first, min(height, outputs - first)) for first in range(0, outputs, height)]


def choose(rows: int, outputs: int, columns: int, signs: tuple[int, ...], *, conv: bool, asked: str = "auto") -> Way:
    """The way of one layer.

    Args:
        rows: of one group, never of the stacked batch; of a convolution its output positions.
        outputs, columns: of the weight, every dimension but the first one counted as columns.
        signs: of the pass; (0,) is never anything but ``fused``.
        conv: a convolution is one slab; a linear layer has slabs of at most 32 MB.
        asked: a way by name, or ``auto``.

    Raises:
        ValueError: an unknown name.
    """
    check_way(asked)
    if tuple(signs) == (0,) or asked == "fused" or not rows * outputs * columns:
        return Way("fused")
    again = outputs * columns * (rows - 128) // 128  # values of z that the fused kernel makes more than once
    if asked == "auto" and (rows < SLAB_LEAST_ROWS or again < SLAB_LEAST_NOISE or (not conv and columns % 16)):
        return Way("fused")
    row = len(signs) * pitch_of(columns)
    most = outputs if conv else min(outputs, max(SLAB_BYTES // row, 1))
    return Way("slab", row * (outputs if conv else max(height for _, height in slabs_of(outputs, most))))


def reserve(way: Way, x: torch.Tensor, least: int, name: str) -> torch.Tensor | None:
    """The memory of a slab, flat int8; half of it and so on where there is too little, and None below ``least`` bytes."""
    size = way.workspace_bytes
    while size >= least:
        try:
            return torch.empty(size, dtype=torch.int8, device=x.device)
        except torch.OutOfMemoryError:
            warnings.warn(f"{name}: no memory for {size} bytes of perturbed weights; less is tried", RuntimeWarning, 3)
            size //= 2
    return None


def int8_plain_tile(rows: int, k: int, aligned: bool, arch: int) -> LinearTile:
    """Tile of an integer product of weights that were perturbed ahead, ``rows`` rows a group and ``k`` inputs.

    Args:
        aligned: rows of x begin and end at multiples of 16 bytes.
        arch: compute capability.
    """
    if not aligned:  # what is read in single bytes needs registers for each
        return LinearTile(64, 64, 32, 8, 1, False)
    bm = 128 if rows > 64 else 64
    if arch in LARGE:
        return LinearTile(bm, 128, 128 if k >= 512 else 64, 8, 3, False)
    return LinearTile(bm, 64, 64, 4, 3, False)

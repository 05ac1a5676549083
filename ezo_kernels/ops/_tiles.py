"""Tiles of the kernels: pure functions of (rows per group, N, K, dtype, noise, architecture), frozen, never measured.

Neither the number of groups nor the stacked rows enter, so that both signs of a pass, and a pass made one group at a
time, run with the same tiles: that is what makes eps = 0 give equal losses bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ElementTile:
    """Tile of a kernel that goes over a parameter once: rows by logical columns."""

    rows: int
    columns: int
    warps: int = 4


def element_tile(rows: int, noise: str) -> ElementTile:
    """Tile of the kernels that write z or perturbed copies of a parameter with ``rows`` logical rows."""
    if noise == "hadamard":
        # its mix is a matrix product with 32 columns of work a z for every 32 columns of tile: narrow and tall is cheap
        return ElementTile(16, 64) if rows <= 16 else ElementTile(64, 64)
    if rows <= 4:
        return ElementTile(1, 1024)
    return ElementTile(16, 256)


def update_tile(noise: str) -> ElementTile:
    """Tile of the update: one for all parameters of a launch."""
    return ElementTile(64, 64) if noise == "hadamard" else ElementTile(16, 256)


@dataclass(frozen=True)
class LinearTile:
    """Tile of the perturbed matmuls: BM rows of one group by BN outputs, BK inputs at a time."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    swap: bool


def linear_tile(rows, n, k, dtype, noise, precision, transposed, arch) -> LinearTile:
    return LinearTile(16, 64, 32, 4, 3, True)

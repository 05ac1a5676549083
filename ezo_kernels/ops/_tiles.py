"""Tiles of the kernels: pure functions of (rows per group, N, K, dtype, noise, architecture), frozen, never measured.

Neither the number of groups nor the stacked rows enter, so that both signs of a pass, and a pass made one group at a
time, run with the same tiles: that is what makes eps = 0 give equal losses bit for bit.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

#: Architectures with 227 KB of shared memory a block, and a matrix instruction of 64 rows and more.
LARGE = frozenset((90, 100))


@dataclass(frozen=True)
class ElementTile:
    """Tile of a kernel that goes over a parameter once: rows by logical columns."""

    rows: int
    columns: int
    warps: int = 4


def one_program(count: int) -> tuple[int, int]:
    """(values, warps) of a kernel whose only program takes ``count`` values."""
    block = max(32, 1 << (count - 1).bit_length())
    return block, min(8, max(1, block // 256))


def element_tile(rows: int, noise: str, scattered: bool = False) -> ElementTile:
    """Tile of the kernels that write z or perturbed copies of a parameter with ``rows`` logical rows.

    Args:
        scattered: two tensors are addressed an element at a time: fewer a thread, whose addresses are registers.
    """
    if noise == "hadamard":
        # its mix is a matrix product with 32 columns of work a z for every 32 columns of tile: narrow and tall is cheap
        return ElementTile(16, 64) if rows <= 16 else ElementTile(32 if scattered else 64, 64)
    if rows <= 4:
        return ElementTile(1, 1024)
    return ElementTile(4 if scattered else 16, 256)


def update_tile(noise: str) -> ElementTile:
    """Tile of the update: one for all parameters of a launch. No bit depends on it."""
    rows = 1 if _registers_are_few() else 2
    if noise == "hadamard":
        return ElementTile(32 * rows, 64)
    # the exact Gaussian holds twice the registers of the others; int8 keeps a sum, its rounding words and byte addresses
    return ElementTile(8 if noise in ("gaussian", "sparse", "sparse_int8") else 8 * rows, 256)


@functools.cache
def _registers_are_few() -> bool:
    """Whether this triton is one before 3.7, whose updates take twice the instructions: 16 rows spill 600 bytes and more."""
    from ._triton import triton  # which the package itself does not import

    found = re.match(r"(\d+)\.(\d+)", getattr(triton, "__version__", ""))
    return found is not None and tuple(map(int, found.groups())) < (3, 7)


@dataclass(frozen=True)
class LinearTile:
    """Tile of the perturbed matmuls: BM rows of one group by BN outputs, BK inputs at a time."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    swap: bool


def linear_tile(
    rows: int, n: int, k: int, dtype: torch.dtype, noise: str, precision: str, transposed: bool, arch: int,
    regular: bool = True, mixed: bool = False,
) -> LinearTile:  # fmt: skip
    """Tile of a perturbed linear layer of ``rows`` rows a group, ``n`` outputs and ``k`` inputs.

    Args:
        dtype: of x. precision: ``ieee`` or ``tf32``, of fp32.
        arch: compute capability, 90 for an H100.
        regular: rows of x and of W are contiguous, and begin at multiples of 8 elements.
        mixed: W is of fp32, x of 16 bits.
    """
    dear = noise in ("gaussian", "sparse")  # many live registers a z
    few = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if dtype == torch.float32 and precision == "ieee":
        # no tensor core: the operands of every fma are registers, and W's rows are what a thread can hold
        # (hadamard's of few rows spill on sm_120 with loads ahead)
        return LinearTile(few, 32, 32, 4 if few == 16 else 8, 1 if noise == "hadamard" and few == 16 else 2, True)
    if rows <= 64:
        # W's bytes or its noise decide: many programs rather than wide ones, until the GPU is full of them
        # (hadamard always wide: its mix fills the tensor core from 64 rows)
        bn = 64 if n >= 8192 or noise == "hadamard" else 32
        # otherwise each element's address is in registers, too
        tight = ((dear or not regular) and few > 16) or (noise == "hadamard" and few > 32)
        bk = 32 if transposed or dtype == torch.float32 or tight else 64
        return LinearTile(few, bn, bk, 4, 3, True)
    if not regular:
        return LinearTile(64, 64, 32, 8, 2, False)
    if arch in LARGE:
        wide = dtype != torch.float32 and not transposed
        # outputs that are stored one by one need registers for their addresses, a wide W for its elements
        tight = noise in ("sparse", "hadamard") or n % 16 or (mixed and noise in ("clt4", "gaussian_fast"))
        bk = 64 if wide and not tight else 32
        return LinearTile(128, 128 if wide else 64, bk, 8, 2, False)
    return LinearTile(64, 64, 32, 4, 2, False)


#: Most bytes of a slab: what two signs of some outputs take and an L2 of 50 MB holds beside x.
SLAB_BYTES = 32 << 20
#: Rows of slabs are a multiple of these where there are as many.
SLAB_ROWS = 32


@functools.lru_cache(maxsize=4096)
def slab_plan(n: int, k: int, size: int, most: int | None = None) -> tuple[tuple[int, int, int], ...]:
    """Slabs of a weight [n, k], ``size`` bytes an element: (first row, rows, how many behind one another: 2, or a last 1).

    Two perturbed copies of a slab take :data:`SLAB_BYTES` at most, where that holds :data:`SLAB_ROWS` rows. ``most``: rows of a
    slab, instead.
    """
    most = most or max(SLAB_BYTES // max(2 * k * size, 1) // SLAB_ROWS, 1) * SLAB_ROWS
    plan, first = [], 0
    while n - first > 1:
        rest = n - first
        rows = rest // (2 * -(-rest // (2 * most)))
        rows -= rows % SLAB_ROWS if rows > SLAB_ROWS else 0
        plan.append((first, rows, 2))
        first += 2 * rows
    return (*plan, *[(first, 1, 1)] * (n - first))


def slab_bytes(plan: tuple[tuple[int, int, int], ...], k: int, size: int) -> int:
    """Bytes of two copies of the largest slab, each rounded up to 64."""
    return 2 * max(-(-rows * k * size // 64) * 64 for _, rows, _ in plan)


@dataclass(frozen=True)
class ConvSlabs:
    """Slabs of a conv weight [O, K], K = I/g R S: (first output, outputs, conv groups) of each, in order.

    A slab is some whole conv groups, or some outputs of one.
    """

    slabs: tuple[tuple[int, int, int], ...]
    columns: int
    size: int

    @property
    def rows(self) -> int:
        """Outputs of the largest slab."""
        return max(rows for _, rows, _ in self.slabs)

    def bytes_of(self, signs: int) -> int:
        """Bytes of as many copies of the largest slab, each rounded up to 64."""
        return signs * (-(-self.rows * self.columns * self.size // 64) * 64)


@functools.lru_cache(maxsize=4096)
def conv_slab_plan(outputs: int, columns: int, groups: int, size: int, most: int | None = None) -> ConvSlabs:
    """Slabs of a conv weight of ``outputs`` rows of ``columns`` elements of ``size`` bytes, in ``groups`` conv groups.

    Two copies of a slab take :data:`SLAB_BYTES` at most (or are of one output), whatever the signs of the pass: a sign alone is
    cut as the pair is. ``most``: outputs of a slab, instead.
    """
    most = most or max(SLAB_BYTES // max(2 * columns * size, 1), 1)
    own = outputs // groups
    if own <= most:
        many = -(-groups // -(-groups // (most // own)))  # conv groups a slab, evenly
        slabs = [(g * own, min(many, groups - g) * own, min(many, groups - g)) for g in range(0, groups, many)]
        return ConvSlabs(tuple(slabs), columns, size)
    rows = -(-own // -(-own // most))
    rows = min(-(-rows // SLAB_ROWS) * SLAB_ROWS, most)
    slabs = [(g + at, min(rows, own - at), 1) for g in range(0, outputs, own) for at in range(0, own, rows)]
    return ConvSlabs(tuple(slabs), columns, size)


@dataclass(frozen=True)
class SmallTile:
    """Tile of the two-product matmul: HALF rows of each group by BN outputs, BK inputs at a time."""

    half: int
    bn: int
    bk: int
    warps: int
    stages: int


def small_tile(rows: int, dtype: torch.dtype, noise: str, regular: bool, arch: int) -> SmallTile:
    """Tile of a perturbed linear layer of ``rows`` rows a group made as two products; any number of rows works.

    Args:
        dtype: of x. arch: compute capability, 90 for an H100.
        regular: rows of x and of W are contiguous, and begin at multiples of 8 elements.
    """
    if not regular:
        # an address an element, in registers
        return SmallTile(16, 32, 32, 4, 2)
    half = 16 if rows <= 16 else 32 if rows <= 32 or arch not in LARGE else 64
    if dtype == torch.float32:
        return SmallTile(half, 32, 32, 8, 2)
    if arch not in LARGE:
        # accumulators and z live in the same registers: a wider half would spill, or make z once in each warp
        return SmallTile(half, 64, 32 if noise == "sparse" or (noise == "gaussian" and half > 16) else 64, 4, 3)
    if half == 64 and noise in ("hadamard", "rademacher"):
        # cheap z: the addresses of x's tile cost as much, so more of W goes by for each of them
        return SmallTile(half, 128, 64, 8, 3) if noise == "hadamard" else SmallTile(half, 128, 128, 8, 2)
    return SmallTile(half, 64, 32 if noise == "sparse" else 64, 4, 4)


#: Multiprocessors of the largest GPU of an architecture.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
#: Values of z, of 17 instructions, that one program makes in the time of the launch that adds parts up, and half as much again.
SPLIT_LEAST_NOISE = 40_960


def small_parts(tile: SmallTile, rows: int, n: int, k: int, arch: int) -> tuple[int, int]:
    """(parts, steps of BK in each) that K is cut into, so that a layer of few outputs fills the GPU.

    Two programs a multiprocessor is what registers leave room for. A function of one group's rows as all of the tile is: groups
    are summed alike.
    """
    return _parts(-(-rows // tile.half) * -(-n // tile.bn), -(-k // tile.bk), tile.bn * tile.bk, 2, arch)


def linear_parts(tile: LinearTile, rows: int, n: int, k: int, ieee: bool, arch: int) -> tuple[int, int]:
    """The same of the fused kernel, whose programs have eight warps a multiprocessor.

    Args:
        ieee: fp32 without a tensor core, where a z costs 56 instructions and a multiply-add for each row of both signs
            (``bench/results/static_sm90.json``), several times of what it costs elsewhere.
    """
    programs, each = -(-rows // tile.bm) * -(-n // tile.bn), 8 // tile.warps
    noise = tile.bn * tile.bk * (2 * tile.bm + 56 if ieee else 25) // 17  # in z of SPLIT_LEAST_NOISE
    return _parts(programs, -(-k // tile.bk), noise, each, arch, shortest=2 if ieee else 4)


def int8_parts(tile: LinearTile, rows: int, n: int, k: int, repeats: int, arch: int) -> tuple[int, int]:
    """The same of an integer product whose accumulators go to memory: eight warps a multiprocessor.

    Integers add up alike in any parts, so ``repeats``, the queries of a launch, count.
    """
    return _parts(
        repeats * -(-rows // tile.bm) * -(-n // tile.bn), -(-k // tile.bk), tile.bn * tile.bk, 8 // tile.warps, arch
    )


def _parts(programs: int, steps: int, noise: int, each: int, arch: int, shortest: int = 4) -> tuple[int, int]:
    """``programs`` of ``steps`` steps, of so many z each, cut until there are ``each`` a multiprocessor.

    No part is shorter than ``shortest`` steps, but for the last.
    """
    known = max((a for a in MULTIPROCESSORS if a <= arch), default=min(MULTIPROCESSORS))
    parts = min(each * MULTIPROCESSORS[known] // max(programs, 1), steps // shortest, 8)
    if steps > (1 << 24) - 8:  # the end of the last part would be no int32
        parts = 1
    if parts < 2 or (steps - -(-steps // parts)) * noise < SPLIT_LEAST_NOISE:
        return 1, steps
    own = -(-steps // parts)
    return -(-steps // own), own


@dataclass(frozen=True)
class SpecializedTile:
    """Tile of the warp-specialised matmul: BM rows of each group by BN outputs, BK inputs at a time.

    Args:
        chunk: rows of W whose z are in registers at a time.
        stages, x_stages, w_stages: buffers of perturbed tiles (of each sign), of x (of each group) and of W.
        warps, registers: that make z; ``other_registers``: of the four warps that multiply by the weights of -eps. Those of
            +eps get what is left of 96 for each of the 20 warps with which a program starts: 168, as the 4 that load take 24.
    """

    bm: int
    bn: int
    chunk: int
    stages: int
    x_stages: int
    w_stages: int
    bk: int = 64
    warps: int = 8
    registers: int = 64
    other_registers: int = 160


def specialized_tile(rows: int, noise: str) -> SpecializedTile:
    """Tile of a perturbed linear layer of ``rows`` rows a group on sm_90, in 16 bits; any number of rows works."""
    if noise == "sparse" or (noise == "gaussian" and rows > 128):
        # dear: twice the rows for each z, at the price of more of x from L2 for each product
        return SpecializedTile(256, 64, 32, 3, 2, 4)
    # a thread makes 16 or 32 columns of these: with fewer rows at a time, warps would make the same ones
    return SpecializedTile(128, 128, {"rademacher": 64, "hadamard": 128}.get(noise, 32), 2, 3, 4)


def int8_tile(rows: int, n: int, k: int, aligned: bool, arch: int) -> LinearTile:
    """Tile of an integer product of ``rows`` rows a group, ``n`` outputs and ``k`` inputs.

    Args:
        aligned: rows of both operands are contiguous, and begin and end at multiples of 16 bytes.
        arch: compute capability.
    """
    # 32 is the least that an integer matrix instruction takes; what is read in single bytes needs registers for each
    bk = 64 if aligned and k > 32 else 32
    stages = 2 if aligned else 1
    if rows <= 64:
        # as in the float layer: W's bytes or its noise decide
        few = 16 if rows <= 16 else 32 if rows <= 32 else 64
        bk, stages = (128 if aligned and k >= 512 else bk), 3 if aligned else 1
        # 32 outputs are two matrix instructions high: four warps would do each twice, unless rows of x, or 64 of them
        # for wgmma, are on the long side
        wide, wgmma = n >= 8192, aligned and arch == 90
        if wide and (wgmma or few < 64):  # 64 rows of both signs would spill elsewhere
            return LinearTile(few, 64, bk, 8 if wgmma else 4, stages, True)
        if wgmma and few > 16:
            return LinearTile(64, 32, bk, 4, stages, False)
        return LinearTile(few, 32, bk, 4, stages, few > 16)
    if arch in LARGE and (aligned or arch == 90):
        return LinearTile(128, 64, bk, 8, stages, False)
    return LinearTile(64, 64, bk, 4 if aligned else 8, stages, False)

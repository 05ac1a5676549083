"""Integer updates on the GPU: w <- clamp(w - round(sum_q g_q z_q / 2^shift)), one launch over all parameters.

A weight whose sum is zero keeps its bits, those of -128 too.

| tensor | shape |
|---|---|
| params | int8, contiguous, any shapes |
| g, shift | int32 [queries], [1], on the device |
| step | int64 [1], or nothing: the first program counts one more |
| table | int64, on the device: FIELDS numbers a parameter, then (parameter << 32 | tile) for each program |
"""

from __future__ import annotations

import numpy as np
import torch

from . import _constants as C
from ._int8_pointwise_triton import _variant
from ._int8_triton import STOCHASTIC, clamp8, divide, magic, round_shift
from ._layout import grid, pointer
from ._noise_triton import ASM, lane_units, load_key, noise_args, signed32, sparse_int8_units
from ._tiles import update_tile
from ._triton import constexpr, jit, require, tl
from .int8_pass import ROUNDINGS
from .noise import Noise

_S_ROUNDING = constexpr(C.STREAM_ROUNDING)
#: Numbers of one parameter in the table: address, site, whether fast, rows, columns, channels, padded, taps, tiles
#: across, multiplier and shift of the division by padded, and by tiles across.
FIELDS = 13
_FIELDS = constexpr(FIELDS)


@jit
def _place(entry_ptr, rows, columns):
    """Offsets [R, C] of a tile in a contiguous parameter [rows, channels, taps], and the channels."""
    channels, padded = tl.load(entry_ptr + 5), tl.load(entry_ptr + 6).to(tl.int32)
    taps = tl.load(entry_ptr + 7)
    tap = divide(columns, tl.load(entry_ptr + 9).to(tl.int32), tl.load(entry_ptr + 10))
    channel = columns - tap * padded
    return rows.to(tl.int64) * (channels * taps) + (channel.to(tl.int64) * taps + tap), channel


@jit(do_not_specialize=["count", "queries", "query", "packed"])
def int8_update_kernel(
    table_ptr, key_ptr, g_ptr, shift_ptr, step_ptr, count, queries, query, packed,
    ROUNDING: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ROUNDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of one parameter, read and written once whatever the number of queries."""
    if step_ptr is not None:  # noqa: SIM102 - the outer if is the compiler's
        if tl.program_id(0) == 0:
            tl.store(step_ptr, tl.load(step_ptr) + 1)
    work = tl.load(table_ptr + count.to(tl.int64) * _FIELDS + tl.program_id(0))
    entry_ptr = table_ptr + (work >> 32) * _FIELDS
    tile = (work & 0x7FFFFFFF).to(tl.int32)
    base = tl.load(entry_ptr).to(tl.pointer_type(tl.int8))
    site = tl.load(entry_ptr + 1).to(tl.int32)
    fast = tl.load(entry_ptr + 2) != 0
    rows, columns = tl.load(entry_ptr + 3).to(tl.int32), tl.load(entry_ptr + 4).to(tl.int32)
    channels = tl.load(entry_ptr + 5)
    across = tl.load(entry_ptr + 8).to(tl.int32)
    down = divide(tile, tl.load(entry_ptr + 11).to(tl.int32), tl.load(entry_ptr + 12))
    first = (tile - down * across) * C
    r = (down * R + tl.arange(0, R))[:, None]
    c = (first + tl.arange(0, C))[None, :]
    k0, k1 = load_key(key_ptr)
    counter_rows = r.to(tl.uint32)
    units = (first + tl.arange(0, C // 4) * 4)[None, :].to(tl.uint32)
    total = tl.zeros((R, C), tl.int32)
    touched = 0
    for q in range(queries):
        g = tl.load(g_ptr + q)
        # a sum of zero leaves every bit alone, those of -128 too
        if g != 0:
            total += sparse_int8_units(k0, k1, site, query + q, counter_rows, units, ROUNDS, ASM, packed) * g
            touched = 1
    if touched != 0:
        lanes = total
        if ROUNDING == STOCHASTIC:
            blocks = (first + tl.arange(0, C // 8) * 8)[None, :].to(tl.uint32)
            # its stream is the same for every query
            stream = (query * 0 + _S_ROUNDING).to(tl.uint32)
            lanes = lane_units(k0, k1, site, stream, counter_rows, blocks, ROUNDS, ASM)
        step = round_shift(total, tl.minimum(tl.load(shift_ptr), 31), lanes, ROUNDING)
        if fast:
            # rows of multiples of 16 bytes at multiples of 16: wide accesses
            wide = tl.multiple_of(channels, 16)
            at = tl.multiple_of(base, 16) + (r.to(tl.int64) * wide + c)
            inside = (r < rows) & (c < wide)
            w = tl.load(at, mask=inside, other=0).to(tl.int32)
            tl.store(at, tl.where(total != 0, clamp8(w - step), w).to(tl.int8), mask=inside)
        else:
            offset, channel = _place(entry_ptr, r, c)
            inside = (r < rows) & (c < columns) & (channel < channels)
            w = tl.load(base + offset, mask=inside, other=0).to(tl.int32)
            tl.store(base + offset, tl.where(total != 0, clamp8(w - step), w).to(tl.int8), mask=inside)


# ---------------------------------------------------------------------------------------------------------- launchers


def update_table(params, sites, layouts) -> torch.Tensor:
    """The device table of :func:`launch_update`; valid while the parameters stay where they are.

    Args:
        params: int8 tensors of one device, contiguous.
        sites, layouts: of each.

    Returns:
        int64, on the parameters' device.

    Raises:
        NotImplementedError: a parameter of more than 2^31 rows or columns.
    """
    tile = update_tile("sparse_int8")
    entries = np.zeros((len(params), FIELDS), np.int64)
    work = []
    for i, (w, site, layout) in enumerate(zip(params, sites, layouts, strict=True)):
        if not w.numel():
            continue
        where = grid(w.shape, layout, 4)
        across = -(-where.columns // tile.columns)
        tiles = -(-where.rows // tile.rows) * across
        if max(where.rows + tile.rows, where.columns + tile.columns, tiles) >= 1 << 31:
            raise NotImplementedError(f"int8_update_: shape {tuple(w.shape)}: 2^31 rows or columns is the limit")
        fast = where.taps == 1 and pointer(w) % 16 == 0 and where.channels % 16 == 0
        entries[i] = [
            pointer(w), signed32(site), fast, where.rows, where.columns, where.channels, where.padded, where.taps,
            across, *magic(where.padded), *magic(across),
        ]  # fmt: skip
        work.append(np.arange(tiles, dtype=np.int64) + (i << 32))
    table = np.concatenate([entries.ravel(), *work])
    return torch.from_numpy(table).to(params[0].device)


def launch_update(params, key, g, shift, table, sites, layouts, query, rounding, rounds, p_zero, r_max, step) -> None:
    """Update every parameter, in place, in one launch; arguments as ``ezo::int8_update_``."""
    require()
    programs = table.numel() - len(params) * FIELDS
    if programs <= 0:
        if step is not None:  # parameters without an element
            step += 1
        return
    tile = update_tile("sparse_int8")
    packed = noise_args(Noise("sparse_int8", rounds, p_zero, r_max))[0]
    with torch.cuda.device_of(table):
        int8_update_kernel[(programs,)](
            table, key, g, shift, step, len(params), g.numel(), query, packed, ROUNDING=ROUNDINGS.index(rounding),
            R=tile.rows, C=tile.columns, ROUNDS=rounds, ASM=ASM, num_warps=tile.warps, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def variants():
    """For the static report and the compile tests; the fast path and the general one are both in an update."""
    require()
    kinds = dict.fromkeys
    for mode, rounding in enumerate(ROUNDINGS):
        tile = update_tile("sparse_int8")
        noise = {"ROUNDS": 7, "ASM": True}
        yield _variant(
            int8_update_kernel, f"int8_update/{rounding}",
            {**kinds(("table_ptr", "step_ptr"), "i64"), **kinds(("key_ptr", "g_ptr", "shift_ptr"), "i32")},
            ("count", "queries", "query", "packed"), {"ROUNDING": mode, "R": tile.rows, "C": tile.columns, **noise},
            expects=("multiply",), z_per_program=tile.rows * tile.columns, representative=rounding != "pseudo",
        )  # fmt: skip

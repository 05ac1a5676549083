"""Integer updates on the GPU: w <- clamp(w - round(sum_q g_q z_q / 2^shift)), one launch over all parameters; the head's.

A weight whose sum is zero keeps its bits, those of -128 too.

| tensor | shape |
|---|---|
| params | int8, contiguous, any shapes |
| remainder | int8, of a head's parameter: 1/256 of its unit each |
| g, shift | int32 [queries], [1], on the device |
| table | int64, on the device: FIELDS numbers a parameter, then (parameter << 32 | tile) for each program |
| acc, out, peak | int32 [groups, size], [size], [1]: the head's gradients, their sum, its largest magnitude |
"""

from __future__ import annotations

import numpy as np
import torch

from . import _constants as C
from ._int8_pointwise_triton import _variant, rounding_lanes
from ._int8_triton import STOCHASTIC, bit_length, check_grid, clamp8, divide, magic, raise_peak, round_shift
from ._layout import grid, pointer
from ._noise_triton import ASM, lane_units, load_key, noise_args, signed32, sparse_int8_units
from ._tiles import element_tile, update_tile
from ._triton import constexpr, jit, require, tl
from .int8_pass import ROUNDINGS
from .int8_update import REMAINDER_BITS
from .noise import Noise

_S_ROUNDING = constexpr(C.STREAM_ROUNDING)
#: Numbers of one parameter in the table: address, site, whether fast, rows, columns, channels, padded, taps, tiles
#: across, multiplier and shift of the division by padded, and by tiles across.
FIELDS = 13
_FIELDS = constexpr(FIELDS)
_BLOCK, _WARPS = 1024, 4


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
    table_ptr, key_ptr, g_ptr, shift_ptr, count, queries, query, packed,
    ROUNDING: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ROUNDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of one parameter, read and written once whatever the number of queries."""
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


@jit(do_not_specialize=["groups"])
def int8_sum_groups_kernel(acc_ptr, exponent_ptr, out_ptr, peak_ptr, groups, size, BLOCK: tl.constexpr):
    """sum_g acc[g] 2^(exponent[g] - the largest), each rounded to nearest."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    most = tl.load(exponent_ptr)
    for g in range(1, groups):
        most = tl.maximum(most, tl.load(exponent_ptr + g))
    total = tl.zeros((BLOCK,), tl.int32)
    for g in range(groups):
        # 64 bits: shifts are of any length, and the magnitude of -2^31 is no int32
        part = tl.load(acc_ptr + (tl.cast(g, tl.int64) * size + at), mask=inside, other=0).to(tl.int64)
        n = tl.minimum(most - tl.load(exponent_ptr + g), 62)
        total += round_shift(part, n, part, 0).to(tl.int32)
    tl.store(out_ptr + at, total, mask=inside)
    raise_peak(peak_ptr, tl.where(inside, tl.abs(total), 0))


@jit(do_not_specialize=["site"])
def int8_head_update_kernel(
    w_ptr, remainder_ptr, grad_ptr, peak_ptr, bits_ptr, key_ptr, site, rows, columns,
    REMAINDER: tl.constexpr, ROUNDING: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ROUNDS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """w <- clamp(w - round(grad / 2^max(0, bits of peak - bits))); nothing if the peak is zero.

    With a remainder of REMAINDER bits, 2^REMAINDER w + remainder so, in its own unit.
    """
    first = tl.program_id(1) * C
    r = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    c = (first + tl.arange(0, C))[None, :]
    at = r.to(tl.int64) * columns + c
    inside = (r < rows) & (c < columns)
    peak = tl.load(peak_ptr)
    if peak != 0:
        # 64 bits: the shift may pass 31
        grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.int64)
        n = tl.minimum(tl.maximum(bit_length(peak) - tl.load(bits_ptr), 0), 62)
        lanes = grad
        if ROUNDING == STOCHASTIC:
            lanes = rounding_lanes(key_ptr, site, site * 0, r, first, C, ROUNDS, ASM)
        w = tl.load(w_ptr + at, mask=inside, other=0).to(tl.int64)
        if REMAINDER == 0:
            moved = clamp8(w - round_shift(grad, n, lanes, ROUNDING))
        else:
            rest = tl.load(remainder_ptr + at, mask=inside, other=0).to(tl.int64)
            down, up = tl.maximum(n - REMAINDER, 0), tl.maximum(REMAINDER - n, 0)
            fine = (w << REMAINDER) + rest - (round_shift(grad, down, lanes, ROUNDING) << up)
            most = 127 << REMAINDER
            fine = tl.minimum(tl.maximum(fine, -most), most)
            moved = (fine + (1 << (REMAINDER - 1))) >> REMAINDER
            tl.store(
                remainder_ptr + at, tl.where(grad != 0, fine - (moved << REMAINDER), rest).to(tl.int8), mask=inside
            )
        tl.store(w_ptr + at, tl.where(grad != 0, moved, w).to(tl.int8), mask=inside)


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


def launch_update(params, key, g, shift, table, sites, layouts, query, rounding, rounds, p_zero, r_max) -> None:
    """Update every parameter, in place, in one launch; arguments as ``ezo::int8_update_``."""
    require()
    programs = table.numel() - len(params) * FIELDS
    if programs <= 0:
        return
    tile = update_tile("sparse_int8")
    packed = noise_args(Noise("sparse_int8", rounds, p_zero, r_max))[0]
    with torch.cuda.device_of(table):
        int8_update_kernel[(programs,)](
            table, key, g, shift, len(params), g.numel(), query, packed, ROUNDING=ROUNDINGS.index(rounding),
            R=tile.rows, C=tile.columns, ROUNDS=rounds, ASM=ASM, num_warps=tile.warps, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip


def launch_sum_groups(acc, exponent, out, peak) -> None:
    """Write the sum over groups, and raise ``peak``, zero at first, to its largest magnitude."""
    require()
    with torch.cuda.device_of(acc):
        int8_sum_groups_kernel[(-(-out.numel() // _BLOCK),)](
            acc, exponent, out, peak, exponent.numel(), out.numel(), BLOCK=_BLOCK, num_warps=_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip


def launch_head_update(w, remainder, grad, peak, bits, key, site, rounding, rounds) -> None:
    """Update one parameter of the head, in place; arguments as ``ezo::int8_head_update_``."""
    require()
    columns = w.shape[-1]
    rows = w.numel() // columns
    tile = element_tile(rows, "sparse_int8")
    tiles = -(-rows // tile.rows), -(-columns // tile.columns)
    check_grid("int8_head_update_", tiles[1])
    if rows + tile.rows >= 1 << 31:
        raise NotImplementedError(f"int8_head_update_: {rows} rows, 2^31 is the limit")
    with torch.cuda.device_of(w):
        int8_head_update_kernel[tiles](
            w, remainder, grad, peak, bits, key, signed32(site), rows, columns,
            REMAINDER=0 if remainder is None else REMAINDER_BITS, ROUNDING=ROUNDINGS.index(rounding),
            R=tile.rows, C=tile.columns, ROUNDS=rounds, ASM=ASM, num_warps=tile.warps, enable_fp_fusion=False,
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
            {"table_ptr": "i64", **kinds(("key_ptr", "g_ptr", "shift_ptr"), "i32")},
            ("count", "queries", "query", "packed"), {"ROUNDING": mode, "R": tile.rows, "C": tile.columns, **noise},
            expects=("multiply",), z_per_program=tile.rows * tile.columns, representative=rounding != "pseudo",
        )  # fmt: skip
        tile = element_tile(1024, "sparse_int8")
        for bits in (0, REMAINDER_BITS):
            yield _variant(
                int8_head_update_kernel, f"int8_head_update/{rounding}{'/remainder' if bits else ''}",
                {"w_ptr": "i8", "remainder_ptr": "i8", **kinds(("grad_ptr", "peak_ptr", "bits_ptr", "key_ptr"), "i32")},
                ("site", "rows", "columns"),
                {"REMAINDER": bits, "ROUNDING": mode, "R": tile.rows, "C": tile.columns, **noise},
                divisible=("columns",), expects=("multiply",) if rounding == "stochastic" else (),
                representative=rounding == "stochastic" or (rounding == "pseudo" and not bits),
            )  # fmt: skip
    pointers = kinds(("acc_ptr", "exponent_ptr", "out_ptr", "peak_ptr"), "i32")
    yield _variant(
        int8_sum_groups_kernel, "int8_sum_groups", pointers, ("groups", "size"), {"BLOCK": _BLOCK}, divisible=("size",)
    )  # fmt: skip

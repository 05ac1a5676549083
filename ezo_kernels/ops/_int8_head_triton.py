"""Integer updates of the head on the GPU; formulas in :mod:`.int8_head`.

A weight whose gradient is zero keeps its bits, those of -128 too.

| tensor | shape |
|---|---|
| w, remainder | int8, contiguous; the remainder 1/256 of its unit each |
| acc, out, peak | int32 [groups, size], [size], [1]: gradients, their sum, its largest magnitude |
| exponent, x_exponent | int32 [groups], and what is added to them: [groups], [1] or nothing |
| bits | int32 [1] |

Large heads take two launches a parameter, the sum and the update. Of small ones a program goes through a parameter twice, for
the largest magnitude first, all in one launch; it adds up the rows of a bias's errors, too.
"""

from __future__ import annotations

import torch

from ._int8_pointwise_triton import _variant, rounding_lanes, tiles_of
from ._int8_triton import STOCHASTIC, bit_length, clamp8, raise_peak, round_shift
from ._noise_triton import ASM, signed32
from ._tiles import element_tile
from ._triton import jit, require, tl
from .int8_head import MOST_TENSORS, REMAINDER_BITS
from .int8_pass import ROUNDINGS

_BLOCK, _WARPS = 1024, 4
#: A program that has all of a parameter: elements of a tile, its most rows, and of a bias errors and columns at a time. It has
#: a multiprocessor to itself, and so 128 registers a thread: the assembler would spill to run two.
_TILE, _ROWS, _ERRORS, _COLUMNS, _STEP_WARPS, _REGISTERS = 4096, 32, 32, 128, 16, 128


@jit
def _exponent(exponent_ptr, x_exponent_ptr, x_stride, g):
    e = tl.load(exponent_ptr + g)
    if x_exponent_ptr is not None:
        e += tl.load(x_exponent_ptr + g * x_stride)
    return e


@jit
def _most(exponent_ptr, x_exponent_ptr, x_stride, groups):
    """The largest exponent."""
    most = _exponent(exponent_ptr, x_exponent_ptr, x_stride, 0)
    for g in range(1, groups):
        most = tl.maximum(most, _exponent(exponent_ptr, x_exponent_ptr, x_stride, g))
    return most


@jit
def _aligned(part, n):
    """int32 / 2^n, rounded to nearest, as int32. 64 bits between: shifts are of any length, and -2^31 has no magnitude."""
    part = part.to(tl.int64)
    return round_shift(part, tl.minimum(n, 62), part, 0).to(tl.int32)


@jit
def _shift(peak, bits):
    """How far gradients of this largest magnitude are shifted for a step of so many bits."""
    return tl.minimum(tl.maximum(bit_length(peak) - bits, 0), 62)


@jit
def _move(w_ptr, remainder_ptr, at, inside, grad, n, lanes, REMAINDER: tl.constexpr, ROUNDING: tl.constexpr):
    """w <- clamp(w - round(grad / 2^n)) of int64 gradients; those of zero leave every bit alone."""
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
        tl.store(remainder_ptr + at, tl.where(grad != 0, fine - (moved << REMAINDER), rest).to(tl.int8), mask=inside)
    tl.store(w_ptr + at, tl.where(grad != 0, moved, w).to(tl.int8), mask=inside)


@jit(do_not_specialize=["groups"])
def int8_sum_groups_kernel(acc_ptr, exponent_ptr, out_ptr, peak_ptr, groups, size, BLOCK: tl.constexpr):
    """sum_g acc[g] 2^(exponent[g] - the largest), each rounded to nearest."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    most = _most(exponent_ptr, None, 0, groups)
    total = tl.zeros((BLOCK,), tl.int32)
    for g in range(groups):
        part = tl.load(acc_ptr + (tl.cast(g, tl.int64) * size + at), mask=inside, other=0)
        total += _aligned(part, most - tl.load(exponent_ptr + g))
    tl.store(out_ptr + at, total, mask=inside)
    raise_peak(peak_ptr, tl.where(inside, tl.abs(total), 0))


@jit(do_not_specialize=["site"])
def int8_head_update_kernel(
    w_ptr, remainder_ptr, grad_ptr, peak_ptr, bits_ptr, key_ptr, site, rows, columns,
    REMAINDER: tl.constexpr, ROUNDING: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ROUNDS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One parameter, by the sum of its gradients and its largest magnitude; nothing if that is zero."""
    first = tl.program_id(1) * C
    r = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    c = (first + tl.arange(0, C))[None, :]
    at = r.to(tl.int64) * columns + c
    inside = (r < rows) & (c < columns)
    peak = tl.load(peak_ptr)
    if peak != 0:
        # 64 bits: the shift may pass 31
        grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.int64)
        n = _shift(peak, tl.load(bits_ptr))
        lanes = grad
        if ROUNDING == STOCHASTIC:
            lanes = rounding_lanes(key_ptr, site, site * 0, r, first, C, ROUNDS, ASM)
        _move(w_ptr, remainder_ptr, at, inside, grad, n, lanes, REMAINDER, ROUNDING)


@jit
def _total(
    grad_ptr, exponent_ptr, x_exponent_ptr, x_stride, most, r, c, groups, errors, rows, columns,
    R: tl.constexpr, C: tl.constexpr, ERRORS: tl.constexpr,
):  # fmt: skip
    """The sum over groups of a tile, int32 [R, C]; ERRORS: a bias's, each a sum over ``errors`` rows, so many at a time."""
    total = tl.zeros((R, C), tl.int32)
    inside = (r < rows) & (c < columns)
    for g in range(groups):
        if ERRORS == 0:
            part = tl.load(grad_ptr + (g * rows + r) * columns + c, mask=inside, other=0)
        else:
            part = tl.zeros((R, C), tl.int32)
            for first in range(0, errors, ERRORS):
                row = first + tl.arange(0, ERRORS)[:, None]
                e = tl.load(grad_ptr + (g * errors + row) * columns + c, mask=(row < errors) & (c < columns), other=0)
                part += tl.sum(e.to(tl.int32), axis=0)[None, :]
        total += _aligned(part, most - _exponent(exponent_ptr, x_exponent_ptr, x_stride, g))
    return total


@jit
def _step(
    w_ptr, remainder_ptr, grad_ptr, exponent_ptr, x_exponent_ptr, x_stride, groups, errors, rows, columns, site, bits, key_ptr,
    REMAINDER: tl.constexpr, ROUNDING: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ERRORS: tl.constexpr,
    ROUNDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """All of one parameter."""
    most = _most(exponent_ptr, x_exponent_ptr, x_stride, groups)
    peak = 0
    for top in range(0, rows, R):
        r = (top + tl.arange(0, R))[:, None]
        for first in range(0, columns, C):
            c = (first + tl.arange(0, C))[None, :]
            total = _total(
                grad_ptr, exponent_ptr, x_exponent_ptr, x_stride, most, r, c, groups, errors, rows, columns, R, C, ERRORS
            )  # fmt: skip
            peak = tl.maximum(peak, tl.max(tl.max(tl.abs(total), axis=1), axis=0))
    if peak != 0:
        n = _shift(peak, bits)
        for top in range(0, rows, R):
            r = (top + tl.arange(0, R))[:, None]
            for first in range(0, columns, C):
                c = (first + tl.arange(0, C))[None, :]
                total = _total(
                    grad_ptr, exponent_ptr, x_exponent_ptr, x_stride, most, r, c, groups, errors, rows, columns, R, C, ERRORS
                )  # fmt: skip
                total = total.to(tl.int64)
                lanes = total
                if ROUNDING == STOCHASTIC:
                    lanes = rounding_lanes(key_ptr, site, site * 0, r, first, C, ROUNDS, ASM)
                inside = (r < rows) & (c < columns)
                _move(w_ptr, remainder_ptr, r * columns + c, inside, total, n, lanes, REMAINDER, ROUNDING)


_NUMBERS = [
    f"{what}{i}" for i in range(MOST_TENSORS) for what in ("stride", "groups", "errors", "rows", "columns", "site")
]


@jit(do_not_specialize=_NUMBERS)
def int8_head_step_kernel(
    w0_ptr, rest0_ptr, grad0_ptr, exponent0_ptr, x0_ptr, stride0, groups0, errors0, rows0, columns0, site0,
    w1_ptr, rest1_ptr, grad1_ptr, exponent1_ptr, x1_ptr, stride1, groups1, errors1, rows1, columns1, site1,
    w2_ptr, rest2_ptr, grad2_ptr, exponent2_ptr, x2_ptr, stride2, groups2, errors2, rows2, columns2, site2,
    w3_ptr, rest3_ptr, grad3_ptr, exponent3_ptr, x3_ptr, stride3, groups3, errors3, rows3, columns3, site3,
    bits_ptr, key_ptr, ok_ptr, REMAINDER: tl.constexpr, ROUNDING: tl.constexpr, ROUNDS: tl.constexpr, ASM: tl.constexpr,
    R0: tl.constexpr, C0: tl.constexpr, E0: tl.constexpr,
    R1: tl.constexpr, C1: tl.constexpr, E1: tl.constexpr,
    R2: tl.constexpr, C2: tl.constexpr, E2: tl.constexpr,
    R3: tl.constexpr, C3: tl.constexpr, E3: tl.constexpr,
):  # fmt: skip
    """A program a parameter; pointers of those that are missing are None. R, C, E: tiles of each, as in :func:`_total`."""
    pid = tl.program_id(0)
    if ok_ptr is not None:
        pid += tl.where(tl.load(ok_ptr) != 0, 0, 4)  # no parameter
    bits = tl.load(bits_ptr)
    if pid == 0:
        _step(
            w0_ptr, rest0_ptr, grad0_ptr, exponent0_ptr, x0_ptr, stride0, groups0, errors0, rows0, columns0,
            site0, bits, key_ptr, REMAINDER, ROUNDING, R0, C0, E0, ROUNDS, ASM,
        )  # fmt: skip
    if w1_ptr is not None:  # noqa: SIM102 - the outer if is the compiler's
        if pid == 1:
            _step(
                w1_ptr, rest1_ptr, grad1_ptr, exponent1_ptr, x1_ptr, stride1, groups1, errors1, rows1, columns1,
                site1, bits, key_ptr, REMAINDER, ROUNDING, R1, C1, E1, ROUNDS, ASM,
            )  # fmt: skip
    if w2_ptr is not None:  # noqa: SIM102 - the outer if is the compiler's
        if pid == 2:
            _step(
                w2_ptr, rest2_ptr, grad2_ptr, exponent2_ptr, x2_ptr, stride2, groups2, errors2, rows2, columns2,
                site2, bits, key_ptr, REMAINDER, ROUNDING, R2, C2, E2, ROUNDS, ASM,
            )  # fmt: skip
    if w3_ptr is not None:  # noqa: SIM102 - the outer if is the compiler's
        if pid == 3:
            _step(
                w3_ptr, rest3_ptr, grad3_ptr, exponent3_ptr, x3_ptr, stride3, groups3, errors3, rows3, columns3,
                site3, bits, key_ptr, REMAINDER, ROUNDING, R3, C3, E3, ROUNDS, ASM,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- launchers


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
    rows, columns, tile, grid = tiles_of("int8_head_update_", w)
    with torch.cuda.device_of(w):
        int8_head_update_kernel[grid](
            w, remainder, grad, peak, bits, key, signed32(site), rows, columns,
            REMAINDER=0 if remainder is None else REMAINDER_BITS, ROUNDING=ROUNDINGS.index(rounding),
            R=tile.rows, C=tile.columns, ROUNDS=rounds, ASM=ASM, num_warps=tile.warps, enable_fp_fusion=False,
        )  # fmt: skip


def _up(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tile(rows: int, columns: int, errors: bool) -> tuple[int, int, int]:
    """R, C and E of a parameter."""
    if errors:
        return 1, min(_COLUMNS, max(16, _up(columns))), _ERRORS
    r = min(_ROWS, _up(rows))
    return r, min(_TILE // r, max(16, _up(columns))), 0


def launch_head_step(params, remainders, grads, exponents, x_exponents, ok, bits, key, sites, rounding, rounds) -> None:
    """Update all parameters in one launch; arguments as ``ezo::int8_head_step_``, what ``in_one_launch`` allows."""
    require()
    arguments, tiles = [], {}
    for i in range(MOST_TENSORS):
        if i >= len(params):
            arguments += [None] * 5 + [0] * 6
            tiles |= {f"R{i}": 1, f"C{i}": 16, f"E{i}": 0}
            continue
        w, grad, x = params[i], grads[i], x_exponents[i]
        errors, columns = grad.dtype == torch.int8, w.shape[-1]
        rows = w.numel() // columns
        arguments += [w, remainders[i] if remainders else None, grad, exponents[i], x]
        arguments += [int(x is not None and x.numel() > 1), exponents[i].numel(), grad.shape[1] if errors else 0]
        arguments += [rows, columns, signed32(sites[i])]
        tiles |= dict(zip((f"R{i}", f"C{i}", f"E{i}"), _tile(rows, columns, errors), strict=True))
    with torch.cuda.device_of(bits):
        int8_head_step_kernel[(len(params),)](
            *arguments, bits, key, None if ok is None else ok.view(torch.int8),
            REMAINDER=REMAINDER_BITS if remainders else 0, ROUNDING=ROUNDINGS.index(rounding), ROUNDS=rounds, ASM=ASM, **tiles,
            num_warps=_STEP_WARPS, maxnreg=_REGISTERS, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def _step_variants():
    """LeNet-5's fc3, and fc2 and fc3: weight and bias in turn; by pseudo-stochastic rounding behind a float loss, too."""
    for shapes in (((10, 84), (1, 10)), ((84, 120), (1, 84), (10, 84), (1, 10))):
        for rounding, remainder in ((1, 0), (2, 0), (2, REMAINDER_BITS)):
            pointers = {"bits_ptr": "i32", "key_ptr": "i32", **({"ok_ptr": "i8"} if rounding == 1 else {})}
            constexprs = {"REMAINDER": remainder, "ROUNDING": rounding, "ROUNDS": 7, "ASM": True}
            constexprs |= {} if rounding == 1 else {"ok_ptr": None}
            for i in range(MOST_TENSORS):
                names = {f"w{i}_ptr": "i8", f"rest{i}_ptr": "i8", f"grad{i}_ptr": "i8" if i % 2 else "i32"}
                names |= {f"exponent{i}_ptr": "i32", f"x{i}_ptr": "i32"}
                missing = "wrgex" if i >= len(shapes) else ("" if remainder else "r") + ("x" if i % 2 else "")
                pointers |= {n: kind for n, kind in names.items() if n[0] not in missing}
                constexprs |= {n: None for n in names if n[0] in missing}
                tile = _tile(*shapes[i], i % 2 == 1) if i < len(shapes) else (1, 16, 0)
                constexprs |= dict(zip((f"R{i}", f"C{i}", f"E{i}"), tile, strict=True))
            name = f"int8_head_step/{len(shapes)}/{ROUNDINGS[rounding]}{'/remainder' if remainder else ''}"
            yield _variant(
                int8_head_step_kernel, name, pointers, tuple(_NUMBERS), constexprs, warps=_STEP_WARPS, maxnreg=_REGISTERS,
                expects=("multiply",) if rounding == 2 else (), representative=len(shapes) == 4,
            )  # fmt: skip


def variants():
    """For the static report and the compile tests."""
    require()
    kinds = dict.fromkeys
    noise = {"ROUNDS": 7, "ASM": True}
    for mode, rounding in enumerate(ROUNDINGS):
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
    yield from _step_variants()
    pointers = kinds(("acc_ptr", "exponent_ptr", "out_ptr", "peak_ptr"), "i32")
    yield _variant(
        int8_sum_groups_kernel, "int8_sum_groups", pointers, ("groups", "size"), {"BLOCK": _BLOCK}, divisible=("size",)
    )  # fmt: skip

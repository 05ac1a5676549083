"""Integer arithmetic on the GPU: what the int8 kernels share. No floating-point instruction comes of any of it.

    round(x / 2^n): to nearest, pseudo-stochastic or stochastic, of magnitudes, as in :mod:`._int8_cpu`

| value | shape |
|---|---|
| x, acc | int32 or int64, any shape; a magnitude must be one too |
| n, k | int32 scalar: how far to shift |
| lanes | int32 in [0, 65536), of x's shape |

A run-time divisor comes with a multiplier made on the host (:func:`magic`): the compiler's own division goes through a
float reciprocal. Divisors that are constants become multiplications and need no such care.
"""

from __future__ import annotations

import torch

from . import _constants as C
from ._noise_triton import signed32, sparse_int8_units
from ._triton import constexpr, jit, tl

NEAREST, PSEUDO, STOCHASTIC = constexpr(0), constexpr(1), constexpr(2)
STORE, PEAK, REQUANTIZE, PART, ONCE = constexpr(0), constexpr(1), constexpr(2), constexpr(4), constexpr(5)
_BIAS_SHIFT = constexpr(C.BIAS_SHIFT)

#: Programs along the second and third axis of a grid.
MOST_PROGRAMS = 65535


def magic(divisor: int) -> tuple[int, int]:
    """Multiplier (a uint32 as int32) and shift of :func:`divide` by ``divisor``, 1 <= divisor < 2^31."""
    s = (divisor - 1).bit_length()
    return signed32(-(-(1 << (31 + s)) // divisor)), 31 + s


@jit
def divide(n, multiplier, shift):
    """n // divisor of int32 n >= 0; n * 2^s / divisor is off by less than one part in 2^31, and so never by one."""
    product = n.to(tl.uint32).to(tl.uint64) * multiplier.to(tl.uint32).to(tl.uint64)
    return (product >> shift.to(tl.uint64)).to(tl.int32)


@jit
def bit_length(x):
    """Bits of a non-negative int32 or int64, as int32; 0 of 0."""
    n = (x * 0).to(tl.int32)
    if x.dtype == tl.int64:
        more = (x >> 32) != 0
        n += tl.where(more, 32, 0)
        x = tl.where(more, x >> 32, x)
    for i in tl.static_range(5):
        more = (x >> (16 >> i)) != 0
        n += tl.where(more, 16 >> i, 0)
        x = tl.where(more, x >> (16 >> i), x)
    return n + x.to(tl.int32)


@jit
def round_shift(x, n, lanes, MODE: tl.constexpr):
    """x / 2^n as an integer of x's dtype; 0 <= n < bits of x - 1. ``lanes`` count for STOCHASTIC alone."""
    magnitude = tl.abs(x)
    q = magnitude >> n
    p = magnitude - (q << n)
    # n = 0 needs no case: nothing is discarded, and nothing is not larger than nothing
    if MODE == NEAREST:
        q += (p >> tl.maximum(n - 1, 0)) & 1
    elif MODE == PSEUDO:
        half = n >> 1
        high = p >> half
        low = (p - (high << half)) << (n & 1)
        q += (high > low).to(q.dtype)
    else:
        q += ((p >> tl.maximum(n - 16, 0)) > (lanes >> tl.maximum(16 - n, 0))).to(q.dtype)
    return tl.where(x < 0, -q, q)


@jit
def shifted(x, k, MOST: tl.constexpr, LEAST: tl.constexpr):
    """x * 2^k: to the left by at most MOST, to the right by at most LEAST, rounded to nearest."""
    left = x << tl.minimum(tl.maximum(k, 0), MOST)
    return round_shift(left, tl.minimum(tl.maximum(-k, 0), LEAST), left, NEAREST)


@jit
def clamp8(x):
    return tl.minimum(tl.maximum(x, -127), 127)


def _four(*signs: str):
    """PTX of four bytes of $1 (or $2) plus and minus $2.. ($3..): each saturates upwards as it is packed."""
    first = len(signs) + 1
    lines = [".reg .b32 t, " + ", ".join(f"v{i}" for i in range(4)) + ";"]
    for out, sign in enumerate(signs):
        for i in range(4):
            # byte i, its sign three times before it
            lines.append(f"prmt.b32 t, ${first - 1}, 0, {0x8880 + 0x1111 * i:#x}; {sign}.s32 v{i}, t, ${first + i};")
            lines.append(f"max.s32 v{i}, v{i}, -127;")
        lines.append("cvt.pack.sat.s8.s32.b32 t, v3, v2, 0;")
        lines.append(f"cvt.pack.sat.s8.s32.b32 ${out}, v1, v0, t;")
    return constexpr("{ " + " ".join(lines) + " }")


_BOTH, _PLUS, _MINUS = _four("add", "sub"), _four("add"), _four("sub")


@jit
def perturb_tile(w, z, SIGNS: tl.constexpr, ASM: tl.constexpr):
    """clamp(w + z) and clamp(w - z) as int8; w int8, z int32. SIGNS: 2, or the only one that is asked for, given twice.

    In PTX a byte has no upper clamp of its own: two are packed into a register by an instruction that saturates.
    """
    if ASM:
        if SIGNS == 2:
            plus, minus = tl.inline_asm_elementwise(
                # the first output is written before the second has read its inputs
                _BOTH,
                "=&r,=&r,r,r,r,r,r",
                [w, z],
                dtype=(tl.int8, tl.int8),
                is_pure=True,
                pack=4,
            )
        elif SIGNS == 1:
            plus = tl.inline_asm_elementwise(_PLUS, "=r,r,r,r,r,r", [w, z], dtype=tl.int8, is_pure=True, pack=4)
            minus = plus
        else:
            plus = tl.inline_asm_elementwise(_MINUS, "=r,r,r,r,r,r", [w, z], dtype=tl.int8, is_pure=True, pack=4)
            minus = plus
    else:
        w = w.to(tl.int32)
        plus, minus = clamp8(w + z).to(tl.int8), clamp8(w - z).to(tl.int8)
        if SIGNS == 1:
            minus = plus
        elif SIGNS == -1:
            plus = minus
    return plus, minus


@jit
def perturbed_bias(
    b_ptr, b_n, o, inside, k0, k1, site, query, packed, SIGNS: tl.constexpr, ROUNDS: tl.constexpr, ASM: tl.constexpr
):
    """The bias of outputs o int32 [BN] at both signs (the sign of SIGNS first), int32 [BN]: row 0 of its own site."""
    b = tl.load(b_ptr + o.to(tl.int64) * b_n, mask=inside, other=0)
    plus, minus = b.to(tl.int32), b.to(tl.int32)
    if SIGNS != 0:
        # the tile need not begin at a unit of four columns: each output makes its whole unit
        units = ((o >> 2) << 2).to(tl.uint32)[:, None]
        z = sparse_int8_units(k0, k1, site, query, units * 0, units, ROUNDS, ASM, packed)
        z = tl.sum(tl.where(tl.arange(0, 4)[None, :] == (o & 3)[:, None], z, 0), axis=1)
        p, m = perturb_tile(b, z, SIGNS, False)  # a row: nothing to pack
        plus, minus = p.to(tl.int32), m.to(tl.int32)
    return plus, minus


@jit
def align_bias(b, b_exponent_ptr, x_exponent_ptr, own, w_exponent_ptr):
    """An int32 bias in the unit of the accumulators of group ``own`` of x."""
    k = tl.load(b_exponent_ptr) - tl.load(x_exponent_ptr + own) - tl.load(w_exponent_ptr)
    return shifted(b, k, _BIAS_SHIFT, 30)


@jit
def raise_peak(peak_ptr, magnitude):
    """The maximum of a tile into int32 ``peak``: the same in any order."""
    tl.atomic_max(peak_ptr, tl.max(magnitude), sem="relaxed")


@jit
def shift_of(peak_ptr):
    """How far accumulators of this largest magnitude are shifted to the right."""
    return tl.maximum(bit_length(tl.load(peak_ptr)) - 7, 0)


@jit
def requantised(acc, peak_ptr, ROUNDING: tl.constexpr):
    """Accumulators of a group with this peak, rounded and clamped; int32 still."""
    return clamp8(round_shift(acc, shift_of(peak_ptr), acc, ROUNDING))


@jit
def leave(acc, acc_ptr, out_ptr, at, inside, peak_ptr, WHAT: tl.constexpr, ROUNDING: tl.constexpr, RELU: tl.constexpr):
    """What a tile of accumulators leaves at ``at``: itself and its peak (STORE, ONCE), its peak, its requantised values, or
    itself alone (PART).
    """
    if WHAT == REQUANTIZE:
        y = requantised(acc, peak_ptr, ROUNDING)
        if RELU:
            y = tl.maximum(y, 0)
        tl.store(out_ptr + at, y.to(tl.int8), mask=inside)
    else:
        if WHAT != PEAK:
            tl.store(acc_ptr + at, acc, mask=inside)
        if WHAT != PART:
            raise_peak(peak_ptr, tl.where(inside, tl.abs(acc), 0))


@jit
def leave_exponent(exponent_ptr, group, x_exponent_ptr, own, w_exponent_ptr, peak_ptr):
    """The exponent of a requantised group."""
    value = tl.load(x_exponent_ptr + own) + tl.load(w_exponent_ptr) + shift_of(peak_ptr + group)
    tl.store(exponent_ptr + group, value)


def check_grid(name: str, *programs: int) -> None:
    """Refuse a grid whose second or third axis is too long.

    Raises:
        NotImplementedError: it is.
    """
    if max(programs) > MOST_PROGRAMS:
        raise NotImplementedError(f"{name}: {max(programs)} tiles or groups along one axis, at most {MOST_PROGRAMS}")


def or_dummy(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer for an argument that the kernel does not read."""
    return other if tensor is None else tensor

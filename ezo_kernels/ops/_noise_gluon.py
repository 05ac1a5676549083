"""The noise contract in a Gluon kernel: the functions of ``_noise_triton``, with tiles laid out by their caller.

Gluon compiles Triton's own ``jit`` functions where they name no layout: tiles take theirs from ``rows`` and ``units``. What
makes tensors of its own, or multiplies on the tensor core, cannot be compiled so: the Hadamard mix, which is sums here.
"""

from __future__ import annotations

from ._noise_triton import _HADAMARD, _S_HADAMARD, HADAMARD, _interleave4, _interleave8, philox, z_units
from ._triton import jit, tl


@jit
def _four_bytes(word, SIGNS: tl.constexpr, ASM: tl.constexpr):
    """Sum of a word's four signed bytes, each with a sign: bit k of SIGNS is set where byte k is subtracted."""
    if ASM:
        if SIGNS == 0:
            out = tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, 0x01010101, 0;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
            )
        elif SIGNS == 10:
            out = tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, 0xff01ff01, 0;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
            )
        elif SIGNS == 12:
            out = tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, 0xffff0101, 0;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            out = tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, 0x01ffff01, 0;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
            )
    else:
        w = word.to(tl.int32, bitcast=True)
        b0, b1, b2, b3 = (w << 24) >> 24, (w << 16) >> 24, (w << 8) >> 24, w >> 24
        b1 = b1 * (1 - (SIGNS & 2))
        b2 = b2 * (1 - ((SIGNS >> 1) & 2))
        b3 = b3 * (1 - ((SIGNS >> 2) & 2))
        out = b0 + b1 + b2 + b3
    return out


@jit
def _mixed(
    w0, w1, w2, w3, w4, w5, w6, w7, SIGNS: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Every fourth column of a segment: the 8-point transform over its words of their bytes' signed sums. HALF: column 0's."""
    a0, a1, a2, a3 = (
        _four_bytes(w0, SIGNS, ASM), _four_bytes(w1, SIGNS, ASM), _four_bytes(w2, SIGNS, ASM), _four_bytes(w3, SIGNS, ASM),
    )  # fmt: skip
    a4, a5, a6, a7 = (
        _four_bytes(w4, SIGNS, ASM), _four_bytes(w5, SIGNS, ASM), _four_bytes(w6, SIGNS, ASM), _four_bytes(w7, SIGNS, ASM),
    )  # fmt: skip
    a0, a1, a2, a3, a4, a5, a6, a7 = a0 + a1, a0 - a1, a2 + a3, a2 - a3, a4 + a5, a4 - a5, a6 + a7, a6 - a7
    a0, a1, a2, a3, a4, a5, a6, a7 = a0 + a2, a1 + a3, a0 - a2, a1 - a3, a4 + a6, a5 + a7, a4 - a6, a5 - a7
    a0, a1, a2, a3, a4, a5, a6, a7 = a0 + a4, a1 + a5, a2 + a6, a3 + a7, a0 - a4, a1 - a5, a2 - a6, a3 - a7
    # the half that centres a byte: 32 halves land on column 0 and cancel on the others
    a0 = a0 + HALF
    return _interleave8(
        a0.to(tl.float32), a1.to(tl.float32), a2.to(tl.float32), a3.to(tl.float32),
        a4.to(tl.float32), a5.to(tl.float32), a6.to(tl.float32), a7.to(tl.float32),
    )  # fmt: skip


@jit
def hadamard_sums(k0, k1, site, counter2, rows, units, ROUNDS: tl.constexpr, ASM: tl.constexpr):
    """z of ``hadamard``, fp32 [R, 32 U], a segment of 32 columns a unit, by sums of integers: the product's very bits."""
    w0, w1, w2, w3 = philox(site, units >> 4, counter2, rows, k0, k1, ROUNDS, ASM)
    w4, w5, w6, w7 = philox(site, (units >> 4) + 1, counter2, rows, k0, k1, ROUNDS, ASM)
    z = _interleave4(
        _mixed(w0, w1, w2, w3, w4, w5, w6, w7, 0, 16, ASM),
        _mixed(w0, w1, w2, w3, w4, w5, w6, w7, 10, 0, ASM),
        _mixed(w0, w1, w2, w3, w4, w5, w6, w7, 12, 0, ASM),
        _mixed(w0, w1, w2, w3, w4, w5, w6, w7, 6, 0, ASM),
    )
    return z * _HADAMARD


@jit
def z_tile(
    k0, k1, site, query, rows, units,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr, threshold, scale,
):  # fmt: skip
    """z of a tile, fp32 [R, U * UNIT], as ``_noise_triton.z_units``, whose arguments these are; any R."""
    if NOISE == HADAMARD:
        counter2 = query.to(tl.uint32) << 8 | _S_HADAMARD
        z = hadamard_sums(k0, k1, site.to(tl.uint32), counter2, rows, units, ROUNDS, ASM)
    else:
        z = z_units(k0, k1, site, query, rows, units, NOISE, ROUNDS, UNIT, ASM, threshold, scale)
    return z

"""The noise contract on the CPU: the reference, and fast enough to train with (numba).

Every generator fills ``out[rows, columns]`` (C-contiguous, columns from 0, a multiple of the noise's segment); ``row_ids``
(uint32) names the rows. docs/rng.md is the specification, line for line.
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, register_jitable

from . import _constants as C
from ._jit import kept as _jit

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32


@intrinsic
def _fma(typingctx, a, b, c):
    """llvm.fma.f32: one rounding, whatever the compiler thinks of contraction."""

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def _float_bits(typingctx, a):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _bits_float(typingctx, a):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _signed_float(typingctx, a):
    """float(int32(word)): one conversion instruction; numba's own goes through 64 bits."""

    def codegen(context, builder, signature, args):
        return builder.sitofp(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _unsigned_float(typingctx, a):
    def codegen(context, builder, signature, args):
        return builder.uitofp(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


_inline = functools.partial(njit, nogil=True, inline="never", error_model="numpy")
#: What a factory's closure may hold and still be cached: a plain function, named in the cache by where it is defined.
_put = register_jitable(nogil=True, error_model="numpy")

_M0, _M1 = u64(C.PHILOX_M0), u64(C.PHILOX_M1)
_W0, _W1 = u32(C.PHILOX_W0), u32(C.PHILOX_W1)


@_inline()
def _round(c0, c1, c2, c3, k0, k1):
    p0 = u64(c0) * _M0
    p1 = u64(c2) * _M1
    hi0, hi1 = u32(p0 >> u64(32)), u32(p1 >> u64(32))
    return u32(hi1 ^ c1 ^ k0), u32(p1), u32(hi0 ^ c3 ^ k1), u32(p0)


@_inline()
def _three_rounds(c0, c1, c2, c3, k0, k1):
    for _ in range(3):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 = u32(k0 + _W0)
        k1 = u32(k1 + _W1)
    return c0, c1, c2, c3


@_inline()
def _four_rounds(c0, c1, c2, c3, k0, k1):
    for _ in range(4):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 = u32(k0 + _W0)
        k1 = u32(k1 + _W1)
    return c0, c1, c2, c3


@_inline()
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32 of 7 rounds: four words of the block at counter (c0, c1, c2, c3) under key (k0, k1)."""
    c0, c1, c2, c3 = _three_rounds(c0, c1, c2, c3, k0, k1)
    return _four_rounds(c0, c1, c2, c3, u32(k0 + u32(3) * _W0), u32(k1 + u32(3) * _W1))


@_inline()
def philox_10(c0, c1, c2, c3, k0, k1):
    """Philox4x32 of 10 rounds."""
    c0, c1, c2, c3 = philox(c0, c1, c2, c3, k0, k1)
    return _three_rounds(c0, c1, c2, c3, u32(k0 + u32(7) * _W0), u32(k1 + u32(7) * _W1))


@_jit()
def fold_key(seed, step, key):
    """The key of (seed, step), each two words, low first; ``key`` is overwritten."""
    key[0], key[1], _, _ = philox_10(step[0], step[1], u32(0), u32(C.KEY_TAG), seed[0], seed[1])


#: Blocks whose words are made at a time: they stay in the first-level cache until they are transformed.
_CHUNK = 512


@_inline()
def _columns(of, first, blocks, c0, c2, k0, k1):
    """What the first three rounds make of the column alone, of ``blocks`` blocks from ``first`` on, as planes of[3, :].

    The block's number enters c0 of round 2 by an exclusive or, c2 of round 3 by a product, and meets the row's part after it.
    """
    p1 = u64(c2) * _M1
    a, low = u32(p1 >> u64(32)) ^ k0, u64(c0) * _M0
    c, k1 = u32(low), u32(k1 + _W1)
    for b in range(blocks):
        p0 = u64(u32(a ^ u32(first + b))) * _M0
        p1 = u64(u32(u32(p0 >> u64(32)) ^ c ^ k1)) * _M1
        of[0, b], of[1, b], of[2, b] = u32(p1 >> u64(32)), u32(p1), u32(p0)


@_inline()
def _fill(w, of_columns, blocks, c0, c2, c3, k0, k1, rounds):
    """Words of ``blocks`` blocks of the row c3 as planes w[4, :], from the columns' part of the first three rounds.

    Eight of the fourteen products of seven rounds are left to the loop. The branch on the rounds stands outside of it:
    inside, it would keep LLVM from vectorising.
    """
    second0, third0, third1 = u32(k0 + _W0), u32(k0 + u32(2) * _W0), u32(k1 + u32(2) * _W1)
    p0, p1 = u64(c0) * _M0, u64(c2) * _M1
    row = u64(u32(u32(p0 >> u64(32)) ^ c3 ^ k1)) * _M1
    p0 = u64(u32(u32(row >> u64(32)) ^ u32(p1) ^ second0)) * _M0
    x, y, z = u32(u32(row) ^ third0), u32(u32(p0 >> u64(32)) ^ third1), u32(p0)
    k0, k1 = u32(third0 + _W0), u32(third1 + _W1)
    if rounds == 7:
        for b in range(blocks):
            w[0, b], w[1, b], w[2, b], w[3, b] = _four_rounds(
                u32(of_columns[0, b] ^ x), of_columns[1, b], u32(of_columns[2, b] ^ y), z, k0, k1
            )
    else:
        for b in range(blocks):
            a0, a1, a2, a3 = _four_rounds(
                u32(of_columns[0, b] ^ x), of_columns[1, b], u32(of_columns[2, b] ^ y), z, k0, k1
            )
            w[0, b], w[1, b], w[2, b], w[3, b] = _three_rounds(
                a0, a1, a2, a3, u32(k0 + u32(4) * _W0), u32(k1 + u32(4) * _W1)
            )


_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7 = map(f32, C.LOG_P)
_S0, _S1, _S2, _S3, _S4 = map(f32, C.SIN_P)
_C0, _C1, _C2, _C3, _C4 = map(f32, C.COS_P)
_LOG_C = f32(C.LOG_C)
_TWO_M32, _TWO_M33 = f32(2.0**-32), f32(2.0**-33)
_HALF, _MHALF, _THREE_HALVES, _ONE = f32(0.5), f32(-0.5), f32(1.5), f32(1.0)
_SPLIT, _EXP_MASK, _MAGIC = i32(C.LOG_SPLIT), i32(-8388608), i32(C.RSQRT_MAGIC)
_SIGN = u32(0x80000000)


@_inline()
def box_muller(w0, w1):
    """Two normals from two words; docs/rng.md, section gaussian."""
    u = _fma(_unsigned_float(w0), _TWO_M32, _TWO_M33)
    i = _float_bits(u)
    e = i32(i32(i - _SPLIT) & _EXP_MASK)
    t = _bits_float(i32(i - e)) - _ONE
    p = _fma(t, _P0, _P1)
    p = _fma(p, t, _P2)
    p = _fma(p, t, _P3)
    p = _fma(p, t, _P4)
    p = _fma(p, t, _P5)
    p = _fma(p, t, _P6)
    p = _fma(p, t, _P7)
    v = _fma(p, t, _signed_float(u32(e)) * _LOG_C)
    y = _bits_float(i32(_MAGIC - i32(_float_bits(v) >> i32(1))))
    h = v * _MHALF
    y = y * _fma(h * y, y, _THREE_HALVES)
    y = y * _fma(h * y, y, _THREE_HALVES)
    r = v * y
    r = _fma(_fma(-r, r, v), _HALF * y, r)
    x = _signed_float(u32(w1 << u32(1))) * _TWO_M32
    x2 = x * x
    s = _fma(x2, _S0, _S1)
    s = _fma(s, x2, _S2)
    s = _fma(s, x2, _S3)
    s = _fma(s, x2, _S4)
    c = _fma(x2, _C0, _C1)
    c = _fma(c, x2, _C2)
    c = _fma(c, x2, _C3)
    c = _fma(c, x2, _C4)
    r = _bits_float(i32(u32(_float_bits(r)) ^ (w1 & _SIGN)))
    return r * c, (r * x) * s


_CLT_A, _CLT_B, _UNIFORM = f32(C.CLT4_A), f32(C.CLT4_B), f32(C.UNIFORM_SCALE)
_BYTE = u32(255)


@_inline()
def _clt4(w):
    total = (w & _BYTE) + ((w >> u32(8)) & _BYTE) + ((w >> u32(16)) & _BYTE) + (w >> u32(24))
    s = _signed_float(u32(total - u32(510)))
    return s * (_CLT_A + _CLT_B * (s * s))


def _generator(per: int, put):
    """A generator, for blocks of ``per`` columns: ``put(words of some blocks, their part of a row, extra)`` over ``out``."""

    @_jit()
    def generate(out, k0, k1, c0, c2, row_ids, rounds, *extra):
        rows, columns = out.shape
        w = np.empty((4, _CHUNK), np.uint32)
        of_columns = np.empty((3, _CHUNK), np.uint32)
        for first in range(0, columns // per, _CHUNK):
            blocks = min(_CHUNK, columns // per - first)
            _columns(of_columns, first, blocks, c0, c2, k0, k1)
            for r in range(rows):
                _fill(w, of_columns, blocks, c0, c2, u32(row_ids[r]), k0, k1, rounds)
                put(w, blocks, out[r, per * first :], extra)

    return generate


@_put
def _put_words(w, blocks, line, extra):
    for b in range(blocks):
        line[4 * b] = w[0, b]
        line[4 * b + 1] = w[1, b]
        line[4 * b + 2] = w[2, b]
        line[4 * b + 3] = w[3, b]


@_put
def _put_gaussian(w, blocks, line, extra):
    for b in range(blocks):
        z0, z1 = box_muller(w[0, b], w[1, b])
        z2, z3 = box_muller(w[2, b], w[3, b])
        line[4 * b] = z0
        line[4 * b + 1] = z1
        line[4 * b + 2] = z2
        line[4 * b + 3] = z3


@_put
def _put_clt4(w, blocks, line, extra):
    for b in range(blocks):
        line[4 * b] = _clt4(w[0, b])
        line[4 * b + 1] = _clt4(w[1, b])
        line[4 * b + 2] = _clt4(w[2, b])
        line[4 * b + 3] = _clt4(w[3, b])


@_put
def _put_uniform(w, blocks, line, extra):
    for b in range(blocks):
        line[4 * b] = _signed_float(w[0, b]) * _UNIFORM
        line[4 * b + 1] = _signed_float(w[1, b]) * _UNIFORM
        line[4 * b + 2] = _signed_float(w[2, b]) * _UNIFORM
        line[4 * b + 3] = _signed_float(w[3, b]) * _UNIFORM


@_put
def _put_signs(w, blocks, line, extra):
    for b in range(blocks):
        for j in range(4):
            word = w[j, b]
            for c in range(32):
                bit = (word >> u32((c & 1) * 16 + (c >> 1))) & u32(1)
                line[128 * b + 32 * j + c] = _bits_float(i32(u32(0x3F800000) | (bit << u32(31))))


_HADAMARD = f32(C.HADAMARD_SCALE)


@_put
def _put_hadamard(w, blocks, line, extra):
    a = np.empty(32, np.int32)
    for s in range(blocks // 2):
        for half in range(2):
            for i in range(4):
                for k in range(4):
                    byte = (w[i, 2 * s + half] >> u32(8 * k)) & _BYTE
                    a[16 * half + 4 * i + k] = i32(u32(byte << u32(24))) >> i32(24)
        step = 1
        while step < 32:  # butterflies: integers, so the order of the sum does not matter
            for m in range(0, 32, 2 * step):
                for n in range(m, m + step):
                    p, q = a[n], a[n + step]
                    a[n] = p + q
                    a[n + step] = p - q
            step *= 2
        a[0] += 16
        for c in range(32):
            line[32 * s + c] = f32(a[c]) * _HADAMARD


@_put
def _put_lanes(w, blocks, line, extra):
    for b in range(blocks):
        for j in range(4):
            line[8 * b + 2 * j] = np.uint16(w[j, b] & u32(0xFFFF))
            line[8 * b + 2 * j + 1] = np.uint16(w[j, b] >> u32(16))


@_put
def _put_sparse_int8(w, blocks, line, extra):
    threshold, r_max = extra
    least, span = u32(threshold), u32(2 * r_max + 1)
    for b in range(blocks):
        for j in range(4):
            word = w[j, b]
            value = i32(u32((word & u32(0xFFFF)) * span) >> u32(16)) - i32(r_max)
            line[4 * b + j] = np.int8(value) if (word >> u32(16)) >= least else np.int8(0)


@_put
def _put_masked(w, blocks, line, extra):
    threshold, scale = extra
    least = u32(threshold)
    for b in range(blocks):
        for j in range(8):
            lane = (w[j >> 1, b] >> u32(16 * (j & 1))) & u32(0xFFFF)
            line[8 * b + j] = line[8 * b + j] * scale if lane >= least else f32(0.0)


#: The raw words: out is uint32.
words = _generator(4, _put_words)
gaussian = _generator(4, _put_gaussian)
clt4 = _generator(4, _put_clt4)
uniform = _generator(4, _put_uniform)
rademacher = _generator(128, _put_signs)
hadamard = _generator(16, _put_hadamard)
#: 16-bit lanes (masks, rounding): out is uint16.
lanes = _generator(8, _put_lanes)
#: int8; takes the threshold and r_max, too.
sparse_int8 = _generator(4, _put_sparse_int8)
#: z = scale * z where the lane is kept, else 0, in place, z fp32; takes the threshold and the scale, too.
mask_ = _generator(8, _put_masked)


@_jit()
def add_scaled(out, w, z, scale):
    """out = w + scale * z, product rounded, then sum (numba never contracts); ``out`` may be ``w``.

    out and w are [rows, taps, channels]; z is [rows, columns] in padded logical order.
    """
    rows, taps, channels = w.shape
    padded = z.shape[1] // taps
    for r in range(rows):
        for t in range(taps):
            line, to, step = w[r, t], out[r, t], z[r, t * padded :]
            for c in range(channels):
                to[c] = line[c] + scale * step[c]


#: Noise name -> its generator; ``sparse`` and ``sparse_int8`` take more than these do.
GENERATORS = {
    "gaussian": gaussian,
    "clt4": clt4,
    "uniform": uniform,
    "hadamard": hadamard,
    "rademacher": rademacher,
}

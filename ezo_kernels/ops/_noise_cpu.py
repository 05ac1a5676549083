"""The noise contract on the CPU: the reference, and fast enough to train with (numba).

Every generator fills ``out[rows, columns]`` (C-contiguous, columns from 0, a multiple of the noise's segment); ``row_ids``
(uint32) names the rows. docs/rng.md is the specification, line for line.
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from . import _constants as C

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


_jit = functools.partial(njit, nogil=True, cache=True, error_model="numpy")
_inline = functools.partial(njit, nogil=True, inline="never", error_model="numpy")

_M0, _M1 = u64(C.PHILOX_M0), u64(C.PHILOX_M1)
_W0, _W1 = u32(C.PHILOX_W0), u32(C.PHILOX_W1)


@_inline()
def _round(c0, c1, c2, c3, k0, k1):
    p0 = u64(c0) * _M0
    p1 = u64(c2) * _M1
    hi0, hi1 = u32(p0 >> u64(32)), u32(p1 >> u64(32))
    return u32(hi1 ^ c1 ^ k0), u32(p1), u32(hi0 ^ c3 ^ k1), u32(p0)


@_inline()
def philox(c0, c1, c2, c3, k0, k1, rounds):
    """Philox4x32: four words of the block at counter (c0, c1, c2, c3) under key (k0, k1)."""
    for _ in range(7):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 = u32(k0 + _W0)
        k1 = u32(k1 + _W1)
    if rounds == 10:
        for _ in range(3):
            c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
            k0 = u32(k0 + _W0)
            k1 = u32(k1 + _W1)
    return c0, c1, c2, c3


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


@_jit()
def words(out, k0, k1, c0, c2, row_ids, rounds):
    """The raw words: out is uint32 [rows, 4 * blocks]."""
    rows, columns = out.shape
    for r in range(rows):
        c3 = u32(row_ids[r])
        line = out[r]
        for b in range(columns // 4):
            w0, w1, w2, w3 = philox(c0, u32(b), c2, c3, k0, k1, rounds)
            line[4 * b] = w0
            line[4 * b + 1] = w1
            line[4 * b + 2] = w2
            line[4 * b + 3] = w3


@_jit()
def gaussian(out, k0, k1, c0, c2, row_ids, rounds):
    rows, columns = out.shape
    for r in range(rows):
        c3 = u32(row_ids[r])
        line = out[r]
        for b in range(columns // 4):
            w0, w1, w2, w3 = philox(c0, u32(b), c2, c3, k0, k1, rounds)
            z0, z1 = box_muller(w0, w1)
            z2, z3 = box_muller(w2, w3)
            line[4 * b] = z0
            line[4 * b + 1] = z1
            line[4 * b + 2] = z2
            line[4 * b + 3] = z3


@_jit()
def clt4(out, k0, k1, c0, c2, row_ids, rounds):
    rows, columns = out.shape
    for r in range(rows):
        c3 = u32(row_ids[r])
        line = out[r]
        for b in range(columns // 4):
            w0, w1, w2, w3 = philox(c0, u32(b), c2, c3, k0, k1, rounds)
            line[4 * b] = _clt4(w0)
            line[4 * b + 1] = _clt4(w1)
            line[4 * b + 2] = _clt4(w2)
            line[4 * b + 3] = _clt4(w3)


@_jit()
def uniform(out, k0, k1, c0, c2, row_ids, rounds):
    rows, columns = out.shape
    for r in range(rows):
        c3 = u32(row_ids[r])
        line = out[r]
        for b in range(columns // 4):
            w0, w1, w2, w3 = philox(c0, u32(b), c2, c3, k0, k1, rounds)
            line[4 * b] = _signed_float(w0) * _UNIFORM
            line[4 * b + 1] = _signed_float(w1) * _UNIFORM
            line[4 * b + 2] = _signed_float(w2) * _UNIFORM
            line[4 * b + 3] = _signed_float(w3) * _UNIFORM


@_jit()
def rademacher(out, k0, k1, c0, c2, row_ids, rounds):
    rows, columns = out.shape
    for r in range(rows):
        c3 = u32(row_ids[r])
        line = out[r]
        for b in range(columns // 128):
            w = philox(c0, u32(b), c2, c3, k0, k1, rounds)
            for j in range(4):
                word = w[j]
                for c in range(32):
                    bit = (word >> u32((c & 1) * 16 + (c >> 1))) & u32(1)
                    line[128 * b + 32 * j + c] = _bits_float(i32(u32(0x3F800000) | (bit << u32(31))))


_HADAMARD = f32(C.HADAMARD_SCALE)


@_jit()
def hadamard(out, k0, k1, c0, c2, row_ids, rounds):
    rows, columns = out.shape
    a = np.empty(32, np.int32)
    for r in range(rows):
        c3 = u32(row_ids[r])
        line = out[r]
        for s in range(columns // 32):
            for half in range(2):
                w = philox(c0, u32(2 * s + half), c2, c3, k0, k1, rounds)
                for i in range(4):
                    for k in range(4):
                        byte = (w[i] >> u32(8 * k)) & _BYTE
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


@_jit()
def lanes(out, k0, k1, c0, c2, row_ids, rounds):
    """16-bit lanes (masks, rounding): out is uint16 [rows, 8 * blocks]."""
    rows, columns = out.shape
    for r in range(rows):
        c3 = u32(row_ids[r])
        line = out[r]
        for b in range(columns // 8):
            w = philox(c0, u32(b), c2, c3, k0, k1, rounds)
            for j in range(4):
                line[8 * b + 2 * j] = np.uint16(w[j] & u32(0xFFFF))
                line[8 * b + 2 * j + 1] = np.uint16(w[j] >> u32(16))


@_jit()
def sparse_int8(out, k0, k1, c0, c2, row_ids, rounds, threshold, r_max):
    rows, columns = out.shape
    span = u32(2 * r_max + 1)
    for r in range(rows):
        c3 = u32(row_ids[r])
        line = out[r]
        for b in range(columns // 4):
            w = philox(c0, u32(b), c2, c3, k0, k1, rounds)
            for j in range(4):
                value = i32(u32((w[j] & u32(0xFFFF)) * span) >> u32(16)) - i32(r_max)
                line[4 * b + j] = np.int8(value) if (w[j] >> u32(16)) >= u32(threshold) else np.int8(0)


@_jit()
def axpy(out, w, z, scale):
    """out = w + scale * z over flat fp32 arrays: product rounded, then sum (numba never contracts)."""
    for i in range(out.size):
        out[i] = w[i] + scale * z[i]


@_jit()
def mask_(z, k0, k1, c0, c2, row_ids, rounds, threshold, column0, scale):
    """z = scale * z where the lane is kept, else 0; columns of z start at ``column0`` (a multiple of 8), any number."""
    rows, columns = z.shape
    t = u32(threshold)
    for r in range(rows):
        c3 = u32(row_ids[r])
        line = z[r]
        for b in range((columns + 7) // 8):
            w = philox(c0, u32(column0 // 8 + b), c2, c3, k0, k1, rounds)
            for j in range(min(8, columns - 8 * b)):
                lane = (w[j >> 1] >> u32(16 * (j & 1))) & u32(0xFFFF)
                line[8 * b + j] = line[8 * b + j] * scale if lane >= t else f32(0.0)

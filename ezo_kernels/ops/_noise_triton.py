"""The noise contract on the GPU: Philox, the transforms, and the kernels that write z (docs/rng.md).

    z[r, c] = transform(philox(key; site, column block, query << 8 | stream, row))

| value | shape |
|---|---|
| rows | uint32 [R, 1], logical rows |
| units | uint32 [1, U], first logical (padded) column of each unit of UNIT columns |
| z | fp32 [R, U * UNIT], consecutive columns of a unit side by side |

:func:`z_units` is what every fused kernel calls. In this counter order the first three rounds of Philox depend on the
row alone or on the column alone, so that the compiler moves them out of an inner loop.
"""

from __future__ import annotations

from . import _constants as C
from ._triton import constexpr, jit, tl, triton

#: noise name -> id that kernels branch on
NOISE_ID = {
    "gaussian": 0,
    "gaussian_fast": 1,
    "clt4": 2,
    "uniform": 3,
    "hadamard": 4,
    "rademacher": 5,
    "sparse": 6,
    "sparse_int8": 7,
}
#: noise name -> columns of the widest unit; rademacher takes any smaller power of two as well
UNIT = {
    "gaussian": 4,
    "gaussian_fast": 4,
    "clt4": 4,
    "uniform": 4,
    "hadamard": 32,
    "rademacher": 32,
    "sparse": 8,
    "sparse_int8": 4,
}

GAUSSIAN, GAUSSIAN_FAST, CLT4, UNIFORM = constexpr(0), constexpr(1), constexpr(2), constexpr(3)
HADAMARD, RADEMACHER, SPARSE, SPARSE_INT8 = constexpr(4), constexpr(5), constexpr(6), constexpr(7)

_M0, _M1 = constexpr(C.PHILOX_M0), constexpr(C.PHILOX_M1)
_W0, _W1 = constexpr(C.PHILOX_W0), constexpr(C.PHILOX_W1)
_KEY_TAG = constexpr(C.KEY_TAG)
_S_GAUSSIAN, _S_RADEMACHER = constexpr(C.STREAM_GAUSSIAN), constexpr(C.STREAM_RADEMACHER)
_S_MASK, _S_SPARSE_INT8 = constexpr(C.STREAM_MASK), constexpr(C.STREAM_SPARSE_INT8)
_S_CLT4, _S_UNIFORM = constexpr(C.STREAM_CLT4), constexpr(C.STREAM_UNIFORM)
_S_HADAMARD = constexpr(C.STREAM_HADAMARD)

_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7 = map(constexpr, C.LOG_P)
_S0, _S1, _S2, _S3, _S4 = map(constexpr, C.SIN_P)
_C0, _C1, _C2, _C3, _C4 = map(constexpr, C.COS_P)
_SPLIT, _MAGIC, _LOG_C = constexpr(C.LOG_SPLIT), constexpr(C.RSQRT_MAGIC), constexpr(C.LOG_C)
_TWO_M32, _TWO_M33 = constexpr(2.0**-32), constexpr(2.0**-33)
_MINUS_2_LN2, _PI = constexpr(C.f32(-1.3862943611198906)), constexpr(C.f32(3.141592653589793))
_CLT_A, _CLT_B = constexpr(C.CLT4_A), constexpr(C.CLT4_B)
_UNIFORM, _HADAMARD = constexpr(C.UNIFORM_SCALE), constexpr(C.HADAMARD_SCALE)


@jit
def _multiply(word, SECOND: tl.constexpr, ASM: tl.constexpr):
    """High and low word of word * M0 (M1 if SECOND). LLVM splits a 64-bit product in two; the asm is one multiply."""
    if ASM:
        if SECOND:
            hi, lo = tl.inline_asm_elementwise(
                "{ .reg .b64 t; mul.wide.u32 t, $2, 0xCD9E8D57; mov.b64 {$1, $0}, t; }",
                "=r,=r,r", [word], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            hi, lo = tl.inline_asm_elementwise(
                "{ .reg .b64 t; mul.wide.u32 t, $2, 0xD2511F53; mov.b64 {$1, $0}, t; }",
                "=r,=r,r", [word], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
            )  # fmt: skip
    else:
        product = word.to(tl.uint64) * (_M1 if SECOND else _M0)
        hi, lo = (product >> 32).to(tl.uint32), product.to(tl.uint32)
    return hi, lo


@jit
def philox(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr, ASM: tl.constexpr):
    """Philox4x32: the four words at counter (c0, c1, c2, c3) under (k0, k1), all uint32, shapes that broadcast."""
    for _ in tl.static_range(ROUNDS):
        hi0, lo0 = _multiply(c0, False, ASM)
        hi1, lo1 = _multiply(c2, True, ASM)
        c0 = hi1 ^ c1 ^ k0
        c1 = lo1
        c2 = hi0 ^ c3 ^ k1
        c3 = lo0
        k0 = k0 + _W0
        k1 = k1 + _W1
    return c0, c1, c2, c3


@jit
def load_key(key_ptr):
    """The two words of a folded key."""
    return tl.load(key_ptr).to(tl.uint32, bitcast=True), tl.load(key_ptr + 1).to(tl.uint32, bitcast=True)


@jit
def _signed(word):
    """float(int32(word))"""
    return word.to(tl.int32, bitcast=True).to(tl.float32)


@jit
def _gaussian_pair(w0, w1):
    """Two normals from two words; fma only where the contract has one."""
    u = tl.fma(w0.to(tl.float32), _TWO_M32, _TWO_M33)
    i = u.to(tl.int32, bitcast=True)
    e = (i - _SPLIT) & -8388608
    t = (i - e).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(t, _P0, _P1)
    p = tl.fma(p, t, _P2)
    p = tl.fma(p, t, _P3)
    p = tl.fma(p, t, _P4)
    p = tl.fma(p, t, _P5)
    p = tl.fma(p, t, _P6)
    p = tl.fma(p, t, _P7)
    v = tl.fma(p, t, e.to(tl.float32) * _LOG_C)
    # a constexpr on the left of a tensor stays a constexpr in the interpreter, so constants stand on the right
    y = ((v.to(tl.int32, bitcast=True) >> 1) * -1 + _MAGIC).to(tl.float32, bitcast=True)
    h = v * -0.5
    y = y * tl.fma(h * y, y, 1.5)
    y = y * tl.fma(h * y, y, 1.5)
    r = v * y
    r = tl.fma(tl.fma(r * -1.0, r, v), 0.5 * y, r)
    x = _signed(w1 << 1) * _TWO_M32
    x2 = x * x
    s = tl.fma(x2, _S0, _S1)
    s = tl.fma(s, x2, _S2)
    s = tl.fma(s, x2, _S3)
    s = tl.fma(s, x2, _S4)
    c = tl.fma(x2, _C0, _C1)
    c = tl.fma(c, x2, _C2)
    c = tl.fma(c, x2, _C3)
    c = tl.fma(c, x2, _C4)
    r = (r.to(tl.uint32, bitcast=True) ^ (w1 & 0x80000000)).to(tl.float32, bitcast=True)
    return r * c, (r * x) * s


@jit
def _approximate(x, OP: tl.constexpr):
    return tl.inline_asm_elementwise(OP + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def _gaussian_fast_pair(w0, w1, ASM: tl.constexpr):
    """The same as :func:`_gaussian_pair` to about 1e-3, through the special function unit."""
    u = tl.fma(w0.to(tl.float32), _TWO_M32, _TWO_M33)
    angle = _signed(w1 << 1) * (_TWO_M32 * _PI)
    if ASM:
        r = _approximate(_approximate(u, "lg2.approx.ftz.f32") * _MINUS_2_LN2, "sqrt.approx.ftz.f32")
        c = _approximate(angle, "cos.approx.f32")
        s = _approximate(angle, "sin.approx.f32")
    else:
        r = tl.sqrt(tl.log2(u) * _MINUS_2_LN2)
        c = tl.cos(angle)
        s = tl.sin(angle)
    r = (r.to(tl.uint32, bitcast=True) ^ (w1 & 0x80000000)).to(tl.float32, bitcast=True)
    return r * c, r * s


@jit
def _clt4(word, ASM: tl.constexpr):
    if ASM:
        # a sum that begins at -510 is one instruction less than a sum and a subtraction
        total = tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, 0x01010101, -510;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        total = ((word & 255) + ((word >> 8) & 255) + ((word >> 16) & 255) + (word >> 24)).to(tl.int32) - 510
    s = total.to(tl.float32)
    return s * ((s * s) * _CLT_B + _CLT_A)


@jit
def _sparse_int8(word, packed, ASM: tl.constexpr):
    r_max = packed >> 16
    # the lower half decides nothing: as words, the threshold in the higher one
    kept = word >= packed.to(tl.uint32) << 16
    if ASM:
        # low half times (2 r_max + 1), a byte, less r_max 2^16 is one dot product of two halves, the other byte zero
        value = tl.inline_asm_elementwise(
            "dp2a.lo.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [word, 2 * r_max + 1, -(r_max << 16)], dtype=tl.int32,
            is_pure=True, pack=1,
        )  # fmt: skip
        value >>= 16
    else:
        value = (((word & 0xFFFF).to(tl.int32) * (2 * r_max + 1)) >> 16) - r_max
    return tl.where(kept, value, 0)


@jit
def _interleave4(z0, z1, z2, z3):
    """[R, U] four times -> [R, 4 U], column 4 u + j from z_j; a thread keeps a unit in its own registers."""
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))
    return tl.reshape(z, (z0.shape[0], z0.shape[1] * 4))


@jit
def _interleave8(z0, z1, z2, z3, z4, z5, z6, z7):
    even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
    odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
    return tl.reshape(tl.join(even, odd), (z0.shape[0], z0.shape[1] * 8))


@jit
def _interleave_lanes(w0, w1, w2, w3):
    """16-bit lanes of a block as int32 [R, 8 U]: column c is the low half of word c >> 1 (even c) or the high."""
    w = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)
    return tl.reshape(tl.join(w & 0xFFFF, (w >> 16) & 0xFFFF), (w0.shape[0], w0.shape[1] * 8))


@jit
def lane_units(k0, k1, site, counter2, rows, units, ROUNDS: tl.constexpr, ASM: tl.constexpr):
    """16-bit lanes (masks, rounding), int32 [R, 8 U]; ``units`` multiples of 8, ``counter2`` query << 8 | stream."""
    w0, w1, w2, w3 = philox(site.to(tl.uint32), units >> 3, counter2.to(tl.uint32), rows, k0, k1, ROUNDS, ASM)
    return _interleave_lanes(w0, w1, w2, w3)


@jit
def _sylvester(COLUMNS: tl.constexpr):
    """32-point Hadamard matrices down the diagonal of int8 [COLUMNS, COLUMNS], from indices: nothing is loaded."""
    i = tl.arange(0, COLUMNS)[:, None]
    j = tl.arange(0, COLUMNS)[None, :]
    x = i & j & 31
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    return tl.where((i >> 5) == (j >> 5), 1 - 2 * (x & 1), 0).to(tl.int8)


@jit
def _hadamard(k0, k1, site, counter2, rows, units, ROUNDS: tl.constexpr, ASM: tl.constexpr):
    """Bytes of two blocks times the Hadamard matrix on the tensor cores: integers, the same in any order."""
    COLUMNS: tl.constexpr = units.shape[1] * 32
    # a thread makes blocks, not segments of two blocks: words that are joined stay in the thread that made them
    block = (units >> 4)[:, :, None] + tl.arange(0, 2)[None, None, :].to(tl.uint32)
    block = tl.reshape(block, (units.shape[0], units.shape[1] * 2))
    w0, w1, w2, w3 = philox(site, block, counter2, rows, k0, k1, ROUNDS, ASM)
    words = _interleave4(w0, w1, w2, w3).to(tl.int32, bitcast=True)
    octets = _interleave4(words, words >> 8, words >> 16, words >> 24).to(tl.int8)
    mixed = tl.dot(octets, _sylvester(COLUMNS), out_dtype=tl.int32).to(tl.float32)
    # the half that centres a byte: 32 halves land on column 0 of a segment and cancel on the others. Added as an integer
    # it would become the product's accumulator, which then is two moves a z instead of none
    mixed = tl.where(((tl.arange(0, COLUMNS) & 31) == 0)[None, :], mixed + 16.0, mixed)
    return mixed * _HADAMARD


@jit
def rademacher_words(k0, k1, site, counter2, rows, units, ROUNDS: tl.constexpr, ASM: tl.constexpr):
    """The word of each unit's segment of 32 columns, uint32 [R, U]; ``counter2`` is query << 8."""
    w0, w1, w2, w3 = philox(site, units >> 7, counter2 | _S_RADEMACHER, rows, k0, k1, ROUNDS, ASM)
    word = (units >> 5) & 3
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@jit
def _rademacher(k0, k1, site, counter2, rows, units, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr):
    """One bit a column, moved to the sign bit of 1.0: column c of a word has bit (c & 1) * 16 + (c >> 1)."""
    w = rademacher_words(k0, k1, site, counter2, rows, units, ROUNDS, ASM)
    base = units & 31
    if UNIT == 1:
        x = w << (31 - ((base & 1) * 16 + (base >> 1)))
    else:
        # the unit's last column moves least; every join doubles the columns, most significant bit of the column first
        x = w << (15 - (base >> 1) - ((UNIT - 1) >> 1))
        if UNIT >= 32:
            x = tl.join(x << 8, x)
        if UNIT >= 16:
            x = tl.join(x << 4, x)
        if UNIT >= 8:
            x = tl.join(x << 2, x)
        if UNIT >= 4:
            x = tl.join(x << 1, x)
        x = tl.reshape(tl.join(x << 16, x), (w.shape[0], w.shape[1] * UNIT))
    return ((x & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)


@jit
def sparse_int8_units(k0, k1, site, query, rows, units, ROUNDS: tl.constexpr, ASM: tl.constexpr, packed):
    """z of ``sparse_int8`` as int32 [R, 4 U], no float on the way; arguments as :func:`z_units`, whose z is float(this)."""
    counter2 = query.to(tl.uint32) << 8 | _S_SPARSE_INT8
    w0, w1, w2, w3 = philox(site.to(tl.uint32), units >> 2, counter2, rows, k0, k1, ROUNDS, ASM)
    return _interleave4(
        _sparse_int8(w0, packed, ASM), _sparse_int8(w1, packed, ASM),
        _sparse_int8(w2, packed, ASM), _sparse_int8(w3, packed, ASM),
    )  # fmt: skip


@jit
def z_units(
    k0, k1, site, query, rows, units,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr, threshold, scale,
):  # fmt: skip
    """z of a tile.

    Args:
        k0, k1: uint32, the folded key (:func:`load_key`).
        site, query: int32 or uint32 scalars (``site`` by its bits).
        rows: uint32 [R, 1]. ``hadamard`` needs R >= 16.
        units: uint32 [1, U], first column of each unit; multiples of UNIT.
        NOISE: a value of :data:`NOISE_ID`.
        ROUNDS: 7 or 10.
        UNIT: columns of a unit, as in the table :data:`UNIT`; for rademacher also any smaller power of two.
        ASM: inline PTX; False in the interpreter.
        threshold: T of the sparse noises, int32; plus r_max << 16 for sparse_int8 (:func:`noise_args`).
        scale: ``Noise.scale``, fp32, of sparse.

    Returns:
        fp32 [R, U * UNIT].
    """
    site = site.to(tl.uint32)
    counter2 = query.to(tl.uint32) << 8
    if NOISE == HADAMARD:
        z = _hadamard(k0, k1, site, counter2 | _S_HADAMARD, rows, units, ROUNDS, ASM)
    elif NOISE == RADEMACHER:
        z = _rademacher(k0, k1, site, counter2, rows, units, ROUNDS, UNIT, ASM)
    elif NOISE == SPARSE:
        w0, w1, w2, w3 = philox(site, units >> 2, counter2 | _S_GAUSSIAN, rows, k0, k1, ROUNDS, ASM)
        w4, w5, w6, w7 = philox(site, (units >> 2) + 1, counter2 | _S_GAUSSIAN, rows, k0, k1, ROUNDS, ASM)
        z0, z1 = _gaussian_pair(w0, w1)
        z2, z3 = _gaussian_pair(w2, w3)
        z4, z5 = _gaussian_pair(w4, w5)
        z6, z7 = _gaussian_pair(w6, w7)
        z = _interleave8(z0, z1, z2, z3, z4, z5, z6, z7)
        lanes = lane_units(k0, k1, site, counter2 | _S_MASK, rows, units, ROUNDS, ASM)
        z = tl.where(lanes >= threshold, z * scale, 0.0)
    elif NOISE == SPARSE_INT8:
        z = sparse_int8_units(k0, k1, site, query, rows, units, ROUNDS, ASM, threshold).to(tl.float32)
    else:
        stream: tl.constexpr = _S_CLT4 if NOISE == CLT4 else _S_UNIFORM if NOISE == UNIFORM else _S_GAUSSIAN
        w0, w1, w2, w3 = philox(site, units >> 2, counter2 | stream, rows, k0, k1, ROUNDS, ASM)
        if NOISE == GAUSSIAN:
            z0, z1 = _gaussian_pair(w0, w1)
            z2, z3 = _gaussian_pair(w2, w3)
        elif NOISE == GAUSSIAN_FAST:
            z0, z1 = _gaussian_fast_pair(w0, w1, ASM)
            z2, z3 = _gaussian_fast_pair(w2, w3, ASM)
        elif NOISE == CLT4:
            z0, z1 = _clt4(w0, ASM), _clt4(w1, ASM)
            z2, z3 = _clt4(w2, ASM), _clt4(w3, ASM)
        else:
            z0, z1 = _signed(w0) * _UNIFORM, _signed(w1) * _UNIFORM
            z2, z3 = _signed(w2) * _UNIFORM, _signed(w3) * _UNIFORM
        z = _interleave4(z0, z1, z2, z3)
    return z


# ------------------------------------------------------------------------------------------------------------ launches


#: Whether kernels run compiled, with inline PTX, or in Triton's interpreter.
ASM = triton is not None and isinstance(philox, triton.JITFunction)


def signed32(site: int) -> int:
    """A uint32 as the int32 of the same bits: every launch then passes the same type, whatever the value."""
    return site - (1 << 32) if site >= 1 << 31 else site


def noise_args(noise) -> tuple[int, float]:
    """``threshold`` and ``scale`` of :func:`z_units`."""
    packed = noise.threshold + (noise.r_max << 16 if noise.name == "sparse_int8" else 0)
    return packed, noise.scale


def noise_constexprs(noise, columns: int) -> dict:
    """NOISE, ROUNDS, UNIT and ASM of a tile of ``columns`` columns, a multiple of the unit of all but rademacher."""
    return {
        "NOISE": NOISE_ID[noise.name],
        "ROUNDS": noise.rounds,
        "UNIT": min(UNIT[noise.name], columns) if noise.name == "rademacher" else UNIT[noise.name],
        "ASM": ASM,
    }

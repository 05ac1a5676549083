"""Every noise again, from docs/rng.md alone: Python integers and fractions, one element at a time.

It shares with the package only the fp32 coefficients of the pinned polynomials, which the document keeps there.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

from ezo_kernels.ops import _constants as C

_U32 = 0xFFFFFFFF
STREAM = {"gaussian": 0, "rademacher": 1, "sparse_int8": 3, "clt4": 6, "uniform": 7, "hadamard": 8, "sparse": 0}
SEGMENT = {"gaussian": 4, "clt4": 4, "uniform": 4, "hadamard": 32, "rademacher": 128, "sparse": 8, "sparse_int8": 4}


def philox(counter, key, rounds):
    """Salmon et al., SC'11: written from the paper."""
    x = list(counter)
    for r in range(rounds):
        k = [(key[0] + r * 0x9E3779B9) & _U32, (key[1] + r * 0xBB67AE85) & _U32]
        low, high = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(high >> 32) ^ x[1] ^ k[0], high & _U32, (low >> 32) ^ x[3] ^ k[1], low & _U32]
    return tuple(x)


def key_of(seed: int, step: int) -> tuple[int, int]:
    return philox((step % 2**32, step >> 32, 0, 0x455A4F31), (seed % 2**32, seed >> 32), 10)[:2]


def lane(words, column: int) -> int:
    return words[(column % 8) // 2] >> 16 * (column % 2) & 0xFFFF


def signed(word: int, bits: int = 32) -> int:
    return word - (1 << bits) if word >> (bits - 1) else word


# ---- fp32, correctly rounded


def round32(value: Fraction) -> np.float32:
    """The nearest fp32, to even on ties: a fraction through fp64 alone would be rounded twice."""
    near = np.float32(float(value))
    best = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(best, key=lambda f: (abs(Fraction(float(f)) - value), int(f.view(np.int32)) & 1))


def fma(a, b, c) -> np.float32:
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:  # the sign of an exact zero is that of fp64's, which rounds nothing here
        return np.float32(float(a) * float(b) + float(c))
    return round32(exact)


def _bits(x) -> int:
    return int(np.float32(x).view(np.int32))


def _from_bits(i: int) -> np.float32:
    return np.int32(signed(i & _U32)).view(np.float32)


def _horner(coefficients, x) -> np.float32:
    value = np.float32(coefficients[0])
    for c in coefficients[1:]:
        value = fma(value, x, np.float32(c))
    return value


def gaussian_pair(w0: int, w1: int) -> tuple[np.float32, np.float32]:
    """docs/rng.md, section gaussian, line for line."""
    f = np.float32
    u = fma(round32(Fraction(w0)), f(2.0**-32), f(2.0**-33))
    i = _bits(u)
    e = signed((i - 0x3F3504F3) & 0xFF800000)
    t = _from_bits(i - e) - f(1)
    v = fma(_horner(C.LOG_P, t), t, f(e) * f(C.LOG_C))
    y = _from_bits(0x5F376908 - (_bits(v) >> 1))
    h = v * f(-0.5)
    for _ in range(2):
        y = y * fma(h * y, y, f(1.5))
    r = v * y
    r = fma(fma(-r, r, v), f(0.5) * y, r)
    x = round32(Fraction(signed(w1 << 1 & _U32))) * f(2.0**-32)
    x2 = x * x
    if w1 >> 31:
        r = -r
    return r * _horner(C.COS_P, x2), (r * x) * _horner(C.SIN_P, x2)


# ---- one element


def element(noise, row, column, *, seed, step, site, query=0, rounds=7, p_zero=0.0, r_max=15):
    """z at one logical (row, column): np.float32, or int for sparse_int8."""
    key = key_of(seed, step)

    def block(index, stream):
        return philox((site, index, query << 8 | stream, row), key, rounds)

    stream, f = STREAM[noise], np.float32
    if noise in ("gaussian", "sparse"):
        words, j = block(column // 4, stream), column % 4
        z = gaussian_pair(*words[j // 2 * 2 : j // 2 * 2 + 2])[j % 2]
        if noise == "gaussian":
            return z
        threshold = round(65536 * p_zero)
        if lane(block(column // 8, 2), column) < threshold:
            return f(0)
        return z * f(math.sqrt(65536 / (65536 - threshold)))
    if noise == "clt4":
        s = f(sum(block(column // 4, stream)[column % 4].to_bytes(4, "little")) - 510)
        return s * (f(C.CLT4_A) + f(C.CLT4_B) * (s * s))
    if noise == "uniform":
        return round32(Fraction(signed(block(column // 4, stream)[column % 4]))) * f(math.sqrt(3) * 2.0**-31)
    if noise == "rademacher":
        c = column % 128
        bit = block(column // 128, stream)[c // 32] >> ((c & 1) * 16 + ((c & 31) >> 1)) & 1
        return f(-1) if bit else f(1)
    if noise == "hadamard":
        segment, n = divmod(column, 32)
        words = itertools.chain(block(2 * segment, stream), block(2 * segment + 1, stream))
        values = [signed(b, 8) for w in words for b in w.to_bytes(4, "little")]
        total = sum(v * (-1) ** (m & n).bit_count() for m, v in enumerate(values)) + (16 if n == 0 else 0)
        return f(total) * f(1 / math.sqrt(32 * 5461.25))
    assert noise == "sparse_int8", noise
    word = block(column // 4, stream)[column % 4]
    if word >> 16 < round(65536 * p_zero):
        return 0
    return ((word & 0xFFFF) * (2 * r_max + 1) >> 16) - r_max


def gaussian_truth(words0: np.ndarray, words1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The exact transform of the same fp32 uniforms, in fp64."""
    u = (words0.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    x = (words1 << np.uint32(1)).view(np.int32).astype(np.float32).astype(np.float64) * 2.0**-32
    r = np.sqrt(-2 * np.log(u)) * np.where(words1 >> np.uint32(31), -1.0, 1.0)
    return r * np.cos(np.pi * x), r * np.sin(np.pi * x)

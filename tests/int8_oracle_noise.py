"""The noise of :mod:`tests.int8_oracle`, from docs/rng.md alone; it imports nothing that computes, either."""

from __future__ import annotations

import math

_U32 = 0xFFFFFFFF
SPARSE_INT8, ROUNDING = 3, 4  # streams
SEGMENT = 4  # of sparse_int8


def philox(counter, key, rounds):
    """Salmon et al., SC'11."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(rounds):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k0, q & _U32, (p >> 32) ^ d ^ k1, p & _U32
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return a, b, c, d


def fold(seed, step):
    """The key of one step."""
    return philox((step & _U32, step >> 32, 0, 0x455A4F31), (seed & _U32, seed >> 32), 10)[:2]


def z_at(row, column, *, key, site, query, p_zero, r_max, rounds=7):
    word = philox((site, column // 4, query << 8 | SPARSE_INT8, row), key, rounds)[column % 4]
    high, low = word >> 16, word & 0xFFFF
    return 0 if high < round(65536 * p_zero) else (low * (2 * r_max + 1) >> 16) - r_max


def lane_at(row, column, *, key, site, query=0, rounds=7):
    """A 16-bit word of stream 4."""
    word = philox((site, column // 8, query << 8 | ROUNDING, row), key, rounds)[(column & 7) >> 1]
    return word >> 16 if column & 1 else word & 0xFFFF


def places(shape, conv):
    """(row, column) of every value of a tensor, in row-major order."""
    if not conv:
        columns = shape[-1]
        return [divmod(i, columns) for i in range(math.prod(shape))]
    outputs, inputs, taps = shape[0], shape[1], math.prod(shape[2:])
    padded = -(-inputs // SEGMENT) * SEGMENT
    return [(o, t * padded + c) for o in range(outputs) for c in range(inputs) for t in range(taps)]

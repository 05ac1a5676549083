"""Numbers of the noise contract (docs/rng.md), shared by every backend.

All are Python floats that are exactly representable in fp32, so that no backend rounds them differently.
"""

from __future__ import annotations

import math
import struct


def f32(value: float) -> float:
    """Nearest fp32 value, as a Python float."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


RNG_VERSION = "ezo-1"
ROUNDS = (7, 10)

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
KEY_TAG = 0x455A4F31

STREAM_GAUSSIAN, STREAM_RADEMACHER, STREAM_MASK, STREAM_SPARSE_INT8 = 0, 1, 2, 3
STREAM_ROUNDING, STREAM_DROPOUT, STREAM_CLT4, STREAM_UNIFORM, STREAM_HADAMARD = 4, 5, 6, 7, 8
STREAM_IMPORTANCE = 9

# Exact Gaussian: -2 ln(1 + t) / t on [sqrt(1/2) - 1, sqrt(2) - 1], degree 7, highest power first.
LOG_P = tuple(
    map(
        f32,
        (
            0.20754588545,
            -0.32675156692,
            0.34425281159,
            -0.39768627803,
            0.4994310019,
            -0.6667121041,
            1.0000068884,
            -1.999999835977,
        ),
    )
)
LOG_SPLIT = 0x3F3504F3  # bits of sqrt(1/2)
LOG_C = f32(-2.0 * math.log(2.0) / 2.0**23)
RSQRT_MAGIC = 0x5F376908
# sin(pi x) / x and cos(pi x) on [-1/2, 1/2) in x^2, highest power first.
SIN_P = tuple(map(f32, (0.0776593983, -0.598292154507, 2.55007765895, -5.16771009, 3.14159264)))
COS_P = tuple(map(f32, (0.219696757, -1.33188014, 4.05841191, -4.9347928585, 0.99999995)))

# clt4: z = s (A + B s^2), s = byte sum - 510; the cubic makes the variance 1 and the kurtosis 3.
_CLT_B, _CLT_A = 0.01964354984265136, 0.9490332780957842
CLT4_A = f32(_CLT_A / math.sqrt(21845.0))
CLT4_B = f32(_CLT_A * _CLT_B / 21845.0**1.5)

UNIFORM_SCALE = f32(math.sqrt(3.0) / 2.0**31)
HADAMARD_SCALE = f32(1.0 / math.sqrt(32.0 * 5461.25))

# Integers (docs/numerics.md, section Integers).
INT8_VERSION = "ezo-int8-1"
#: log2(e) = 47274 * 2^-15, as NITI has it.
LOG2_E, LOG2_E_BITS = 47274, 15
#: A bias that meets an accumulator, and the larger of two summands, are shifted left at most so far.
BIAS_SHIFT, ADD_SHIFT = 22, 16
#: A logit with its fraction bits is shifted left at most so far: a row's loss then stays below 2^44.
LOGIT_SHIFT = 20
#: ROOTS[k] = round(2^(30 - 2^-k)): factors of the integer exponential, one for each bit of a fraction.
ROOTS = (1 << 30, 759250125, 902905651, 984625594, 1028218693, 1050733751, 1062175491, 1067942999, 1070838486)
MOST_FRACTION_BITS = len(ROOTS) - 1
#: Products of int8 numbers (at most 127 * 128 each) that int32 holds the sum of, with a bias.
MOST_TERMS = (2**31 - 1 - 127 * 2**BIAS_SHIFT) // (127 * 128)

"""Integer kernels on the CPU (numba): the reference of docs/numerics.md, section Integers, and fast enough to train with.

Integers only: sums are int32 and exact, so their order does not matter. Arrays are C-contiguous unless said.
"""

from __future__ import annotations

import functools
import threading

import numpy as np
from numba import njit

from ._constants import ADD_SHIFT, BIAS_SHIFT
from ._jit import kept as _jit

i8, i32, i64, u16, u64 = np.int8, np.int32, np.int64, np.uint16, np.uint64

_inline = functools.partial(njit, nogil=True, inline="never", error_model="numpy")

_kept = threading.local()


def workspace(name: str, size: int, dtype) -> np.ndarray:
    """An uninitialised array that the next call of the same name in this thread gets again: fresh memory costs page faults."""
    array = getattr(_kept, name, None)
    if array is None or array.nbytes < size * np.dtype(dtype).itemsize:
        array = np.empty(size * np.dtype(dtype).itemsize, np.uint8)
        setattr(_kept, name, array)
    return array[: size * np.dtype(dtype).itemsize].view(dtype)


NEAREST, PSEUDO, STOCHASTIC = 0, 1, 2
#: What a product leaves behind: its accumulators, nothing but their largest magnitude, or their requantised values.
STORE, PEAK, REQUANTIZE = 0, 1, 2


@_inline()
def bit_length(x):
    """Bits of a non-negative integer; 0 of 0."""
    n = 0
    while x > 0:
        x >>= 1
        n += 1
    return n


@_inline()
def round_shift(x, n, mode, lane):
    """x / 2^n as an integer by rounding ``mode``; n >= 0, ``lane`` uniform in [0, 65536) for STOCHASTIC."""
    if n == 0:
        return x
    magnitude = -x if x < 0 else x
    n = min(n, 62)
    q = magnitude >> n
    p = magnitude & ((i64(1) << n) - 1)
    if mode == NEAREST:
        q += (p >> (n - 1)) & 1
    elif mode == PSEUDO:
        half = n >> 1
        low = p & ((i64(1) << half) - 1)
        if n & 1:
            low <<= 1
        if (p >> half) > low:
            q += 1
    elif n <= 16:
        if p > (i64(lane) >> (16 - n)):
            q += 1
    elif (p >> (n - 16)) > i64(lane):
        q += 1
    return -q if x < 0 else q


@_inline()
def shifted(x, k, most):
    """x * 2^k: to the left by at most ``most``, to the right rounded to nearest."""
    if k >= 0:
        return i64(x) << min(k, most)
    return round_shift(i64(x), -k, NEAREST, 0)


@_inline()
def clamp8(x):
    return min(max(x, -127), 127)


@_jit()
def round_array(x, n, mode, lanes, out):
    """out = clamp(round(x / 2^n)) of flat arrays: x int32, ``lanes`` of x's length for STOCHASTIC, out int8."""
    for i in range(x.size):
        out[i] = i8(clamp8(round_shift(i64(x[i]), n, mode, lanes[i] if mode == STOCHASTIC else u16(0))))


@_jit()
def perturb(w, taps, z, sign, out):
    """out = clamp(w + sign z): flat int8 of [rows, channels, taps], z int8 [rows, columns] in padded logical order."""
    rows, columns = z.shape
    channels = w.size // (rows * taps)
    padded = columns // taps
    flat = z.reshape(-1)
    n = u64(channels)
    k = i32(sign)
    for r in range(rows):
        for t in range(taps):
            at, from_z = u64(r * channels * taps + t), u64(r * columns + t * padded)
            if taps == 1:
                for c in range(n):
                    out[at + c] = i8(min(max(i32(w[at + c]) + k * i32(flat[from_z + c]), i32(-127)), i32(127)))
            else:
                for c in range(n):
                    to = at + c * u64(taps)
                    out[to] = i8(min(max(i32(w[to]) + k * i32(flat[from_z + c]), i32(-127)), i32(127)))


@_jit()
def align_bias(bias, exponent, x_exponent, w_exponent, out):
    """A bias in the unit of the accumulators: out int32 [N] = bias 2^(its exponent - x's - w's)."""
    k = exponent - x_exponent - w_exponent
    for i in range(bias.size):
        out[i] = i32(shifted(i64(bias[i]), k, BIAS_SHIFT))


@_inline()
def _quantized(v, n_shift, mode, least):
    """round(v / 2^n_shift) of an int32, from ``least``, -127 or 0, to 127; ``nearest`` in 32 bits, so loops become vectors."""
    if mode == NEAREST and n_shift > 0:
        a = abs(v)
        q = min((a >> i32(n_shift)) + ((a >> i32(n_shift - 1)) & i32(1)), i32(127))
        return i8(max(-q if v < 0 else q, least))
    return i8(max(clamp8(round_shift(i64(v), n_shift, mode, 0)), i64(least)))


@_jit()
def finish_linear(sums, bias, what, acc, n_shift, mode, relu, out):
    """What becomes of products ``sums`` [rows, N] that lack the bias [N]; the largest magnitude is returned.

    ``acc`` int32 [rows, N] is written by STORE (it may be ``sums``), ``out`` int8 [rows, N] by REQUANTIZE.
    """
    rows, n = sums.shape
    peak, least = i32(0), i32(0) if relu else i32(-127)
    for r in range(rows):
        for i in range(n):
            v = sums[r, i] + bias[i]
            peak = max(peak, abs(v))
            if what == STORE:
                acc[r, i] = v
            elif what == REQUANTIZE:
                out[r, i] = _quantized(v, n_shift, mode, least)
    return peak


@_jit()
def requantize(acc, n_shift, mode, relu, out):
    """out int8 = clamp(round(acc / 2^n_shift)) of flat arrays, or a relu of it; ``mode`` not STOCHASTIC."""
    least = i32(0) if relu else i32(-127)
    if mode == NEAREST and n_shift > 0:
        down, half = i32(n_shift), i32(n_shift - 1)
        for i in range(acc.size):
            v = acc[i]
            a = abs(v)
            q = min((a >> down) + ((a >> half) & i32(1)), i32(127))
            out[i] = i8(max(-q if v < 0 else q, least))
    else:
        for i in range(acc.size):
            out[i] = i8(max(clamp8(round_shift(i64(acc[i]), n_shift, mode, 0)), i64(least)))


@_jit()
def relu(x, out):
    """max(x, 0) of flat arrays."""
    for i in range(x.size):
        out[i] = max(x[i], i8(0))


@_inline()
def _pool_pairs(x, planes, height, width, w, out):
    """Windows of 2 x 2 of flat planes, each twice as high and w wide."""
    n = u64(width)
    for line in range(planes * height):
        top, to = u64(2 * line * w), u64(line * width)
        low = top + u64(w)
        for q in range(n):
            d = q + q
            out[to + q] = max(max(x[top + d], x[top + d + u64(1)]), max(x[low + d], x[low + d + u64(1)]))


@_jit()
def max_pool2d(x, kh, kw, stride_h, stride_w, pad_h, pad_w, out):
    """x, out int8 [planes, H, W]; padding is below every value."""
    planes, height, width = out.shape
    if kh == kw == stride_h == stride_w == 2 and pad_h == pad_w == 0 and x.shape[1] == 2 * height:
        _pool_pairs(x.reshape(-1), planes, height, width, x.shape[2], out.reshape(-1))
        return
    for b in range(planes):
        for p in range(height):
            for q in range(width):
                best = -128
                for r in range(kh):
                    y = p * stride_h - pad_h + r
                    for s in range(kw):
                        xx = q * stride_w - pad_w + s
                        if 0 <= y < x.shape[1] and 0 <= xx < x.shape[2]:
                            best = max(best, i32(x[b, y, xx]))
                out[b, p, q] = i8(best)


@_jit()
def avg_pool2d(x, kh, kw, stride_h, stride_w, pad_h, pad_w, out):
    """x, out int8 [planes, H, W]: sum over the window, padding counted as zeros, divided, halves away from zero."""
    planes, height, width = out.shape
    count = kh * kw
    for b in range(planes):
        for p in range(height):
            for q in range(width):
                total = 0
                for r in range(kh):
                    y = p * stride_h - pad_h + r
                    for s in range(kw):
                        xx = q * stride_w - pad_w + s
                        if 0 <= y < x.shape[1] and 0 <= xx < x.shape[2]:
                            total += i32(x[b, y, xx])
                mean = (2 * abs(total) + count) // (2 * count)
                out[b, p, q] = i8(-mean if total < 0 else mean)


@_inline()
def _sum_of(a, b, a_shift, b_shift):
    return shifted(i64(a), a_shift, ADD_SHIFT) + shifted(i64(b), b_shift, ADD_SHIFT)


@_jit()
def add(a, b, a_shift, b_shift, what, n_shift, out):
    """out = clamp(round((a 2^a_shift + b 2^b_shift) / 2^n_shift)) if REQUANTIZE; the largest magnitude of a sum is returned."""
    peak = i64(0)
    for i in range(a.size):
        v = _sum_of(a[i], b[i], a_shift, b_shift)
        if what == REQUANTIZE:
            out[i] = i8(clamp8(round_shift(v, n_shift, NEAREST, 0)))
        peak = max(peak, -v if v < 0 else v)
    return peak


# --------------------------------------------------------------------------------------------------------------- updates


@_jit()
def accumulate(total, z, g):
    """total += g z: total int32 [rows, columns], z int8 of the same shape."""
    for r in range(z.shape[0]):
        for c in range(z.shape[1]):
            total[r, c] += g * i32(z[r, c])


@_jit()
def update(w, taps, total, n_shift, mode, lanes):
    """w = clamp(w - round(total / 2^n_shift)), in place; w flat int8 of [rows, channels, taps], total int32 [rows, columns]."""
    rows, columns = total.shape
    channels = w.size // (rows * taps)
    padded = columns // taps
    flat, words = total.reshape(-1), lanes.reshape(-1)
    for r in range(rows):
        for t in range(taps):
            to, at = u64(r * channels * taps + t), u64(r * columns + t * padded)
            for c in range(u64(channels)):
                v = flat[at + c]
                if v != 0:  # most of a sparse z
                    i = to + c * u64(taps)
                    lane = words[at + c] if mode == STOCHASTIC else u16(0)
                    w[i] = i8(clamp8(i64(w[i]) - round_shift(i64(v), n_shift, mode, lane)))


@_jit()
def update_finely(w, remainder, grad, n_shift, mode, lanes):
    """256 w + remainder = clamp(256 w + remainder - round(grad / 2^n_shift)), in place; all flat, w the nearest int8."""
    words = lanes.reshape(-1)
    for i in range(w.size):
        v = i64(grad[i])
        if v != 0:
            lane = words[i] if mode == STOCHASTIC else u16(0)
            step = round_shift(v, n_shift, mode, lane) if n_shift > 0 else v << -n_shift
            fine = max(i64(-127 * 256), min(i64(127 * 256), i64(w[i]) * 256 + i64(remainder[i]) - step))
            w[i] = i8((fine + 128) >> 8)
            remainder[i] = i8(fine - i64(w[i]) * 256)


@_jit()
def largest(x):
    """Largest magnitude in a flat int32 array."""
    peak = i32(0)
    for i in range(x.size):
        peak = max(peak, abs(x[i]))
    return peak


@_jit()
def sum_aligned(parts, exponents, out):
    """out int32 [n] = sum over groups of parts [G, n] at the largest exponent; the largest magnitude is returned."""
    top = exponents.max()
    out[:] = 0
    for g in range(len(parts)):
        shift = top - exponents[g]
        for i in range(out.size):
            v = i64(parts[g, i])
            out[i] += i32(round_shift(v, shift, NEAREST, 0)) if shift > 0 else i32(v)
    return largest(out)

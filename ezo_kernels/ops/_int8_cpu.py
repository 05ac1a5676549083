"""Integer kernels on the CPU (numba): the reference of docs/numerics.md, section Integers, and fast enough to train with.

Integers only: sums are int32 and exact, so their order does not matter. Arrays are C-contiguous unless said.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import njit

from ._constants import ADD_SHIFT, BIAS_SHIFT, LOG2_E, LOG2_E_BITS

i8, i32, i64, u16 = np.int8, np.int32, np.int64, np.uint16

_jit = functools.partial(njit, nogil=True, cache=True, error_model="numpy")
_inline = functools.partial(njit, nogil=True, inline="never", error_model="numpy")

NEAREST, PSEUDO, STOCHASTIC = 0, 1, 2
#: What a product leaves behind: its accumulators, nothing but their largest magnitude, or their requantised values.
STORE, PEAK, REQUANTIZE = 0, 1, 2
#: Rows of a linear layer that are multiplied at a time.
_ROWS = 64


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
def perturb(w, z, sign, out):
    """out = clamp(w + sign z): int8 [rows, taps, channels] of any strides, z int8 [rows, columns] in padded order."""
    rows, taps, channels = w.shape
    padded = z.shape[1] // taps
    for r in range(rows):
        for t in range(taps):
            for c in range(channels):
                out[r, t, c] = i8(clamp8(i32(w[r, t, c]) + sign * i32(z[r, t * padded + c])))


@_jit()
def align_bias(bias, exponent, x_exponent, w_exponent, out):
    """A bias in the unit of the accumulators: out int32 [N] = bias 2^(its exponent - x's - w's)."""
    k = exponent - x_exponent - w_exponent
    for i in range(bias.size):
        out[i] = i32(shifted(i64(bias[i]), k, BIAS_SHIFT))


@_inline()
def _gemm(w, columns, m, acc):
    """acc[i, :m] = sum_k w[i, k] columns[k, :m]; two rows by four k at a time, for the vector registers."""
    n, k = w.shape
    fours = k // 4 * 4
    pairs = n // 2 * 2
    for i in range(0, pairs, 2):
        for x in range(m):
            acc[i, x] = 0
        for x in range(m):
            acc[i + 1, x] = 0
        for j in range(0, fours, 4):
            a, b, c, d = i32(w[i, j]), i32(w[i, j + 1]), i32(w[i, j + 2]), i32(w[i, j + 3])
            e, f, g, h = i32(w[i + 1, j]), i32(w[i + 1, j + 1]), i32(w[i + 1, j + 2]), i32(w[i + 1, j + 3])
            for x in range(m):
                p, q = i32(columns[j, x]), i32(columns[j + 1, x])
                r, s = i32(columns[j + 2, x]), i32(columns[j + 3, x])
                acc[i, x] += a * p + b * q + c * r + d * s
                acc[i + 1, x] += e * p + f * q + g * r + h * s
        for j in range(fours, k):
            a, b = i32(w[i, j]), i32(w[i + 1, j])
            for x in range(m):
                acc[i, x] += a * i32(columns[j, x])
                acc[i + 1, x] += b * i32(columns[j, x])
    for i in range(pairs, n):
        for x in range(m):
            acc[i, x] = 0
        for j in range(k):
            a = i32(w[i, j])
            for x in range(m):
                acc[i, x] += a * i32(columns[j, x])


@_inline()
def _add_bias(acc, bias, m, peak):
    """Add the bias to acc [N, :m], in place; the largest magnitude of ``peak`` and the sums."""
    for i in range(acc.shape[0]):
        for x in range(m):
            v = acc[i, x] + bias[i]
            acc[i, x] = v
            peak = max(peak, -v if v < 0 else v)
    return peak


@_jit()
def linear(x, w, bias, what, acc, n_shift, mode, out):
    """One group's x w^T + bias; x int8 [rows, K] (any strides), w int8 [N, K], bias int32 [N].

    ``acc`` int32 [rows, N] is written by STORE, ``out`` int8 [rows, N] by REQUANTIZE;
    the largest magnitude of an accumulator is returned.
    """
    rows, k = x.shape
    n = w.shape[0]
    columns = np.empty((k, _ROWS), np.int8)
    sums = np.empty((n, _ROWS), np.int32)
    peak = i32(0)
    for first in range(0, rows, _ROWS):
        m = min(_ROWS, rows - first)
        for r in range(m):
            for j in range(k):
                columns[j, r] = x[first + r, j]
        _gemm(w, columns, m, sums)
        peak = _add_bias(sums, bias, m, peak)
        if what == STORE:
            for r in range(m):
                for i in range(n):
                    acc[first + r, i] = sums[i, r]
        elif what == REQUANTIZE:
            for r in range(m):
                for i in range(n):
                    out[first + r, i] = i8(clamp8(round_shift(i64(sums[i, r]), n_shift, mode, 0)))
    return peak


@_inline()
def _im2col(x, kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, height, width, columns):
    """columns [C KH KW, H' W'] of one image x [C, H, W], zero outside of it."""
    k = 0
    for c in range(x.shape[0]):
        for r in range(kh):
            for s in range(kw):
                at = 0
                for p in range(height):
                    y = p * stride_h - pad_h + r * dilation_h
                    if y < 0 or y >= x.shape[1]:
                        for q in range(width):
                            columns[k, at + q] = 0
                    else:
                        for q in range(width):
                            xx = q * stride_w - pad_w + s * dilation_w
                            columns[k, at + q] = x[c, y, xx] if 0 <= xx < x.shape[2] else i8(0)
                    at += width
                k += 1


@_jit()
def conv2d(
    x, w, bias, kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, height, width,
    what, acc, n_shift, mode, out,
):  # fmt: skip
    """One group's convolution; x int8 [B, C, H, W], w int8 [O, C / groups KH KW], bias int32 [O].

    ``acc`` int32 and ``out`` int8 [B, O, H' W'] as in :func:`linear`.
    """
    outputs, k = w.shape
    per_group, channels = outputs // groups, x.shape[1] // groups
    m = height * width
    columns = np.empty((k, m), np.int8)
    sums = np.empty((per_group, m), np.int32)
    peak = i32(0)
    for b in range(x.shape[0]):
        for g in range(groups):
            _im2col(
                x[b, g * channels : (g + 1) * channels], kh, kw, stride_h, stride_w, pad_h, pad_w,
                dilation_h, dilation_w, height, width, columns,
            )  # fmt: skip
            o = g * per_group
            _gemm(w[o : o + per_group], columns, m, sums)
            peak = _add_bias(sums, bias[o : o + per_group], m, peak)
            if what == STORE:
                acc[b, o : o + per_group] = sums
            elif what == REQUANTIZE:
                for i in range(per_group):
                    for y in range(m):
                        out[b, o + i, y] = i8(clamp8(round_shift(i64(sums[i, y]), n_shift, mode, 0)))
    return peak


@_jit()
def requantize(acc, n_shift, mode, out):
    """out int8 = clamp(round(acc / 2^n_shift)) of flat arrays, ``mode`` not STOCHASTIC."""
    for i in range(acc.size):
        out[i] = i8(clamp8(round_shift(i64(acc[i]), n_shift, mode, 0)))


@_jit()
def relu(x, out):
    """max(x, 0) of flat arrays."""
    for i in range(x.size):
        out[i] = max(x[i], i8(0))


@_jit()
def max_pool2d(x, kh, kw, stride_h, stride_w, pad_h, pad_w, out):
    """x, out int8 [planes, H, W]; padding is below every value."""
    planes, height, width = out.shape
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


# ---------------------------------------------------------------------------------------------------------------- losses


@_inline()
def exp2_fraction(f, fraction, roots):
    """2^(30 - f / 2^fraction) for 0 <= f < 2^fraction: a product over the bits of f; ``roots[k]`` = 2^(30 - 2^-k)."""
    e = i64(1) << 30
    for k in range(1, fraction + 1):
        if (f >> (fraction - k)) & 1:
            e = (e * roots[k]) >> 30
    return e


@_inline()
def log2_fraction(s, fraction):
    """floor(2^fraction log2(s)) of s >= 1, by repeated squaring of a 31-bit mantissa."""
    n = bit_length(s) - 1
    m = s >> (n - 30) if n > 30 else s << (30 - n)
    out = i64(n)
    for _ in range(fraction):
        m = (m * m) >> 30
        out <<= 1
        if m >> 31:
            m >>= 1
            out += 1
    return out


@_inline()
def _logit(v, exponent, fraction):
    """log2(e) v 2^exponent with ``fraction`` bits behind the point, rounded down."""
    k = exponent - LOG2_E_BITS + fraction
    t = i64(v) * LOG2_E
    return t << min(k, 32) if k >= 0 else t >> min(-k, 62)


@_jit()
def cross_entropy(logits, exponent, labels, fraction, roots):
    """sum over rows of log2(e) (log sum_j exp(logit_j) - logit_label), in units of 2^-fraction; logits int8 [rows, classes]."""
    rows, classes = logits.shape
    total = i64(0)
    for r in range(rows):
        top = _logit(logits[r, 0], exponent, fraction)
        for j in range(1, classes):
            top = max(top, _logit(logits[r, j], exponent, fraction))
        s = i64(0)
        for j in range(classes):
            below = top - _logit(logits[r, j], exponent, fraction)
            whole = below >> fraction
            if whole < 31:
                s += exp2_fraction(below & ((i64(1) << fraction) - 1), fraction, roots) >> whole
        total += (
            top - _logit(logits[r, labels[r]], exponent, fraction) + log2_fraction(s, fraction) - (i64(30) << fraction)
        )
    return total


@_jit()
def cross_entropy_gradient(logits, exponent, labels, lanes, out, weights):
    """NITI's integer softmax minus one-hot, out int8 [rows, classes]; ``weights`` int64 [classes] is scratch.

    Before the final stochastic shift by 4 the entries of a row sum to about zero, in units of 2^-11.
    """
    rows, classes = logits.shape
    for r in range(rows):
        niti_weights(logits[r], exponent, weights)
        total = i64(0)
        for j in range(classes):
            total += weights[j]
        given = i64(0)
        for j in range(classes):
            weights[j] = (weights[j] << 11) // total
            given += weights[j]
        weights[labels[r]] -= given
        for j in range(classes):
            out[r, j] = i8(clamp8(round_shift(weights[j], 4, STOCHASTIC, lanes[r, j])))


@_jit()
def niti_weights(logits, exponent, out):
    """Unnormalised softmax weights of one row (NITI's two branches), int64 [classes]; positive in sum."""
    classes = logits.shape[0]
    if exponent > -7:
        top = i64(-(1 << 62))
        for j in range(classes):
            t = i64(logits[j]) * LOG2_E
            t = t >> LOG2_E_BITS if t >= 0 else -((-t) >> LOG2_E_BITS)
            if exponent >= 0:
                t <<= min(exponent, 32)
            else:
                t = t >> -exponent if t >= 0 else -((-t) >> -exponent)
            out[j] = t
            top = max(top, t)
        for j in range(classes):
            out[j] = (i64(1) << max(out[j] - (top - 10), i64(0))) - 1
    else:
        s = max(exponent, -24)
        for j in range(classes):
            v = i64(logits[j]) >> min(s - exponent, 62)
            out[j] = (i64(1) << (1 - 2 * s)) + (v << (1 - s)) + v * v


@_jit()
def difference(y, exponent, target, target_exponent, fraction, out):
    """y - target in units of 2^(target's exponent - fraction), clamped to 21 bits; out int64, flat."""
    limit = i64(1) << 20
    for i in range(y.size):
        d = shifted(i64(y[i]), exponent - target_exponent + fraction, 24) - (i64(target[i]) << fraction)
        out[i] = min(max(d, -limit), limit)


# --------------------------------------------------------------------------------------------------------------- updates


@_jit()
def accumulate(total, z, g):
    """total += g z: total int32 [rows, columns], z int8 of the same shape."""
    for r in range(z.shape[0]):
        for c in range(z.shape[1]):
            total[r, c] += g * i32(z[r, c])


@_jit()
def update(w, total, n_shift, mode, lanes):
    """w = clamp(w - round(total / 2^n_shift)), in place; w int8 [rows, taps, channels], total int32 [rows, columns]."""
    rows, taps, channels = w.shape
    padded = total.shape[1] // taps
    for r in range(rows):
        for t in range(taps):
            for c in range(channels):
                at = t * padded + c
                lane = lanes[r, at] if mode == STOCHASTIC else u16(0)
                w[r, t, c] = i8(clamp8(i64(w[r, t, c]) - round_shift(i64(total[r, at]), n_shift, mode, lane)))


@_jit()
def add_aligned(total, part, n_shift):
    """total += round(part / 2^n_shift) of flat int32 arrays."""
    for i in range(part.size):
        total[i] += i32(round_shift(i64(part[i]), n_shift, NEAREST, 0))

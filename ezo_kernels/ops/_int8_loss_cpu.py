"""Integer losses and the head's first error on the CPU (numba): the reference of docs/numerics.md, section Integers."""

from __future__ import annotations

from ._constants import LOG2_E, LOG2_E_BITS, LOGIT_SHIFT
from ._int8_cpu import STOCHASTIC, _inline, _jit, bit_length, clamp8, i8, i64, round_shift, shifted


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
    return t << min(k, LOGIT_SHIFT) if k >= 0 else t >> min(-k, 62)


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

"""What is around the product of an integer convolution on the CPU (numba): unfolding before, rounding and pooling after it."""

from __future__ import annotations

import numpy as np

from ._int8_cpu import NEAREST, REQUANTIZE, STORE, _jit, clamp8, i8, i32, i64, round_shift, u64


@_jit()
def _round_planes(sums, at, n, bias, n_shift, mode, planes):
    """planes int8 [n] = the quantised sums from ``at`` on, a flat array."""
    if mode == NEAREST and n_shift > 0:
        down, half = i32(n_shift), i32(n_shift - 1)
        for x in range(n):
            v = sums[at + x] + bias
            a = abs(v)
            q = min((a >> down) + ((a >> half) & i32(1)), i32(127))
            planes[x] = i8(-q if v < 0 else q)
    else:
        for x in range(n):
            planes[x] = i8(clamp8(round_shift(i64(sums[at + x] + bias), n_shift, mode, 0)))


@_jit()
def _largest_of(sums, at, n, bias, counts, tops):
    """tops int32 [n] = the largest magnitude so far at each place that counts (-1, others 0)."""
    for x in range(n):
        tops[x] = max(tops[x], abs(sums[at + x] + bias) & counts[x])


@_jit()
def _pool_lines(planes, lines, width, pitch, step, least, rows, out, to):
    """out int8, from ``to`` on, = the largest of each window of ``step`` x ``step`` (1 or 2) of a plane, or ``least``."""
    n = u64(width // step)
    if step == 1:
        for p in range(lines):
            at, own = u64(p * pitch), to + u64(p) * n
            for x in range(n):
                out[own + x] = max(planes[at + x], least)
        return
    down = u64(pitch)
    for x in range(u64(planes.size) - down):
        rows[x] = max(planes[x], planes[x + down])
    for p in range(lines):
        at, own = u64(p * 2 * pitch), to + u64(p) * n
        for x in range(n):
            out[own + x] = max(max(rows[at + u64(2) * x], rows[at + u64(2) * x + u64(1)]), least)


@_jit()
def finish_conv2d(sums, bias, height, width, pitch, what, acc, first, total, n_shift, mode, relu, pool, out):
    """:func:`._int8_cpu.finish_linear` of ``sums`` [O, images, H' pitch], of each ``pitch`` the first W' count.

    ``acc`` int32 is [images, total, H' W'] and ``out`` int8 [images, total, (H' // pool) (W' // pool)], of whose channels these
    are ``first`` and the following. The largest magnitude is that of all positions, also of those in no window.
    Flat and unsigned indices, whole planes with what lies between their lines, and a function for each loop: a view, a sign, a
    short line or many arrays would keep LLVM from making vectors of it.
    """
    outputs, images, line = sums.shape
    flat, to32, to8 = sums.reshape(-1), acc.reshape(-1), out.reshape(-1)
    n = u64(line)
    tops, counts = np.zeros(line, np.int32), np.zeros(line, np.int32)
    plane, rows = np.empty(line, np.int8), np.empty(line, np.int8)
    for p in range(height):
        counts[p * pitch : p * pitch + width] = -1
    area = (height // pool) * (width // pool)
    for o in range(outputs):
        for i in range(images):
            at, own = u64((o * images + i) * line), i * total + first + o
            if what == REQUANTIZE:
                _round_planes(flat, at, n, bias[o], n_shift, mode, plane)
                least = i8(0) if relu else i8(-127)
                _pool_lines(plane, height // pool, width, pitch, pool, least, rows, to8, u64(own * area))
                continue
            _largest_of(flat, at, n, bias[o], counts, tops)
            if what == STORE:
                for p in range(height):
                    of, to = at + u64(p * pitch), u64((own * height + p) * width)
                    for x in range(u64(width)):
                        to32[to + x] = flat[of + x] + bias[o]
    return tops.max()


@_jit()
def pad(x, first, pad_h, pad_w, out):
    """out int8 [images, C, H + 2 pad_h, W + 2 pad_w] = channels ``first`` ... of x int8 [images, channels, H, W], in zeros."""
    images, channels, height, width = out.shape
    flat, to = x.reshape(-1), out.reshape(-1)
    to[:] = 0
    h, w = x.shape[2], u64(x.shape[3])
    for b in range(images):
        for c in range(channels):
            for y in range(h):
                at = u64(((b * x.shape[1] + first + c) * h + y) * x.shape[3])
                start = u64(((b * channels + c) * height + y + pad_h) * width + pad_w)
                for q in range(w):
                    to[start + q] = flat[at + q]


@_jit()
def im2col(x, images, channels, h, w, kh, kw, stride_h, stride_w, dilation_h, dilation_w, height, pitch, columns):
    """columns int8 [C KH KW, images, H' pitch] of a padded x, flat, [images, C, h, w] and at least KW more.

    With a stride of one, ``pitch`` is w and a tap of a plane is one run of memory; what lies beyond W' in a line is whatever
    comes next, and nobody reads it.
    """
    to = columns.reshape(-1)
    n = u64(pitch)
    step = u64(stride_w)
    run = u64(height * pitch)
    for c in range(channels):
        for r in range(kh):
            for s in range(kw):
                k = (c * kh + r) * kw + s
                for b in range(images):
                    at = u64((k * images + b) * height * pitch)
                    base = u64(((b * channels + c) * h + r * dilation_h) * w + s * dilation_w)
                    if stride_h == 1 and stride_w == 1:
                        for q in range(run):
                            to[at + q] = x[base + q]
                        continue
                    for p in range(height):
                        line, row = at + u64(p) * n, base + u64(p * stride_h * w)
                        for q in range(n):
                            to[line + q] = x[row + q * step]

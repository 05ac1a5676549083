"""Products of int8 matrices on the CPU, exact in int32, at the speed of fp32 products.

| function | out | of |
|---|---|---|
| dots | acc [M, N] | x [M, K], w [N, K]: both lie along K |
| planes | acc [N, images, run] | w [N, K] and rows of ``run`` values, one for each k and image, anywhere in a flat array |

Both multiply pairs of int16 and add neighbours into int32, which x86 does in one instruction (pmaddwd) from SSE2 on: twice
the products of a fused multiply-add of fp32. LLVM would not find it in a loop over bytes, so the register tiles are written in
its own language; it makes what other processors have of them.
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._jit import kept as _jit

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_V8, _V16 = ir.VectorType(_I32, 8), ir.VectorType(_I16, 16)
#: Register tiles: rows of w by columns of ``planes``, rows of x by rows of w of ``dots``; sixteen vectors hold each.
ROWS, COLUMNS = 6, 16
X_ROWS, W_ROWS, LANES = 4, 3, 16


def _indices(values) -> ir.Constant:
    values = list(values)
    return ir.Constant(ir.VectorType(_I32, len(values)), values)


def _undefined(kind) -> ir.Constant:
    return ir.Constant(kind, ir.Undefined)


def _add_products(builder, total, a, b) -> None:
    """total <8 x i32> += a[2i] b[2i] + a[2i + 1] b[2i + 1] of two <16 x i16>: no product of int8 comes near int32's limit."""
    wide = ir.VectorType(_I32, 16)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide), flags=["nsw"])
    even, odd = (builder.shuffle_vector(products, _undefined(wide), _indices(range(i, 16, 2))) for i in (0, 1))
    builder.store(builder.add(builder.load(total), builder.add(even, odd)), total)


def _totals(builder, count: int) -> list:
    return [cgutils.alloca_once_value(builder, ir.Constant(_V8, None)) for _ in range(count)]


def _pointer(context, builder, kind, array, at, to):
    """Pointer to vectors of type ``to`` at element ``at`` of a numba array."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), to.as_pointer())


@intrinsic
def _plane_tile(typing, a, a_at, b, pairs, out, out_at, stride):
    """out[r, c] = sum over pairs of a[pair, r] b[pair, c], r < ROWS, c < COLUMNS; rows of ``out`` are ``stride`` apart.

    a is int16 [pairs, ROWS, 2] from ``a_at`` on, b int16 [pairs, COLUMNS, 2].
    """
    signature = types.void(a, a_at, b, pairs, out, out_at, stride)

    def generate(context, builder, signature, args):
        a, a_at, b, pairs, out, out_at, stride = args
        of = signature.args
        zero = ir.Constant(a_at.type, 0)
        a = _pointer(context, builder, of[0], a, a_at, _I32)
        b = _pointer(context, builder, of[2], b, zero, _V16)
        totals = _totals(builder, 2 * ROWS)
        with cgutils.for_range(builder, pairs) as loop:

            def of_pair(pointer, count, i, size=loop.index.type, pair=loop.index):
                at = builder.add(builder.mul(pair, ir.Constant(size, count)), ir.Constant(size, i))
                return builder.load(builder.gep(pointer, [at]), align=2)

            right = [of_pair(b, 2, j) for j in range(2)]
            for r in range(ROWS):
                pair = of_pair(a, ROWS, r)
                left = builder.insert_element(_undefined(_V8), pair, ir.Constant(_I32, 0))
                left = builder.bitcast(builder.shuffle_vector(left, _undefined(_V8), _indices([0] * 8)), _V16)
                for j in range(2):
                    _add_products(builder, totals[2 * r + j], left, right[j])
        out = context.make_array(of[4])(context, builder, out).data
        for r in range(ROWS):
            line = builder.add(out_at, builder.mul(stride, ir.Constant(stride.type, r)))
            for j in range(2):
                to = builder.gep(out, [builder.add(line, ir.Constant(line.type, 8 * j))])
                builder.store(builder.load(totals[2 * r + j]), builder.bitcast(to, _V8.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _pack_pair(typing, flat, first, second, to, pair):
    """to[pair, c] = (flat[first + c], flat[second + c]) for c < COLUMNS; flat int8, ``to`` int16 [pairs, COLUMNS, 2]."""
    signature = types.void(flat, first, second, to, pair)

    def generate(context, builder, signature, args):
        flat, first, second, to, pair = args
        bytes16 = ir.VectorType(_I8, COLUMNS)
        a, b = (
            builder.load(_pointer(context, builder, signature.args[0], flat, at, bytes16), align=1)
            for at in (first, second)
        )
        mixed = builder.shuffle_vector(a, b, _indices(i // 2 + COLUMNS * (i % 2) for i in range(2 * COLUMNS)))
        wide = ir.VectorType(_I16, 2 * COLUMNS)
        at = builder.mul(pair, ir.Constant(pair.type, 2 * COLUMNS))
        builder.store(builder.sext(mixed, wide), _pointer(context, builder, signature.args[3], to, at, wide), align=2)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _dot_tile(typing, x, x_at, w, w_at, pitch, out):
    """out[r, c] = x[r] . w[c] for r < X_ROWS, c < W_ROWS: int16 rows of ``pitch`` values, a multiple of LANES."""
    signature = types.void(x, x_at, w, w_at, pitch, out)

    def generate(context, builder, signature, args):
        x, x_at, w, w_at, pitch, out = args
        of = signature.args
        size = pitch.type
        totals = _totals(builder, X_ROWS * W_ROWS)

        def rows(kind, array, first, count):
            return [
                _pointer(
                    context, builder, kind, array, builder.add(first, builder.mul(pitch, ir.Constant(size, r))), _V16
                )
                for r in range(count)
            ]

        left, right = rows(of[0], x, x_at, X_ROWS), rows(of[2], w, w_at, W_ROWS)
        with cgutils.for_range(builder, builder.sdiv(pitch, ir.Constant(size, LANES))) as loop:
            of_x = [builder.load(builder.gep(p, [loop.index]), align=2) for p in left]
            for c, p in enumerate(right):
                of_w = builder.load(builder.gep(p, [loop.index]), align=2)
                for r in range(X_ROWS):
                    _add_products(builder, totals[r * W_ROWS + c], of_x[r], of_w)
        out = context.make_array(of[5])(context, builder, out).data
        for i, total in enumerate(totals):
            lanes = builder.load(total)
            for half in (4, 2, 1):  # the sum of eight lanes
                kind = ir.VectorType(_I32, 2 * half)
                low, high = (
                    builder.shuffle_vector(lanes, _undefined(kind), _indices(range(k, k + half))) for k in (0, half)
                )
                lanes = builder.add(low, high)
            builder.store(
                builder.extract_element(lanes, ir.Constant(_I32, 0)), builder.gep(out, [ir.Constant(size, i)])
            )
        return context.get_dummy_value()

    return signature, generate


@_jit()
def _pack_rows(w, a):
    """a int16 [blocks of ROWS rows, pairs, ROWS, 2], flat, from w int8 [N, K]; zeros where there is nothing."""
    n, k = w.shape
    pairs = (k + 1) // 2
    for block in range((n + ROWS - 1) // ROWS):
        for r in range(ROWS):
            row = block * ROWS + r
            for i in range(2 * pairs):
                at = ((block * pairs + i // 2) * ROWS + r) * 2 + i % 2
                a[at] = w[row, i] if row < n and i < k else 0


@_jit()
def planes(w, flat, offsets, starts, run, acc, a, b, tile):
    """acc int32 [N, images, run] = w int8 [N, K] times the rows of int8 ``flat`` that begin at offsets[k] + starts[image].

    A row may be read up to its own end, no further. Workspace: a int16 of blocks * pairs * 2 ROWS, b int16 of
    pairs * 2 COLUMNS, tile int32 of ROWS * COLUMNS.
    """
    n, k = w.shape
    images, pairs, blocks = len(starts), (k + 1) // 2, (n + ROWS - 1) // ROWS
    to = acc.reshape(-1)
    stride = images * run
    _pack_rows(w, a)
    for image in range(images):
        for first in range(0, run, COLUMNS):
            columns = min(COLUMNS, run - first)
            base = starts[image] + first
            if columns == COLUMNS:
                for p in range(k // 2):
                    _pack_pair(flat, base + offsets[2 * p], base + offsets[2 * p + 1], b, p)
            for p in range(0 if columns < COLUMNS else k // 2, pairs):
                for c in range(COLUMNS):
                    for i in range(2):
                        inside = c < columns and 2 * p + i < k
                        b[(p * COLUMNS + c) * 2 + i] = flat[base + offsets[2 * p + i] + c] if inside else 0
            for block in range(blocks):
                rows = min(ROWS, n - block * ROWS)
                at = block * ROWS * stride + image * run + first
                if rows == ROWS and columns == COLUMNS:
                    _plane_tile(a, block * pairs * 2 * ROWS, b, pairs, to, at, stride)
                    continue
                _plane_tile(a, block * pairs * 2 * ROWS, b, pairs, tile, 0, COLUMNS)
                for r in range(rows):
                    for c in range(columns):
                        to[at + r * stride + c] = tile[r * COLUMNS + c]


@_jit()
def _widen(x, rows, pitch, to):
    """to int16 [rows, pitch], flat, = x int8 [., K], in zeros."""
    m, k = x.shape
    for r in range(rows):
        line = to[r * pitch : (r + 1) * pitch]
        if r < m:
            of_x = x[r]
            for i in range(k):
                line[i] = of_x[i]
            line[k:] = 0
        else:
            line[:] = 0


@_jit()
def dots(x, w, acc, x16, w16, tile):
    """acc int32 [M, N] = x int8 [M, K] w int8 [N, K]^T.

    Workspace: x16 and w16 int16, rows rounded up to X_ROWS and W_ROWS by columns to LANES; tile int32 of X_ROWS * W_ROWS.
    """
    (m, k), n = x.shape, w.shape[0]
    pitch = (k + LANES - 1) // LANES * LANES
    downs, acrosses = (m + X_ROWS - 1) // X_ROWS, (n + W_ROWS - 1) // W_ROWS
    _widen(x, downs * X_ROWS, pitch, x16)
    _widen(w, acrosses * W_ROWS, pitch, w16)
    for across in range(acrosses):
        for down in range(downs):
            _dot_tile(x16, down * X_ROWS * pitch, w16, across * W_ROWS * pitch, pitch, tile)
            for r in range(min(X_ROWS, m - down * X_ROWS)):
                for c in range(min(W_ROWS, n - across * W_ROWS)):
                    acc[down * X_ROWS + r, across * W_ROWS + c] = tile[r * W_ROWS + c]


@functools.lru_cache(maxsize=256)
def rows_of(k: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and starts of a matrix [k, size] for :func:`planes`: one image."""
    return np.arange(k, dtype=np.int64) * size, np.zeros(1, np.int64)


@functools.lru_cache(maxsize=256)
def taps_of(images: int, channels: int, h: int, w: int, kernel, dilation) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and starts of padded images [images, channels, h, w] under a kernel of stride one for :func:`planes`.

    A row is a channel seen from a tap on, lines of w values; what lies beyond the output's width is whatever comes next.
    """
    c, r, s = np.ix_(*(np.arange(n, dtype=np.int64) for n in (channels, *kernel)))
    offsets = (c * h + r * dilation[0]) * w + s * dilation[1]
    return offsets.reshape(-1), np.arange(images, dtype=np.int64) * (channels * h * w)


def room(rows: int, unit: int, size: int) -> int:
    """Elements of a workspace of ``rows`` rounded up to ``unit``, each of ``size``."""
    return -(-rows // unit) * unit * size


def planes_product(workspace, w, flat, offsets, starts, run: int, acc) -> None:
    """:func:`planes` with the arrays it needs, from ``workspace(name, size, dtype)``."""
    n, k = w.shape
    pairs = (k + 1) // 2
    planes(
        w, flat, offsets, starts, run, acc, workspace("rows of pairs", room(n, ROWS, 2 * pairs), np.int16),
        workspace("pairs", 2 * COLUMNS * pairs, np.int16), workspace("tile", ROWS * COLUMNS, np.int32),
    )  # fmt: skip


def dots_product(workspace, x, w, acc) -> None:
    """:func:`dots` with the arrays it needs."""
    pitch = room(x.shape[1], LANES, 1)
    dots(
        x, w, acc, workspace("wide x", room(len(x), X_ROWS, pitch), np.int16),
        workspace("wide w", room(len(w), W_ROWS, pitch), np.int16), workspace("tile", X_ROWS * W_ROWS, np.int32),
    )  # fmt: skip

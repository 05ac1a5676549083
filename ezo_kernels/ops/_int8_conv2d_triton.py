"""Integer convolution on the GPU: the float one's implicit GEMM on the integer matrix unit, epilogues as the product's.

    acc[b, o, p, q] = sum_(c, r, s) clamp(W + sign z)[o, c, r, s] x[b, c, p stride - pad + r dil, q stride - pad + s dil]
                      + clamp(bias + sign z')[o] 2^(s_b - s_x - s_W)

| tile | shape | is |
|---|---|---|
| w, z | [BN, BK] | output channels by logical columns, int8 and int32; clamp(W + z) and clamp(W - z) in int8 |
| x | [BK, BM] | int8, gathered: columns by output positions of one group of the pass |
| acc | [BN, BM] | int32, one a sign |

x, acc and out are contiguous in NCHW. Channels of a tap are padded to TAP columns as in :mod:`._conv2d_triton`, whose tiles
these are.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ._conv2d_triton import conv_tiles
from ._int8_triton import (
    REQUANTIZE,
    align_bias,
    check_grid,
    divide,
    leave,
    leave_exponent,
    magic,
    or_dummy,
    perturb_tile,
    perturbed_bias,
    requantised,
)
from ._linear_triton import architecture
from ._noise_triton import ASM, load_key, noise_args, signed32, sparse_int8_units
from ._triton import jit, require, tl
from ._variants import ARCHS, Variant
from .int8_pass import ROUNDINGS
from .noise import Noise


@jit
def _finish(
    acc, bias, group, own, first, o, y_at, inside, x_exponent_ptr, w_exponent_ptr, b_exponent_ptr,
    acc_ptr, peak_ptr, out_ptr, exponent_ptr, y_group,
    BIAS: tl.constexpr, WHAT: tl.constexpr, ROUNDING: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Bias and epilogue of one group's tile; ``y_at`` and ``inside`` are [BN, BM], of windows of four [BN, BM // 4]."""
    if BIAS:
        acc += align_bias(bias, b_exponent_ptr, x_exponent_ptr, own, w_exponent_ptr)[:, None]
    start = group.to(tl.int64) * y_group
    if WHAT == REQUANTIZE:
        # rounded first: NITI's pseudo-stochastic rounding does not keep the order
        y = requantised(acc, peak_ptr + group, ROUNDING)
        if POOL == 2:
            y = tl.max(tl.reshape(y, (BN, BM // 4, 4)), 2)
        if RELU:
            y = tl.maximum(y, 0)
        tl.store(out_ptr + start + y_at, y.to(tl.int8), mask=inside)
        if first == 0:
            leave_exponent(exponent_ptr, group, x_exponent_ptr, own, w_exponent_ptr, peak_ptr)
    else:
        leave(acc, acc_ptr + start, out_ptr + start, y_at, inside, peak_ptr + group, WHAT, ROUNDING, False)


@jit(do_not_specialize=[
    "site", "bias_site", "query", "packed", "positions", "tiles_mul", "tiles_div", "area_mul", "area_div", "wide_mul",
    "wide_div",
])  # fmt: skip
def int8_conv2d_kernel(
    x_ptr, w_ptr, b_ptr, x_exponent_ptr, w_exponent_ptr, b_exponent_ptr, key_ptr,
    acc_ptr, peak_ptr, out_ptr, exponent_ptr, site, bias_site, query, packed,
    positions, channels, outputs, pad_channels, padded_tap, tiles_n, tiles_mul, tiles_div,
    height, width, area, out_width, area_mul, area_div, wide_mul, wide_div,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    x_group, x_b, x_c, w_o, w_c, w_r, w_s, b_n, y_group, y_b,
    KH: tl.constexpr, KW: tl.constexpr, SIGNS: tl.constexpr, SHARED: tl.constexpr, BIAS: tl.constexpr,
    WHAT: tl.constexpr, ROUNDING: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr,
    TAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROUNDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """SIGNS: 2 for the pair, else the sign. The grid is (tiles of positions, tiles of outputs of each conv group,
    queries, or groups of the pass without a sign). With POOL 2, which goes with REQUANTIZE alone, positions go window by
    window, four each, and H' and W' are those of the windows.

    Args:
        positions: B H' W' of one group of the pass, times four with POOL 2.
        padded_tap: channels of a tap rounded up to TAP; pad_channels: to the noise's segment.
        area: H' W'. ``*_mul``, ``*_div``: of division by it, by W' and by ``tiles_n``.
    """
    pid_n = tl.program_id(1)
    pid_q = tl.program_id(2)
    conv_group = divide(pid_n, tiles_mul, tiles_div)
    n = (pid_n - conv_group * tiles_n) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    u = tl.arange(0, BK // 4) * 4
    SPAN: tl.constexpr = BK // TAP

    # positions of the tile; a group of the pass is smaller than 2^31, so that addresses inside of it are 32-bit
    window = m // (POOL * POOL)
    b = divide(window, area_mul, area_div)
    at_plane = window - b * area
    p = divide(at_plane, wide_mul, wide_div)
    q = at_plane - p * out_width
    if POOL == 2:
        p = p * 2 + m % 4 // 2
        q = q * 2 + m % 2
    # beyond the last position no tap is inside x
    top = tl.where(m < positions, p * stride_h - pad_h, -(1 << 30))
    left = q * stride_w - pad_w
    group = pid_q * 2 if SIGNS == 2 else pid_q
    # x of one group for all has a stride of zero
    x_at = x_ptr + group.to(tl.int64) * x_group + conv_group * channels * x_c
    x_row = b * x_b + p * stride_h * width + left - pad_h * width
    o = conv_group * outputs + n
    w_row = o.to(tl.int64) * w_o
    inside_n = n < outputs
    rows = o.to(tl.uint32)[:, None]
    k0, k1 = load_key(key_ptr)

    plus = tl.zeros((BN, BM), dtype=tl.int32)
    minus = tl.zeros((BN, BM), dtype=tl.int32)
    first_tap, first_channel = pid_q * 0, pid_q * 0
    for _ in range(0, (KH * KW + SPAN - 1) // SPAN * (padded_tap // TAP)):
        c = first_channel + k % TAP
        if SPAN == 1:  # one tap a tile: whether it is inside x depends on the position alone
            r = first_tap // KW
            s = first_tap % KW
            inside_k = c < channels
            y_in = (top + r * dilation_h)[None, :]
            x_in = (left + s * dilation_w)[None, :]
        else:
            tap = first_tap + k // TAP
            r = tap // KW
            s = tap % KW
            inside_k = (tap < KH * KW) & (c < channels)
            y_in = top[None, :] + (r * dilation_h)[:, None]
            x_in = left[None, :] + (s * dilation_w)[:, None]
        x_column = c * x_c + r * dilation_h * width + s * dilation_w
        inside = ((y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width)) & inside_k[:, None]
        at = x_row[None, :] + x_column[:, None]
        x_plus = tl.load(x_at + at, mask=inside, other=0)
        x_minus = x_plus
        if SIGNS == 2 and not SHARED:
            x_minus = tl.load(x_at + x_group + at, mask=inside, other=0)
        w_column = c.to(tl.int64) * w_c + r.to(tl.int64) * w_r + s.to(tl.int64) * w_s
        w = tl.load((w_ptr + w_row)[:, None] + w_column[None, :], mask=inside_n[:, None] & inside_k[None, :], other=0)
        if SIGNS == 0:
            plus = tl.dot(w, x_plus, plus, out_dtype=tl.int32)
        else:
            # beyond the channels and taps z is not zero, but x is
            columns = (first_tap + u // TAP) * pad_channels + first_channel + u % TAP
            z = sparse_int8_units(
                k0, k1, site, query + pid_q, rows, columns.to(tl.uint32)[None, :], ROUNDS, ASM, packed
            )  # fmt: skip
            w_plus, w_minus = perturb_tile(w, z, SIGNS, ASM)
            plus = tl.dot(w_plus, x_plus, plus, out_dtype=tl.int32)
            if SIGNS == 2:
                minus = tl.dot(w_minus, x_minus, minus, out_dtype=tl.int32)
        # the next tile of this tap, or the first of the next
        first_channel += TAP
        first_tap = tl.where(first_channel == padded_tap, first_tap + SPAN, first_tap)
        first_channel = tl.where(first_channel == padded_tap, 0, first_channel)

    b_plus, b_minus = n, n
    if BIAS:
        b_plus, b_minus = perturbed_bias(
            b_ptr, b_n, o, inside_n, k0, k1, bias_site, query + pid_q, packed, SIGNS, ROUNDS, ASM
        )  # fmt: skip
    if POOL == 2:
        m = tl.program_id(0) * (BM // 4) + tl.arange(0, BM // 4)
        b = divide(m, area_mul, area_div)
        at_plane = m - b * area
    y_at = (b * y_b + at_plane)[None, :] + (o * area)[:, None]
    inside = inside_n[:, None] & (m < positions // (POOL * POOL))[None, :]
    first = tl.program_id(0) + pid_n
    own = group * 0 if SHARED else group
    _finish(
        plus, b_plus, group, own, first, o, y_at, inside, x_exponent_ptr, w_exponent_ptr, b_exponent_ptr,
        acc_ptr, peak_ptr, out_ptr, exponent_ptr, y_group, BIAS, WHAT, ROUNDING, RELU, POOL, BM, BN,
    )  # fmt: skip
    if SIGNS == 2:
        own = group * 0 if SHARED else group + 1
        _finish(
            minus, b_minus, group + 1, own, first, o, y_at, inside, x_exponent_ptr, w_exponent_ptr, b_exponent_ptr,
            acc_ptr, peak_ptr, out_ptr, exponent_ptr, y_group, BIAS, WHAT, ROUNDING, RELU, POOL, BM, BN,
        )  # fmt: skip


def int8_conv_tiles(positions: int, outputs: int, channels: int, conv_groups: int, arch: int):
    """Tiles of an integer convolution: those of a 16-bit one; arguments as :func:`._conv2d_triton.conv_tiles`.

    Without the warp group instruction bytes are put together by the threads, whose registers hold half of that tile.
    """
    tiles = conv_tiles(positions, outputs, channels, conv_groups, "sparse_int8", "16", arch)
    return tiles if arch // 10 == 9 else replace(tiles, bm=min(64, tiles.bm))


def launch_conv2d(
    x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, stride, padding, dilation, conv_groups, size,
    what, rounding, relu, pool, query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent,
) -> None:  # fmt: skip
    """Write what is asked for of every group; arguments as ``ezo::int8_conv2d``, x contiguous, all checked there.

    The largest magnitude is that of all positions, also of those in no window.

    Raises:
        NotImplementedError: no triton; 2^31 or more values in a group of the pass, or too many tiles of outputs.
    """
    require()
    outputs, channels, kh, kw = w.shape
    batch = x.shape[0] // x_exponent.numel()
    pool = pool if what == REQUANTIZE.value else 1
    height, width = (n // pool for n in size)
    area = height * width
    positions = batch * area * pool * pool
    noise = Noise("sparse_int8", rounds, p_zero, r_max)
    tiles = int8_conv_tiles(positions, outputs // conv_groups, channels, conv_groups, architecture(x.device))
    size_x, size_y = batch * x[0].numel(), batch * area * outputs
    # a tap outside of x has an address outside of it too, by at most the padding and the dilated kernel
    beyond = (padding[0] + kh * dilation[0]) * x.shape[3] + padding[1] + kw * dilation[1]
    if max(size_x + beyond, size_y, positions + tiles.bm, outputs + tiles.bn) >= 1 << 31:
        raise NotImplementedError(f"int8_conv2d: {size_x} inputs and {size_y} outputs in a group, 2^31 is the limit")
    tiles_m, tiles_n = -(-positions // tiles.bm), -(-(outputs // conv_groups) // tiles.bn)
    sign = 2 if len(signs) == 2 else signs[0]
    repeats = queries if sign else peak.numel()
    check_grid("int8_conv2d", tiles_n * conv_groups, repeats)
    shared = x_exponent.numel() == 1
    with torch.cuda.device_of(x):
        int8_conv2d_kernel[(tiles_m, tiles_n * conv_groups, repeats)](
            x, w, or_dummy(b, w), x_exponent, w_exponent, or_dummy(b_exponent, w_exponent), key, acc, peak, out, exponent,
            signed32(site), signed32(bias_site), query, noise_args(noise)[0], positions, channels,
            outputs // conv_groups, -(-channels // 4) * 4, -(-channels // tiles.tap) * tiles.tap,
            tiles_n, *magic(tiles_n), x.shape[2], x.shape[3], area, width, *magic(area), *magic(width),
            *stride, *padding, *dilation, 0 if shared else size_x, x[0].numel(), x[0, 0].numel(), *w.stride(),
            1 if b is None else b.stride(0), size_y, outputs * area,
            KH=kh, KW=kw, SIGNS=sign, SHARED=shared, BIAS=b is not None, WHAT=what,
            ROUNDING=ROUNDINGS.index(rounding), RELU=relu, POOL=pool, TAP=tiles.tap, BM=tiles.bm, BN=tiles.bn, BK=tiles.bk,
            ROUNDS=noise.rounds, ASM=ASM, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants

_POINTERS = {
    **dict.fromkeys(("x_ptr", "w_ptr", "b_ptr", "out_ptr"), "*i8"),
    **dict.fromkeys(("x_exponent_ptr", "w_exponent_ptr", "b_exponent_ptr", "key_ptr"), "*i32"),
    **dict.fromkeys(("acc_ptr", "peak_ptr", "exponent_ptr"), "*i32"),
}
_INTEGERS = (
    "site", "bias_site", "query", "packed", "positions", "channels", "outputs", "pad_channels", "padded_tap", "tiles_n",
    "tiles_mul", "tiles_div", "height", "width", "area", "out_width", "area_mul", "area_div", "wide_mul", "wide_div",
    "pad_h", "pad_w", "x_group", "x_b", "x_c", "w_o", "w_c", "w_r", "y_group", "y_b",
)  # fmt: skip
_ONES = ("stride_h", "stride_w", "dilation_h", "dilation_w", "w_s", "b_n")


def _variant(
    shape, positions, outputs, channels, kernel, signs: int, what: int, archs, tested: bool, pool=1
) -> Variant:
    tiles = int8_conv_tiles(positions, outputs, channels, 1, archs[0])
    return Variant(
        kernel=int8_conv2d_kernel,
        name=f"int8_conv2d/{shape}/{'pair' if signs == 2 else signs}/{('store', 'peak', 'requantize')[what]}"
        + "/pooled" * (pool == 2)
        + f"/sm_{archs[0]}" * (archs[0] != 90),
        signature={**_POINTERS, **dict.fromkeys(_INTEGERS, "i32")},
        constexprs={
            **dict.fromkeys(_ONES, 1),
            **{"KH": kernel, "KW": kernel, "SIGNS": signs, "SHARED": signs == 0, "BIAS": True, "WHAT": what},
            **{"ROUNDING": 0, "RELU": pool == 2, "POOL": pool, "TAP": tiles.tap},
            **{"BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk, "ROUNDS": 7, "ASM": True},
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        archs=archs,
        expects=("integer mma", "no float", *(("multiply",) if signs else ())),
        z_per_loop=tiles.bn * tiles.bk if signs else 0,
        representative=tested,
    )


def variants():
    """The forms that convolutions of common networks take, for the static report and the compile tests."""
    require()
    shapes = {  # name: positions, outputs, channels, kernel
        "resnet3x3": (32 * 28 * 28, 128, 128, 3),
        "lenet1": (32 * 24 * 24, 6, 1, 5),
        "lenet2": (32 * 8 * 8, 16, 6, 5),
    }
    small = tuple(arch for arch in ARCHS if arch // 10 not in (9, 10))
    for shape, given in shapes.items():
        for archs in ((90,), (100,), small):
            for what in (0, 1, 2):
                yield _variant(shape, *given, 2, what, archs, what == 2 or (shape, what) == ("resnet3x3", 1))
            yield _variant(shape, *given, 0, 2, archs, False)
            if shape != "resnet3x3":
                yield _variant(shape, *given, 2, 2, archs, True, pool=2)

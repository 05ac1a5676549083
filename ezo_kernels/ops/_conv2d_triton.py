"""Perturbed convolution on the GPU: an implicit GEMM that makes z while it multiplies.

    y[b, o, p, q] = sum_(c, r, s) (w + sign eps z)[o, c, r, s] x[b, c, p stride - pad + r dil, q stride - pad + s dil]

| tile | shape | is |
|---|---|---|
| w, z | [BN, BK] | output channels by logical columns; W + eps z and W - eps z in fp32, rounded to x's dtype |
| x | [BK, BM] | gathered: columns by output positions of one group of the pass |
| acc | [BN, BM] | fp32, one a sign; the perturbed bias joins in the epilogue |

M = B H' W' of one group (a tile never straddles two), N = O / g, K = taps by channels. Channels of a tap are padded to
TAP columns, a power of two not smaller than the noise's unit and not larger than BK: with few channels a tile of K
spans BK / TAP taps, with many a tap takes ``chunks`` tiles. The output positions are the last axis of acc, because they
are contiguous in NCHW; in channels_last the compiler turns the accesses round by itself, from a stride of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ._int8_triton import check_grid
from ._linear_triton import architecture
from ._noise_triton import ASM, NOISE_ID, UNIT, load_key, signed32, z_units
from ._rounding_triton import add_product, of_precision
from ._triton import jit, require, tl
from ._variants import ARCHS, Variant
from .linear import input_precision


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _finish(acc, dtype: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """[BN, BM] as it is stored; of windows, whose four positions are neighbours, the largest: [BN, BM // 4]."""
    if POOL == 2:
        acc = tl.reduce(tl.reshape(acc, (BN, BM // 4, 4)), 2, _larger)
    if RELU:
        acc = tl.where(acc < 0.0, 0.0, acc)  # NaN stays
    return acc.to(dtype)


@jit
def _multiply(acc, w, x, PRECISION: tl.constexpr, ASM: tl.constexpr):
    """acc + w x of a weight in fp32, rounded once to what x is."""
    return add_product(acc, of_precision(w.to(x.dtype), PRECISION, ASM), x, PRECISION)


@jit(do_not_specialize=["site", "bias_site", "query", "threshold"])
def conv2d_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, key_ptr, eps_ptr, site, bias_site, query, threshold, scale,
    positions, channels, outputs, pad_channels, chunks, tiles_m, tiles_n,
    height, width, out_height, out_width, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    x_group, x_b, x_c, x_h, x_w, w_o, w_c, w_r, w_s, b_o, y_group, y_b, y_o, y_h, y_w,
    KH: tl.constexpr, KW: tl.constexpr, PAIR: tl.constexpr, SIGN: tl.constexpr, SHARED: tl.constexpr,
    RELU: tl.constexpr, POOL: tl.constexpr,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr, TAP: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of one conv group for one query, at both signs (PAIR) or at SIGN.

    With POOL 2 ``out_height`` and ``out_width`` are those of the windows, and positions go window by window, four each.
    """
    pid = tl.program_id(0)
    pid_q = tl.program_id(1)
    conv_group = pid // (tiles_m * tiles_n)
    n = (pid // tiles_m) % tiles_n * BN + tl.arange(0, BN)
    m = pid % tiles_m * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    u = tl.arange(0, BK // UNIT) * UNIT
    SPAN: tl.constexpr = BK // TAP

    # positions of the tile; addresses are 64-bit where there is one a position or a column, 2-D only in their sum
    WINDOW: tl.constexpr = POOL * POOL
    b = m // WINDOW // (out_height * out_width)
    p = m // WINDOW // out_width % out_height
    q = m // WINDOW % out_width
    if POOL == 2:
        p = p * 2 + m % 4 // 2
        q = q * 2 + m % 2
    # beyond the last position no tap is inside x
    top = tl.where(m < positions, p * stride_h - pad_h, -(1 << 30))
    left = q * stride_w - pad_w
    group = pid_q.to(tl.int64) * (2 if PAIR else 1)
    x_row = b.to(tl.int64) * x_b + top.to(tl.int64) * x_h + left.to(tl.int64) * x_w
    x_row += conv_group.to(tl.int64) * channels * x_c
    if not SHARED:
        x_row += group * x_group
    o = conv_group * outputs + n
    w_row = o.to(tl.int64) * w_o
    inside_n = n < outputs

    if SIGN != 0:
        k0, k1 = load_key(key_ptr)
        eps = tl.load(eps_ptr) * SIGN
        rows = o.to(tl.uint32)[:, None]

    plus = tl.zeros((BN, BM), dtype=tl.float32)
    minus = tl.zeros((BN, BM), dtype=tl.float32)
    for t in range(0, (KH * KW + SPAN - 1) // SPAN * chunks):
        first_tap = t // chunks * SPAN
        first_channel = t % chunks * TAP
        c = first_channel + k % TAP
        if SPAN == 1:  # one tap a tile: whether it is inside x depends on the position alone
            r = first_tap // KW
            s = first_tap % KW
            inside_k = c < channels
            y_in = (top + r * dilation_h)[None, :]
            x_in = (left + s * dilation_w)[None, :]
            x_column = c.to(tl.int64) * x_c + (r * dilation_h).to(tl.int64) * x_h + (s * dilation_w).to(tl.int64) * x_w
        else:
            tap = first_tap + k // TAP
            r = tap // KW
            s = tap % KW
            inside_k = (tap < KH * KW) & (c < channels)
            y_in = top[None, :] + (r * dilation_h)[:, None]
            x_in = left[None, :] + (s * dilation_w)[:, None]
            x_column = c.to(tl.int64) * x_c + (r * dilation_h).to(tl.int64) * x_h + (s * dilation_w).to(tl.int64) * x_w
        inside = ((y_in >= 0) & (y_in < height) & (x_in >= 0) & (x_in < width)) & inside_k[:, None]
        at = (x_ptr + x_row)[None, :] + x_column[:, None]
        x_plus = tl.load(at, mask=inside, other=0.0)
        x_minus = x_plus
        if PAIR and not SHARED:
            x_minus = tl.load(at + x_group, mask=inside, other=0.0)
        w_column = c.to(tl.int64) * w_c + r.to(tl.int64) * w_r + s.to(tl.int64) * w_s
        w = tl.load(
            (w_ptr + w_row)[:, None] + w_column[None, :], mask=inside_n[:, None] & inside_k[None, :], other=0.0
        ).to(tl.float32)
        if SIGN == 0:
            plus = _multiply(plus, w, x_plus, PRECISION, ASM)
        else:
            columns = (first_tap + u // TAP) * pad_channels + first_channel + u % TAP
            z = z_units(
                k0, k1, site, query + pid_q, rows, columns.to(tl.uint32)[None, :],
                NOISE, ROUNDS, UNIT, ASM, threshold, scale,
            )  # fmt: skip
            step = z * eps
            plus = _multiply(plus, w + step, x_plus, PRECISION, ASM)
            if PAIR:
                minus = _multiply(minus, w - step, x_minus, PRECISION, ASM)

    if b_ptr is not None:
        bias = tl.load(b_ptr + o.to(tl.int64) * b_o, mask=inside_n, other=0.0).to(tl.float32)
        shift = bias * 0.0
        if SIGN != 0:
            # a bias is row 0 of its own site; a tile need not begin at a unit, so each channel makes its whole unit
            z = z_units(
                k0, k1, bias_site, query + pid_q, (rows * 0), (o // UNIT * UNIT).to(tl.uint32)[:, None],
                NOISE, ROUNDS, UNIT, ASM, threshold, scale,
            )  # fmt: skip
            own = tl.arange(0, UNIT)[None, :] == (o % UNIT)[:, None]
            shift = tl.sum(tl.where(own, z, 0.0), axis=1) * eps
        plus += (bias + shift)[:, None]
        minus += (bias - shift)[:, None]

    if POOL == 2:
        m = pid % tiles_m * (BM // 4) + tl.arange(0, BM // 4)
        b = m // (out_height * out_width)
        p = m // out_width % out_height
        q = m % out_width
    y_row = group * y_group + b.to(tl.int64) * y_b + p.to(tl.int64) * y_h + q.to(tl.int64) * y_w
    at = y_ptr + (y_row[None, :] + (o.to(tl.int64) * y_o)[:, None])
    inside = inside_n[:, None] & (m < positions // WINDOW)[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(at, _finish(plus, dtype, RELU, POOL, BM, BN), mask=inside)
    if PAIR:
        tl.store(at + y_group, _finish(minus, dtype, RELU, POOL, BM, BN), mask=inside)


# -------------------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class ConvTiles:
    """How a convolution is cut: a pure function of shapes and dtype."""

    bm: int
    bn: int
    bk: int
    tap: int
    unit: int
    num_warps: int
    num_stages: int


def _pow2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def conv_tiles(
    positions: int, outputs: int, channels: int, conv_groups: int, noise: str, precision: str, arch: int
) -> ConvTiles:
    """Tiles of a convolution.

    Args:
        positions: B H' W' of one group of the pass (never the stacked batch: both signs of any pass run alike).
        outputs, channels: of one conv group.
        conv_groups: how many.
        noise: name.
        precision: of the products: ``16`` (bits), ``tf32`` or ``ieee``. Those in ieee run on the CUDA cores, which keep
            a tile's whole K in registers.
        arch: compute capability, 90 for an H100. Where the tensor core reads registers a second stage makes tiles spill, as
            it does of fp32. Triton multiplies fp32 of sm_100 in tf32, whatever it is told, where a tile has 64 outputs.
    """
    unit, bk = UNIT[noise], 32
    if precision == "ieee" and noise != "hadamard":
        bk = 16
    if noise == "rademacher":
        unit = min(bk, max(4, _pow2(channels)))
    bn = min(64, max(16, _pow2(outputs)))
    if precision == "ieee" and (noise == "hadamard" or arch // 10 == 10):
        bn = min(bn, 32)
    ampere = arch // 10 not in (9, 10)
    bm = 128 if precision == "16" else 32 if (precision, noise, ampere) == ("ieee", "hadamard", True) else 64
    while bm > 32 and -(-positions // bm) * -(-outputs // bn) * conv_groups < 132:  # an H100 has 132 multiprocessors
        bm //= 2
    bm = 16 if positions <= 16 else bm  # fewer positions make the noise of a tile no cheaper
    warps = 8 if bm == 128 or bm * bn >= (2048 if precision == "ieee" else 4096) else 4
    stages = 2 if arch // 10 in (9, 10) and (precision == "16" or (precision == "tf32" and noise != "hadamard")) else 1
    return ConvTiles(bm, bn, bk, min(bk, max(unit, _pow2(channels))), unit, warps, stages)


# ----------------------------------------------------------------------------------------------------------- launcher


def launch_conv2d(
    x, w, b, key, eps, site, bias_site, shared, stride, padding, dilation, conv_groups, precision, relu, pool,
    query, queries, signs, noise, out,
) -> None:  # fmt: skip
    """Launch one grid over (tiles of a group of the pass, queries); no synchronisation, no allocation.

    Raises:
        NotImplementedError: no triton; 2^31 or more output positions in a group of the pass.
    """
    require()
    groups = queries * len(signs)
    outputs, channels, kh, kw = w.shape
    outputs //= conv_groups
    batch = x.shape[0] if shared or groups == 1 else x.shape[0] // groups
    out_height, out_width = out.shape[2:]
    positions = batch * out_height * out_width * pool * pool
    if positions >= 1 << 31:
        raise NotImplementedError(f"perturbed_conv2d: {positions} output positions in a group, at most 2^31 - 1")
    check_grid("perturbed_conv2d", queries)
    precision = input_precision(x.dtype, precision) if x.dtype == torch.float32 else "16"
    tiles = conv_tiles(positions, outputs, channels, conv_groups, noise.name, precision, architecture(x.device))
    tiles_m, tiles_n = -(-positions // tiles.bm), -(-outputs // tiles.bn)
    pair = len(signs) == 2
    stack = 0 if shared else batch * x.stride(0)
    with torch.cuda.device_of(x):
        conv2d_kernel[(tiles_m * tiles_n * conv_groups, queries)](
            x, w, b, out, key, eps, signed32(site), signed32(bias_site), query, noise.threshold, noise.scale,
            positions, channels, outputs, -(-channels // noise.segment) * noise.segment,
            -(-channels // tiles.tap), tiles_m, tiles_n,
            x.shape[2], x.shape[3], out_height, out_width, *stride, *padding, *dilation,
            stack, *x.stride(), *w.stride(), 1 if b is None else b.stride(0), batch * out.stride(0), *out.stride(),
            KH=kh, KW=kw, PAIR=pair, SIGN=1 if pair else signs[0], SHARED=shared or groups == 1,
            RELU=relu, POOL=pool,
            NOISE=NOISE_ID[noise.name], ROUNDS=noise.rounds, UNIT=tiles.unit, ASM=ASM, TAP=tiles.tap,
            PRECISION="tf32" if precision == "tf32" else "ieee", BM=tiles.bm, BN=tiles.bn, BK=tiles.bk,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def variants():
    """The forms that convolutions of common networks take, for the static report and the compile tests."""
    require()
    shapes = {  # name: positions, outputs, channels, kernel
        "resnet3x3": (32 * 28 * 28, 128, 128, 3),
        "lenet1": (32 * 24 * 24, 6, 1, 5),
        "lenet2": (32 * 8 * 8, 16, 6, 5),
    }
    floats = {"bf16": ("bf16", "bf16", "16"), "fp16": ("fp16", "fp16", "16"), "mixed": ("bf16", "fp32", "16"),
              "fp32": ("fp32", "fp32", "ieee"), "tf32": ("fp32", "fp32", "tf32")}  # fmt: skip
    tested = {
        "gaussian": ("bf16", "mixed", "tf32", "fp32"),
        "hadamard": ("bf16", "fp16", "fp32"),
        "rademacher": ("bf16",),
    }
    for dtype, (xt, wt, precision) in floats.items():
        for noise in NOISE_ID:
            for shape in shapes if dtype in ("bf16", "fp32") else ("resnet3x3",):
                few = dtype in tested.get(noise, ()) and (
                    shape == "resnet3x3" or (dtype, noise) == ("fp32", "gaussian")
                )
                if noise != "sparse_int8":
                    given = (shape, *shapes[shape], xt, wt, dtype, precision, noise, 1, True, few)
                    for archs in ((90,), (100,)) if dtype == "fp32" else ((90, 100),):
                        yield _variant(*given, archs=archs)
                        if shape != "resnet3x3":
                            yield _variant(*given, archs=archs, pool=2)
                    yield _variant(*given, archs=tuple(arch for arch in ARCHS if arch not in (90, 100)))
    for sign in (1, 0):
        yield _variant("resnet3x3", *shapes["resnet3x3"], "bf16", "bf16", "bf16", "16", "gaussian", sign, False, True)
    ones = (*_INTEGERS[4:], *_ONES)  # a launch turns arguments that are one into constants
    one = _variant("one", 1, 1, 1, 1, "fp32", "fp32", "fp32", "ieee", "gaussian", 1, True, True)
    yield replace(
        one,
        signature={name: kind for name, kind in one.signature.items() if name not in ones},
        constexprs={**one.constexprs, **dict.fromkeys(ones, 1)},
    )


#: Integer arguments of a contiguous NCHW convolution that are neither one (and so constants) nor anything else known.
_INTEGERS = (
    "site", "bias_site", "query", "threshold", "positions", "pad_channels", "chunks", "tiles_m", "tiles_n", "channels",
    "outputs", "height", "width", "out_height", "out_width", "pad_h", "pad_w", "x_group", "x_b", "x_c", "x_h", "w_o",
    "w_c", "w_r", "y_group", "y_b", "y_o", "y_h",
)  # fmt: skip
_ONES = ("x_w", "w_s", "b_o", "y_w", "stride_h", "stride_w", "dilation_h", "dilation_w")


def _variant(
    shape, positions, outputs, channels, kernel, xt, wt, dtype, precision, noise, sign, pair, tested, archs=(90, 100),
    pool=1,
):  # fmt: skip
    tiles = conv_tiles(positions, outputs, channels, 1, noise, precision, archs[0])
    pointers = {"x_ptr": xt, "w_ptr": wt, "b_ptr": wt, "y_ptr": xt, "key_ptr": "i32", "eps_ptr": "fp32"}
    return Variant(
        kernel=conv2d_kernel,
        name=f"conv2d/{dtype}/{noise}/{shape}/{'pair' if pair else sign}"
        + "/pooled" * (pool == 2)
        + ("/sm_80" if 80 in archs else "/sm_100" if 90 not in archs else ""),
        signature={
            **{name: "*" + kind for name, kind in pointers.items()},
            **dict.fromkeys(_INTEGERS, "i32"),
            "scale": "fp32",
        },
        constexprs={
            **dict.fromkeys(_ONES, 1),
            **{"KH": kernel, "KW": kernel, "PAIR": pair, "SIGN": sign, "SHARED": not pair},
            **{"RELU": pool == 2, "POOL": pool},
            **{"NOISE": NOISE_ID[noise], "ROUNDS": 7, "UNIT": tiles.unit, "ASM": True, "TAP": tiles.tap},
            **{"PRECISION": "tf32" if precision == "tf32" else "ieee", "BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk},
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        archs=archs,
        expects=(("mma",) if precision != "ieee" else ("ieee",)) + (("multiply",) if sign else ()),
        z_per_loop=tiles.bn * tiles.bk if sign else 0,
        representative=tested,
    )

"""Integer products at many rows on the GPU: clamp(W + sign z) of some outputs in memory, then plain int8 products.

    room[i] = clamp(W[slab] + sign_i z_q[slab]),  line[i] = clamp(b + sign_i z'_q)          int8, z made once for both signs
    acc_i[:, slab] = x_i room[i]^T + line[i][slab] 2^(s_b - s_x - s_W)

| tensor | shape |
|---|---|
| room | int8 [signs, rows of a slab, pitch], reused by every slab and query; columns in logical order, (tap, channel) |
| x | int8 [signs, rows, K], rows contiguous; one group may be shared |
| acc, out | int32, int8 [signs, rows, N], of which a launch writes the columns of its slab |

The noise costs the fused kernel more than its matrix unit has to do, for every 128 rows again; here it is made once. Sums of
integers do not depend on who makes them: the bits are those of the fused kernels, which a test asks for.
"""

from __future__ import annotations

import torch

from ._int8_slab import int8_plain_tile, pitch_of, slabs_of
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
)
from ._layout import grid
from ._linear_triton import architecture
from ._noise_triton import ASM, load_key, noise_args, signed32, sparse_int8_units
from ._tiles import LARGE, element_tile
from ._triton import jit, require, tl
from ._variants import ARCHS, Variant
from .int8_pass import ROUNDINGS
from .noise import Noise


@jit(do_not_specialize=["site", "query", "packed", "first", "tap_mul", "tap_div"])
def int8_slab_kernel(
    w_ptr, out_ptr, key_ptr, site, query, packed, first, rows, columns, channels, padded, tap_mul, tap_div,
    w_row, w_channel, w_tap, out_row, out_sign,
    MATRIX: tl.constexpr, SIGNS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ROUNDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` and on of a weight, perturbed; SIGNS: 2 for the pair, else the sign. MATRIX: there is one tap."""
    r = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    begin = tl.program_id(1) * C
    c = (begin + tl.arange(0, C))[None, :]
    units = (begin + tl.arange(0, C // 4) * 4)[None, :].to(tl.uint32)
    k0, k1 = load_key(key_ptr)
    z = sparse_int8_units(k0, k1, site, query, (first + r).to(tl.uint32), units, ROUNDS, ASM, packed)
    from_row = w_ptr + (first + r).to(tl.int64) * w_row
    if MATRIX:
        inside = (r < rows) & (c < channels)
        w = tl.load(from_row + c.to(tl.int64) * w_channel, mask=inside, other=0)
        to = c
    else:
        tap = divide(c, tap_mul, tap_div)
        channel = c - tap * padded
        inside = (r < rows) & (c < columns) & (channel < channels)
        w = tl.load(from_row + channel.to(tl.int64) * w_channel + tap.to(tl.int64) * w_tap, mask=inside, other=0)
        to = tap * channels + channel
    plus, minus = perturb_tile(w, z, SIGNS, ASM)
    at = out_ptr + (r.to(tl.int64) * out_row + to)
    tl.store(at, plus, mask=inside)
    if SIGNS == 2:
        tl.store(at + out_sign, minus, mask=inside)


@jit(do_not_specialize=["rows"])
def int8_plain_kernel(
    x_ptr, w_ptr, b_ptr, x_exponent_ptr, w_exponent_ptr, b_exponent_ptr, acc_ptr, peak_ptr, out_ptr, exponent_ptr,
    rows, N, K, x_group, x_row, w_group, w_row, b_group, y_group, y_row,
    SHARED: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr, WHAT: tl.constexpr, ROUNDING: tl.constexpr,
    RELU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc_g = x_g w_g^T + b_g; w [groups, N, K] and b [groups, N] perturbed already. The grid: (rows, outputs, groups)."""
    first_m, first_n = tl.program_id(0) * BM, tl.program_id(1) * BN
    group = tl.program_id(2)
    rm, rn, rk = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN), tl.arange(0, BK)
    # rows beyond the end are read again from the last one and never stored: no mask in the loop
    xm, wn = tl.minimum(rm, rows - 1).to(tl.int64), tl.minimum(rn, N - 1).to(tl.int64)
    x_at = x_ptr + group.to(tl.int64) * x_group + (xm * x_row)[:, None] + rk[None, :]
    w_at = w_ptr + group.to(tl.int64) * w_group + (wn * w_row)[:, None] + rk[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            inside = (rk < K - k)[None, :]
            x = tl.load(x_at, mask=inside, other=0)
            w = tl.load(w_at, mask=inside, other=0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    own = group * 0 if SHARED else group
    if BIAS:
        b = tl.load(b_ptr + group.to(tl.int64) * b_group + rn, mask=rn < N, other=0).to(tl.int32)
        acc += align_bias(b, b_exponent_ptr, x_exponent_ptr, own, w_exponent_ptr)[None, :]
    at = group.to(tl.int64) * y_group + rm.to(tl.int64)[:, None] * y_row + rn[None, :]
    inside = (rm < rows)[:, None] & (rn < N)[None, :]
    leave(acc, acc_ptr, out_ptr, at, inside, peak_ptr + group, WHAT, ROUNDING, RELU)
    if WHAT == REQUANTIZE:  # noqa: SIM102 - the outer if is the compiler's
        if first_m + first_n == 0:
            leave_exponent(exponent_ptr, group, x_exponent_ptr, own, w_exponent_ptr, peak_ptr)


# ---------------------------------------------------------------------------------------------------------- launchers


def _write(w, layout: str, key, site: int, query: int, noise: Noise, sign: int, first: int, rows: int, room) -> None:
    """Perturbed rows of w, [O, I] or [O, I, R, S] of any strides, into room [signs, rows, pitch]."""
    where = grid(w.shape, layout, noise.segment)
    tile = element_tile(rows, noise.name)
    tiles = -(-rows // tile.rows), -(-where.columns // tile.columns)
    check_grid("int8 slab", tiles[1])
    matrix = where.taps == 1
    strides = (w.stride(0) if w.dim() > 1 else 0, w.stride(1) if w.dim() > 1 else w.stride(0))
    if not matrix:  # taps lie behind one another, whatever the memory format
        w = w.flatten(2) if w.is_contiguous() else w.contiguous().flatten(2)
        strides = w.stride()[:2]
    int8_slab_kernel[tiles](
        w, room, key, signed32(site), query, noise_args(noise)[0], first, rows, where.columns, where.channels, where.padded,
        *magic(where.padded), *strides, 1 if matrix else w.stride(2), room.stride(1), room.stride(0),
        MATRIX=matrix, SIGNS=sign, R=tile.rows, C=tile.columns, ROUNDS=noise.rounds, ASM=ASM, num_warps=tile.warps,
        enable_fp_fusion=False,
    )  # fmt: skip


def _line(b, key, site: int, query: int, noise: Noise, sign: int, count: int) -> torch.Tensor | None:
    """The perturbed biases [signs, N] of a query."""
    if b is None:
        return None
    line = torch.empty((count, 1, b.numel()), dtype=torch.int8, device=b.device)
    _write(b, "matrix", key, site, query, noise, sign, 0, 1, line)
    return line.view(count, -1)


def _phases(what: int, twice: int) -> tuple[int, ...]:
    return (1, 2) if what == twice else (what,)


def launch_linear_slab(
    x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, what, rounding, relu,
    query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent, memory,
) -> None:  # fmt: skip
    """Write what is asked for of every group; arguments as ``ezo::int8_linear``, then the memory of a slab, int8, flat.

    Raises:
        NotImplementedError: no triton; 2^31 or more rows, or too many tiles of outputs.
    """
    require()
    (n, k), count, noise = w.shape, len(signs), Noise("sparse_int8", rounds, p_zero, r_max)
    sign, shared = 2 if count == 2 else signs[0], x_exponent.numel() == 1
    rows = x.numel() // (k * x_exponent.numel())
    tile = int8_plain_tile(rows, k, k % 16 == 0, architecture(x.device))
    if max(n + tile.bn, k + tile.bk, rows + tile.bm) >= 1 << 31:
        raise NotImplementedError(f"int8_linear: {rows} rows, {n} outputs, {k} inputs: 2^31 is the limit")
    pitch = pitch_of(k)
    most = memory.numel() // (count * pitch)
    check_grid("int8_linear", -(-min(most, n) // tile.bn))
    slabs = slabs_of(n, most)
    with torch.cuda.device_of(x):
        for q in range(queries):
            own = slice(q * count, (q + 1) * count)
            line = _line(b, key, bias_site, query + q, noise, sign, count)
            x_own, x_scale = (x, x_exponent) if shared else (x.view(queries * count, -1)[own], x_exponent[own])
            to32, to8 = (t.view(queries * count, rows, n)[own] if t.numel() else t for t in (acc, out))
            phases = _phases(what, 3)
            for phase in phases:
                for first, height in slabs:
                    room = memory[: count * height * pitch].view(count, height, pitch)
                    if phase == phases[0] or len(slabs) > 1:  # else the slab of the first time is still there
                        _write(w, "matrix", key, site, query + q, noise, sign, first, height, room)
                    columns = slice(first, first + height)
                    int8_plain_kernel[(-(-rows // tile.bm), -(-height // tile.bn), count)](
                        x_own, room, or_dummy(None if line is None else line[:, columns], w), x_scale, w_exponent,
                        or_dummy(b_exponent, w_exponent), to32[..., columns] if to32.numel() else to32, peak[own],
                        to8[..., columns] if to8.numel() else to8, exponent[own], rows, height, k, 0 if shared else rows * k, k,
                        height * pitch, pitch, n, rows * n, n,
                        SHARED=shared, BIAS=b is not None, EVEN_K=k % tile.bk == 0, WHAT=phase,
                        ROUNDING=ROUNDINGS.index(rounding), RELU=relu and phase == REQUANTIZE,
                        BM=tile.bm, BN=tile.bn, BK=tile.bk, num_warps=tile.warps,
                        num_stages=tile.stages, enable_fp_fusion=False,
                    )  # fmt: skip


def launch_conv2d_slab(
    x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, stride, padding, dilation, conv_groups, size,
    what, rounding, relu, pool, query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent, memory,
) -> None:  # fmt: skip
    """The same of a convolution, whose whole weight is one slab: arguments as ``ezo::int8_conv2d``, then its memory."""
    from ._int8_conv2d_triton import launch_conv2d

    require()
    count, noise = len(signs), Noise("sparse_int8", rounds, p_zero, r_max)
    sign, groups, shared = 2 if count == 2 else signs[0], queries * count, x_exponent.numel() == 1
    outputs, channels, *kernel = w.shape
    batch = x.shape[0] // x_exponent.numel()
    pitch = pitch_of(w[0].numel())
    room = memory[: count * outputs * pitch].view(count, outputs, pitch)
    # of each tap its channels, one behind the other
    weights = room[:, :, : w[0].numel()].view(count, outputs, *kernel, channels).permute(0, 1, 4, 2, 3)
    with torch.cuda.device_of(x):
        for q in range(queries):
            line = _line(b, key, bias_site, query + q, noise, sign, count)
            _write(w, "conv", key, site, query + q, noise, sign, 0, outputs, room)
            for phase in _phases(what, 3):
                for i in range(count):
                    g = q * count + i
                    at = 0 if shared else g
                    parts = [t.view(groups, -1)[g] if t.numel() else t for t in (acc, out)]
                    launch_conv2d(
                        x[at * batch : (at + 1) * batch], weights[i], None if line is None else line[i],
                        x_exponent[at : at + 1], w_exponent, b_exponent, key, site, bias_site, stride, padding, dilation,
                        conv_groups, size, phase, rounding, relu, pool, 0, 1, (0,), rounds, p_zero, r_max, parts[0],
                        peak[g : g + 1], parts[1], exponent[g : g + 1],
                    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def _writer(layout: str, signs: int) -> Variant:
    tile, matrix = element_tile(4096, "sparse_int8"), layout == "matrix"
    names = (
        "site", "query", "packed", "first", "rows", "columns", "channels", "padded", "tap_mul", "tap_div", "w_row",
        *(() if matrix else ("w_channel",)), "out_row", "out_sign",
    )  # fmt: skip
    return Variant(
        kernel=int8_slab_kernel,
        name=f"int8_slab/{layout}/{'pair' if signs == 2 else signs}",
        signature={**dict.fromkeys(("w_ptr", "out_ptr"), "*i8"), "key_ptr": "*i32", **dict.fromkeys(names, "i32")},
        constexprs={
            **dict.fromkeys(("w_channel", "w_tap") if matrix else ("w_tap",), 1),
            **{"MATRIX": matrix, "SIGNS": signs, "R": tile.rows, "C": tile.columns, "ROUNDS": 7, "ASM": True},
        },
        num_warps=tile.warps,
        num_stages=3,
        expects=("multiply", "no float"),
        z_per_program=tile.rows * tile.columns,
        divisible=("channels", "columns", "padded", "w_row", "out_row", "out_sign"),
        representative=signs == 2,
    )


def _plain(what: int, archs: tuple[int, ...]) -> Variant:
    tile = int8_plain_tile(2048, 4096, True, archs[0])
    integers = ("rows", "N", "K", "x_group", "x_row", "w_group", "w_row", "b_group", "y_group", "y_row")
    return Variant(
        kernel=int8_plain_kernel,
        name=f"int8_plain/{('store', 'peak', 'requantize')[what]}/sm_{archs[0]}",
        signature={
            **dict.fromkeys(("x_ptr", "w_ptr", "b_ptr", "out_ptr"), "*i8"),
            **dict.fromkeys(("x_exponent_ptr", "w_exponent_ptr", "b_exponent_ptr"), "*i32"),
            **dict.fromkeys(("acc_ptr", "peak_ptr", "exponent_ptr"), "*i32"),
            **dict.fromkeys(integers, "i32"),
        },
        constexprs={
            **{"SHARED": False, "BIAS": True, "EVEN_K": True, "WHAT": what, "ROUNDING": 0, "RELU": False},
            **{"BM": tile.bm, "BN": tile.bn, "BK": tile.bk},
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        archs=archs,
        expects=("integer mma", "no float"),
        divisible=tuple(name for name in integers if name != "rows"),
        representative=what == 2,
    )


def variants():
    """A layer of 4096 by 4096, for the static report and the compile tests."""
    require()
    for layout in ("matrix", "conv"):
        for signs in (2, 1):
            yield _writer(layout, signs)
    small = tuple(arch for arch in ARCHS if arch not in LARGE)
    for archs in ((90,), (100,), small):
        for what in (0, 1, 2):
            yield _plain(what, archs)

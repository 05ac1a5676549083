"""Integer pointwise kernels: the rounding operators, ReLU, pooling, residual addition, requantisation.

| kernel | reads | writes |
|---|---|---|
| round | x int32 [rows, columns] | clamp(round(x / 2^shift)) int8, stream 4 by logical row and column |
| relu | x int8, flat | max(x, 0) |
| pool | x int8 [planes, H, W] | int8 [planes, H', W'] |
| add | a, b int8 [groups or 1, size] | peak int32 [groups], or int8 [groups, size] and exponent |
| requantize | acc int32 [groups, size], peak, gate | int8 [groups, size], a relu of it if asked for, exponent int32 [groups] |
| gate | int8 [groups or 1, size], or none | 0 of requantize where it is not above 0 |
"""

from __future__ import annotations

import torch

from . import _constants as C
from ._int8_triton import (
    PEAK,
    STOCHASTIC,
    check_grid,
    clamp8,
    divide,
    leave,
    leave_exponent,
    magic,
    round_shift,
    shift_of,
    shifted,
)
from ._noise_triton import ASM, lane_units, load_key, signed32
from ._tiles import ElementTile, element_tile
from ._triton import constexpr, jit, require, tl
from ._variants import Variant
from .int8_pass import ROUNDINGS

_S_ROUNDING, _ADD_SHIFT = constexpr(C.STREAM_ROUNDING), constexpr(C.ADD_SHIFT)
#: Elements of a program of the flat kernels.
_BLOCK, _WARPS = 2048, 4


@jit
def rounding_lanes(key_ptr, site, query, rows, first, COLUMNS: tl.constexpr, ROUNDS: tl.constexpr, ASM: tl.constexpr):
    """Stream 4 as int32 [R, COLUMNS]: int32 rows [R, 1], columns from ``first``, a multiple of 8."""
    k0, k1 = load_key(key_ptr)
    blocks = (first + tl.arange(0, COLUMNS // 8) * 8)[None, :].to(tl.uint32)
    counter2 = query.to(tl.uint32) << 8 | _S_ROUNDING
    return lane_units(k0, k1, site, counter2, rows.to(tl.uint32), blocks, ROUNDS, ASM)


@jit(do_not_specialize=["shift", "site", "query"])
def int8_round_kernel(
    x_ptr, key_ptr, out_ptr, shift, site, query, rows, columns,
    ROUNDING: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ROUNDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * C
    r = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    c = (first + tl.arange(0, C))[None, :]
    at = r.to(tl.int64) * columns + c
    inside = (r < rows) & (c < columns)
    # 64 bits: the magnitude of -2^31 is no int32
    x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.int64)
    lanes = x
    if ROUNDING == STOCHASTIC:
        lanes = rounding_lanes(key_ptr, site, query, r, first, C, ROUNDS, ASM)
    tl.store(out_ptr + at, clamp8(round_shift(x, shift, lanes, ROUNDING)).to(tl.int8), mask=inside)


@jit
def int8_relu_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0)
    tl.store(out_ptr + at, tl.maximum(x, 0).to(tl.int8), mask=at < size)


@jit(do_not_specialize=["size", "wide_mul", "wide_div", "high_mul", "high_div"])
def int8_pool2d_kernel(
    x_ptr, out_ptr, size, height, width, out_height, out_width, wide_mul, wide_div, high_mul, high_div,
    stride_h, stride_w, pad_h, pad_w, KH: tl.constexpr, KW: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A flat block of outputs. Padding is below every value of a maximum, and zero in an average over the whole window."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line = divide(at, wide_mul, wide_div)
    plane = divide(line, high_mul, high_div)
    top = (line - plane * out_height) * stride_h - pad_h
    left = (at - line * out_width) * stride_w - pad_w
    base = plane.to(tl.int64) * height * width
    most = tl.full((BLOCK,), -128, tl.int32)
    total = tl.zeros((BLOCK,), tl.int32)
    for r in range(KH):
        y = top + r
        for s in range(KW):
            x = left + s
            inside = (at < size) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            v = tl.load(x_ptr + (base + y.to(tl.int64) * width + x), mask=inside, other=-128 if MAX else 0).to(tl.int32)
            if MAX:
                most = tl.maximum(most, v)
            else:
                total += v
    if not MAX:
        mean = (tl.abs(total) * 2 + KH * KW) // (2 * KH * KW)
        most = tl.where(total < 0, -mean, mean)
    tl.store(out_ptr + at, most.to(tl.int8), mask=at < size)


@jit
def int8_add_kernel(
    a_ptr, b_ptr, a_exponent_ptr, b_exponent_ptr, peak_ptr, out_ptr, exponent_ptr, size,
    A_SHARED: tl.constexpr, B_SHARED: tl.constexpr, WHAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of a group, groups)."""
    group = tl.program_id(1)
    i = group * 0 if A_SHARED else group
    j = group * 0 if B_SHARED else group
    a_exponent, b_exponent = tl.load(a_exponent_ptr + i), tl.load(b_exponent_ptr + j)
    low = tl.maximum(tl.minimum(a_exponent, b_exponent), tl.maximum(a_exponent, b_exponent) - _ADD_SHIFT)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    a = tl.load(a_ptr + (i.to(tl.int64) * size + at), mask=inside, other=0).to(tl.int32)
    b = tl.load(b_ptr + (j.to(tl.int64) * size + at), mask=inside, other=0).to(tl.int32)
    v = shifted(a, a_exponent - low, _ADD_SHIFT, 30) + shifted(b, b_exponent - low, _ADD_SHIFT, 30)
    leave(v, out_ptr, out_ptr, group.to(tl.int64) * size + at, inside, peak_ptr + group, WHAT, 0, False)
    if WHAT != PEAK:  # noqa: SIM102 - the outer if is the compiler's
        if tl.program_id(0) == 0:
            tl.store(exponent_ptr + group, low + shift_of(peak_ptr + group))


@jit
def int8_requantize_kernel(
    acc_ptr, peak_ptr, x_exponent_ptr, w_exponent_ptr, gate_ptr, out_ptr, exponent_ptr, size, gate_group,
    SHARED: tl.constexpr, ROUNDING: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of a group, groups). Where ``gate`` is not above 0 the result is 0: rounding 0 gives it."""
    group = tl.program_id(1)
    within = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = group.to(tl.int64) * size + within
    acc = tl.load(acc_ptr + at, mask=within < size, other=0)
    if gate_ptr is not None:
        open_ = tl.load(gate_ptr + (group.to(tl.int64) * gate_group + within), mask=within < size, other=0)
        acc = tl.where(open_ > 0, acc, 0)
    leave(acc, acc_ptr, out_ptr, at, within < size, peak_ptr + group, 2, ROUNDING, RELU)
    if tl.program_id(0) == 0:
        own = group * 0 if SHARED else group
        leave_exponent(exponent_ptr, group, x_exponent_ptr, own, w_exponent_ptr, peak_ptr)


# ---------------------------------------------------------------------------------------------------------- launchers


def tiles_of(name: str, x: torch.Tensor) -> tuple[int, int, ElementTile, tuple[int, int]]:
    """Rows and columns of x as a matrix, the tile of a program, and the grid.

    Raises:
        NotImplementedError: too many of either for one launch.
    """
    columns = x.shape[-1] if x.dim() else 1
    rows = x.numel() // columns
    tile = element_tile(rows, "sparse_int8")
    grid = -(-rows // tile.rows), -(-columns // tile.columns)
    check_grid(name, grid[1])
    if rows + tile.rows >= 1 << 31:
        raise NotImplementedError(f"{name}: {rows} rows, 2^31 is the limit")
    return rows, columns, tile, grid


def launch_round(x, shift, rounding, key, site, query, rounds, out) -> None:
    """``out`` = clamp(round(x / 2^shift)); x contiguous."""
    require()
    rows, columns, tile, grid = tiles_of("int8_round", x)
    with torch.cuda.device_of(x):
        int8_round_kernel[grid](
            x, key, out, shift, signed32(site), query, rows, columns, ROUNDING=ROUNDINGS.index(rounding),
            R=tile.rows, C=tile.columns, ROUNDS=rounds, ASM=ASM, num_warps=tile.warps, enable_fp_fusion=False,
        )  # fmt: skip


def launch_relu(x, out) -> None:
    """``out`` = max(x, 0); both contiguous."""
    require()
    with torch.cuda.device_of(x):
        int8_relu_kernel[(-(-x.numel() // _BLOCK),)](
            x, out, x.numel(), BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False
        )


def launch_pool(x, kind, kernel, stride, padding, out) -> None:
    """Pooling of contiguous x [B, C, H, W].

    Raises:
        NotImplementedError: no triton; 2^31 or more outputs.
    """
    require()
    if out.numel() + 256 >= 1 << 31:
        raise NotImplementedError(f"int8_pool2d: {out.numel()} outputs, 2^31 is the limit")
    with torch.cuda.device_of(x):
        int8_pool2d_kernel[(-(-out.numel() // 256),)](
            x, out, out.numel(), *x.shape[2:], *out.shape[2:], *magic(out.shape[3]), *magic(out.shape[2]),
            *stride, *padding, KH=kernel[0], KW=kernel[1], MAX=kind == "max", BLOCK=256, num_warps=_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip


def launch_add(a, b, a_exponent, b_exponent, what, peak, out, exponent) -> None:
    """The peaks of a + b, or the sums requantised by them; a and b contiguous."""
    require()
    groups = peak.numel()
    size = a.numel() // a_exponent.numel()
    check_grid("int8_add", groups)
    with torch.cuda.device_of(a):
        int8_add_kernel[(-(-size // _BLOCK), groups)](
            a, b, a_exponent, b_exponent, peak, out, exponent, size, A_SHARED=a_exponent.numel() == 1,
            B_SHARED=b_exponent.numel() == 1, WHAT=what, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def launch_requantize(acc, peak, x_exponent, w_exponent, rounding, relu, gate, out, exponent) -> None:
    """Accumulators to int8 by their groups' peaks; arguments as ``ezo::int8_requantize``, contiguous."""
    require()
    groups = peak.numel()
    size = acc.numel() // groups
    check_grid("int8_requantize", groups)
    with torch.cuda.device_of(acc):
        int8_requantize_kernel[(-(-size // _BLOCK), groups)](
            acc, peak, x_exponent, w_exponent, gate, out, exponent, size, 0 if gate is None or len(gate) == 1 else size,
            SHARED=x_exponent.numel() == 1,
            ROUNDING=ROUNDINGS.index(rounding), RELU=relu, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def _variant(kernel, name: str, pointers: dict, integers: tuple, constexprs: dict, **options) -> Variant:
    return Variant(
        kernel=kernel,
        name=name,
        signature={**{p: "*" + kind for p, kind in pointers.items()}, **dict.fromkeys(integers, "i32")},
        constexprs=constexprs,
        num_warps=options.pop("warps", _WARPS),
        num_stages=3,
        expects=("no float", *options.pop("expects", ())),
        **options,
    )


def variants():
    """For the static report and the compile tests."""
    require()
    for rounding, mode in zip(ROUNDINGS, range(3), strict=True):
        tile = element_tile(1024, "sparse_int8")
        yield _variant(
            int8_round_kernel, f"int8_round/{rounding}", {"x_ptr": "i32", "key_ptr": "i32", "out_ptr": "i8"},
            ("shift", "site", "query", "rows", "columns"),
            {"ROUNDING": mode, "R": tile.rows, "C": tile.columns, "ROUNDS": 7, "ASM": True},
            expects=("multiply",) if rounding == "stochastic" else (), representative=rounding == "stochastic",
            divisible=("columns",),
        )  # fmt: skip
        if rounding != "stochastic":
            pointers = dict.fromkeys(("acc_ptr", "peak_ptr", "x_exponent_ptr", "w_exponent_ptr", "exponent_ptr"), "i32")
            for how in ("", "/relu", "/gate"):
                gate = how == "/gate"
                yield _variant(
                    int8_requantize_kernel, f"int8_requantize/{rounding}{how}",
                    {**pointers, "out_ptr": "i8", **({"gate_ptr": "i8"} if gate else {})}, ("size", "gate_group"),
                    {"SHARED": False, "ROUNDING": mode, "RELU": how == "/relu", "BLOCK": _BLOCK,
                     **({} if gate else {"gate_ptr": None})},
                    divisible=("size", "gate_group"), representative=not gate or rounding == "nearest",
                )  # fmt: skip
    yield _variant(
        int8_relu_kernel, "int8_relu", {"x_ptr": "i8", "out_ptr": "i8"}, ("size",), {"BLOCK": _BLOCK},
        divisible=("size",),
    )  # fmt: skip
    for kind in ("max", "avg"):
        integers = (
            "size", "height", "width", "out_height", "out_width", "wide_mul", "wide_div", "high_mul", "high_div",
            "stride_h", "stride_w", "pad_h", "pad_w",
        )  # fmt: skip
        yield _variant(
            int8_pool2d_kernel, f"int8_pool2d/{kind}", {"x_ptr": "i8", "out_ptr": "i8"}, integers,
            {"KH": 3, "KW": 3, "MAX": kind == "max", "BLOCK": 256},
        )  # fmt: skip
    for what in (1, 2):
        pointers = {
            **dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "i8"),
            **dict.fromkeys(("a_exponent_ptr", "b_exponent_ptr", "peak_ptr", "exponent_ptr"), "i32"),
        }
        yield _variant(
            int8_add_kernel, f"int8_add/{('peak', 'requantize')[what - 1]}", pointers, ("size",),
            {"A_SHARED": False, "B_SHARED": False, "WHAT": what, "BLOCK": _BLOCK}, divisible=("size",),
        )  # fmt: skip

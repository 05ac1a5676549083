"""Batch norm of every group on the GPU; formulas in :mod:`.batch_norm`.

| tensor | shape |
|---|---|
| x, y | [groups, rows, C, S], any strides of C and S, rows and groups at one stride; the same in both |
| parts | fp32 [groups, parts, 2, C]: mean and sum of squared deviations of some of the rows * S values |
| w, b | [groups, C] or [C]; mean, var: fp32 [groups, C] |

The first kernel takes mean and deviations of a part of a channel's values, by Welford's update in each lane and Chan's sum of
lanes; the second puts the parts together and writes y. Tiles and parts are chosen from the values of one group, so that groups
run alike.
"""

from __future__ import annotations

import torch

from ._int8_triton import check_grid
from ._triton import jit, require, tl
from ._variants import Variant

_WARPS, _BLOCK, _MOST_PARTS = 4, 1024, 32


@jit(do_not_specialize=["rows", "span"])
def batch_norm_parts_kernel(
    x_ptr, parts_ptr, rows, channels, size, span, x_row, x_c, x_s, C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of channels, parts, groups); a part has ``span`` values of each channel."""
    group = tl.program_id(2)
    c = (tl.program_id(0) * C + tl.arange(0, C))[:, None]
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, rows * size)
    base = x_ptr + group.to(tl.int64) * rows * x_row + c.to(tl.int64) * x_c
    mean = tl.zeros((C, M), tl.float32)
    square = tl.zeros((C, M), tl.float32)
    count = tl.zeros((1, M), tl.float32)
    for first in range(begin, end, M):
        i = (first + tl.arange(0, M))[None, :]
        row = i // size
        inside = i < end
        at = base + (row.to(tl.int64) * x_row + (i - row * size).to(tl.int64) * x_s)
        x = tl.load(at, mask=inside & (c < channels), other=0.0).to(tl.float32)
        count += tl.where(inside, 1.0, 0.0)
        delta = x - mean
        mean += tl.where(inside, delta / tl.maximum(count, 1.0), 0.0)
        square += tl.where(inside, delta * (x - mean), 0.0)
    n = tl.sum(count, axis=1)[:, None]
    whole = tl.div_rn(tl.sum(mean * count, axis=1)[:, None], n)
    square += count * (mean - whole) * (mean - whole)
    at = parts_ptr + (group.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2 * channels + c
    tl.store(at, whole, mask=c < channels)
    tl.store(at + channels, tl.sum(square, axis=1)[:, None], mask=c < channels)


@jit(do_not_specialize=["rows", "span", "parts", "w_group", "b_group"])
def batch_norm_kernel(
    x_ptr, y_ptr, w_ptr, b_ptr, parts_ptr, mean_ptr, var_ptr, eps, rows, channels, size, span, parts,
    x_row, x_c, x_s, w_group, b_group, C: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of M values, blocks of channels, groups): only the first axis may be longer than 65535."""
    group = tl.program_id(2)
    c = (tl.program_id(1) * C + tl.arange(0, C))[:, None]
    values = rows * size
    n = values.to(tl.float32)
    from_parts = parts_ptr + group.to(tl.int64) * parts * 2 * channels + c
    mean = tl.zeros((C, 1), tl.float32)
    for p in range(parts):
        own = tl.minimum(values - p * span, span).to(tl.float32)
        mean += tl.load(from_parts + p * 2 * channels, mask=c < channels, other=0.0) * own
    mean = tl.div_rn(mean, n)
    square = tl.zeros((C, 1), tl.float32)
    for p in range(parts):
        own = tl.minimum(values - p * span, span).to(tl.float32)
        apart = tl.load(from_parts + p * 2 * channels, mask=c < channels, other=0.0) - mean
        square += tl.load(from_parts + (p * 2 + 1) * channels, mask=c < channels, other=0.0) + own * apart * apart
    factor = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square, n) + eps))
    if tl.program_id(0) == 0:
        at = group * channels + c
        tl.store(mean_ptr + at, mean, mask=c < channels)
        tl.store(var_ptr + at, tl.div_rn(square, n - 1.0), mask=c < channels)
    if w_ptr is not None:
        factor *= tl.load(w_ptr + group * w_group + c, mask=c < channels, other=0.0).to(tl.float32)
    i = (tl.program_id(0) * M + tl.arange(0, M))[None, :]
    row = i // size
    inside = (i < values) & (c < channels)
    at = group.to(tl.int64) * rows * x_row + c.to(tl.int64) * x_c
    at = at + (row.to(tl.int64) * x_row + (i - row * size).to(tl.int64) * x_s)
    y = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean) * factor
    if b_ptr is not None:
        y += tl.load(b_ptr + group * b_group + c, mask=c < channels, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["groups"])
def running_statistics_kernel(
    running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, ok_ptr, momentum, groups, channels, C: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of channels, 2): means, then variances."""
    c = tl.program_id(0) * C + tl.arange(0, C)
    if tl.load(ok_ptr) != 0:
        for what in tl.static_range(2):
            running_ptr = running_mean_ptr if what == 0 else running_var_ptr
            own_ptr = mean_ptr if what == 0 else var_ptr
            new = tl.zeros((C,), tl.float32)
            for g in range(groups):
                new += tl.load(own_ptr + g * channels + c, mask=c < channels, other=0.0)
            new = tl.div_rn(new, groups.to(tl.float32))
            running = tl.load(running_ptr + c, mask=c < channels, other=0.0).to(tl.float32)
            running += (new - running) * momentum
            tl.store(running_ptr + c, running.to(running_ptr.dtype.element_ty), mask=c < channels)


# ---------------------------------------------------------------------------------------------------------- launchers


def batch_norm_tile(values: int, channels: int, side_by_side: bool) -> tuple[int, int, int]:
    """Channels and values of a tile, and values of a part, for ``values`` of each channel of one group.

    Args:
        side_by_side: the channels of one position are (channels last, or no positions), and not the positions of a channel.
    """
    c = min(64, max(4, 1 << (channels - 1).bit_length())) if side_by_side else 4
    m = _BLOCK // c
    tiles = -(-channels // c)
    parts = max(1, min(-(-values // (4 * m)), 264 // tiles, _MOST_PARTS))
    span = -(-values // (parts * m)) * m
    return c, m, span


def launch_batch_norm(x, w, b, groups, eps, y, mean, var) -> None:
    """Write y, and each group's mean and unbiased variance; tensors as the function checks them."""
    require()
    rows, channels = x.shape[0] // groups, x.shape[1]
    flat = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    size = flat.shape[2]
    x_row, x_c, x_s = flat.stride()
    if rows * size + 2 * _BLOCK >= 1 << 31 or groups * channels >= 1 << 31:
        raise NotImplementedError(f"batch_norm: {rows * size} values of {channels} channels: 2^31 is the limit")
    c, m, span = batch_norm_tile(rows * size, channels, size == 1 or (x_c == 1 and x_s != 1))
    parts, tiles = -(-rows * size // span), -(-channels // c)
    check_grid("batch_norm", groups, parts, tiles)
    w, b = (None if t is None else t.contiguous() for t in (w, b))
    memory = x.new_empty(groups * parts * 2 * channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        batch_norm_parts_kernel[(tiles, parts, groups)](
            x, memory, rows, channels, size, span, x_row, x_c, x_s, C=c, M=m, num_warps=_WARPS, enable_fp_fusion=False
        )
        batch_norm_kernel[(-(-rows * size // m), tiles, groups)](
            x, y, w, b, memory, mean, var, float(eps), rows, channels, size, span, parts, x_row, x_c, x_s,
            0 if w is None or w.dim() == 1 else channels, 0 if b is None or b.dim() == 1 else channels, C=c, M=m,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def launch_running_statistics(running_mean, running_var, mean, var, ok, momentum) -> None:
    """Move both running statistics, contiguous, by the means of ``mean`` and ``var`` over their groups, where ``ok``."""
    require()
    groups, channels = mean.shape
    with torch.cuda.device_of(mean):
        running_statistics_kernel[(-(-channels // 256),)](
            running_mean, running_var, mean.contiguous(), var.contiguous(), ok.view(torch.int8), float(momentum), groups,
            channels, C=256, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def variants():
    """Positions side by side, and channels, for the static report and the compile tests."""
    require()
    for dtype in ("fp32", "bf16", "fp16"):
        for name, channels, last in (("positions", 64, False), ("channels", 64, True)):
            c, m, _ = batch_norm_tile(128 * 3136, channels, last)
            strides = {"x_c": 1} if last else {"x_s": 1}
            integers = ("rows", "channels", "size", "span", "x_row", "x_c", "x_s")
            options = {"num_warps": _WARPS, "num_stages": 3, "expects": ("call",), "representative": dtype != "fp16"}
            options["divisible"] = ("channels", "size", "x_row") + (("x_s",) if last else ("x_c",))
            kinds = {"x_ptr": f"*{dtype}", "parts_ptr": "*fp32", **{i: "i32" for i in integers if i not in strides}}
            yield Variant(
                batch_norm_parts_kernel,
                f"batch_norm_parts/{dtype}/{name}",
                kinds,
                {**strides, "C": c, "M": m},
                **options,
            )
            kinds = kinds | {
                **dict.fromkeys(("y_ptr", "w_ptr", "b_ptr"), f"*{dtype}"), "mean_ptr": "*fp32", "var_ptr": "*fp32",
                "eps": "fp32", **dict.fromkeys(("parts", "w_group", "b_group"), "i32"),
            }  # fmt: skip
            yield Variant(
                batch_norm_kernel, f"batch_norm/{dtype}/{name}", kinds, {**strides, "C": c, "M": m}, **options
            )
    pointers = dict.fromkeys(("running_mean_ptr", "running_var_ptr", "mean_ptr", "var_ptr"), "*fp32")
    yield Variant(
        running_statistics_kernel, "running_statistics",
        {**pointers, "ok_ptr": "*i8", "momentum": "fp32", "groups": "i32", "channels": "i32"}, {"C": 256}, _WARPS, 3,
        expects=("call",),
    )  # fmt: skip

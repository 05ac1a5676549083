"""Cross-entropy of every group and its gradient on the GPU; formulas and shapes in :mod:`.cross_entropy`.

| tensor | shape |
|---|---|
| logits, out | [groups, rows, classes], contiguous |
| target | int64 [rows] |
| weight | fp32 [rows], or None |
| losses, grad | fp32 [groups]; the shares of a forward that leaves the gradient, too, are its grad |
| count | fp32 [1] |
| parts | fp32 [groups, programs, 2]: sums of losses and rows that count; where a group has several programs |

A program goes over its rows in blocks of R and over their classes in blocks of C. A group of up to ``WHOLE`` logits is one
program and one launch, which knows how many rows count once it has gone over all, and goes over them again for a gradient that
is asked of it; a larger one leaves parts, which a second launch adds in order. None depends on how many groups there are.
"""

from __future__ import annotations

import torch

from ._int8_triton import check_grid
from ._triton import jit, require, tl
from ._variants import Variant

#: Logits of a group that one program goes through: LeNet-5's 320, and 128 rows of 1000 classes.
WHOLE = 1 << 17
_BLOCK, _WARPS, _PARTS = 4096, 4, 1024


@jit
def maximum_and_sum(at, inside_r, classes, R: tl.constexpr, C: tl.constexpr):
    """Of each row: its largest logit m (0 if all are -inf) and the sum of exp(x - m); fp32 [R, 1]."""
    c = tl.arange(0, C)[None, :]
    lowest: tl.constexpr = float("-inf")
    m = tl.full((R, 1), lowest, tl.float32)
    s = tl.zeros((R, 1), tl.float32)
    for first in range(0, classes, C):
        x = tl.load(at + (first + c), mask=inside_r & (first + c < classes), other=lowest).to(tl.float32)
        top = tl.maximum(m, tl.max(x, axis=1)[:, None])
        finite = tl.where(top == lowest, 0.0, top)
        s = s * tl.exp(m - finite) + tl.sum(tl.exp(x - finite), axis=1)[:, None]
        m = top
    return tl.where(m == lowest, 0.0, m), s


@jit
def _weights(weight_ptr, r, inside):
    """Of each row, 1 without a tensor of them; fp32."""
    if weight_ptr is None:
        w = 1.0
    else:
        w = tl.load(weight_ptr + r, mask=inside, other=0.0)
    return w


@jit
def _write_gradient(
    logits_ptr,
    target_ptr,
    weight_ptr,
    out_ptr,
    first_row,
    rows,
    classes,
    ignore_index,
    group,
    scale,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The gradient of R rows of a group from ``first_row`` on; ``scale``: its grad over the count."""
    r = (first_row + tl.arange(0, R))[:, None]
    c = tl.arange(0, C)[None, :]
    target = tl.load(target_ptr + r, mask=r < rows, other=ignore_index)
    counts = (r < rows) & (target != ignore_index)
    row = (group.to(tl.int64) * rows + r) * classes
    m, s = maximum_and_sum(logits_ptr + row, counts, classes, R, C)
    scale = scale * _weights(weight_ptr, r, counts)
    share = tl.div_rn(scale, tl.where(counts, s, 1.0))
    for first in range(0, classes, C):
        inside = (r < rows) & (first + c < classes)
        x = tl.load(logits_ptr + row + (first + c), mask=inside & counts, other=0.0).to(tl.float32)
        d = tl.exp(x - m) * share - tl.where(target == first + c, scale, 0.0)
        tl.store(out_ptr + row + (first + c), tl.where(counts, d, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows", "span", "ignore_index"])
def cross_entropy_kernel(
    logits_ptr, target_ptr, weight_ptr, grad_ptr, losses_ptr, count_ptr, parts_ptr, out_ptr, rows, classes, span,
    ignore_index,
    ONE: tl.constexpr, GRADIENT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The grid is (programs, groups); a program has ``span`` rows. ONE: they are all of its group's."""
    group = tl.program_id(1)
    begin = tl.program_id(0) * span
    end = tl.minimum(begin + span, rows)
    total = tl.zeros((R, 1), tl.float32)
    counted = tl.zeros((R, 1), tl.float32)
    for first in range(begin, end, R):
        r = (first + tl.arange(0, R))[:, None]
        target = tl.load(target_ptr + r, mask=r < end, other=ignore_index)
        counts = (r < end) & (target != ignore_index)
        at = logits_ptr + (group.to(tl.int64) * rows + r) * classes
        m, s = maximum_and_sum(at, counts, classes, R, C)
        # a target that is no class reads nothing, and its loss is not a number
        known = counts & (target >= 0) & (target < classes)
        own = tl.load(at + target, mask=known, other=float("nan")).to(tl.float32)
        loss = ((m - own) + tl.log(tl.where(counts, s, 1.0))) * _weights(weight_ptr, r, counts)
        total += tl.where(counts, loss, 0.0)
        counted += tl.where(counts, 1.0, 0.0)
    loss, count = tl.sum(total), tl.sum(counted)
    if ONE:
        tl.store(losses_ptr + group, tl.div_rn(loss, count))
        tl.store(count_ptr, count)  # the same in every group
        if GRADIENT:
            scale = tl.div_rn(tl.load(grad_ptr + group), count)
            for first in range(begin, end, R):
                _write_gradient(
                    logits_ptr, target_ptr, weight_ptr, out_ptr, first, rows, classes, ignore_index, group, scale, R, C
                )
    else:
        part = parts_ptr + 2 * (group.to(tl.int64) * tl.num_programs(0) + tl.program_id(0))
        tl.store(part, loss)
        tl.store(part + 1, count)


@jit(do_not_specialize=["programs"])
def cross_entropy_mean_kernel(parts_ptr, losses_ptr, count_ptr, programs, BLOCK: tl.constexpr):
    """The grid is (groups)."""
    group = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    counted = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, programs, BLOCK):
        i = first + tl.arange(0, BLOCK)
        at = parts_ptr + 2 * (group.to(tl.int64) * programs + i)
        total += tl.load(at, mask=i < programs, other=0.0)
        counted += tl.load(at + 1, mask=i < programs, other=0.0)
    count = tl.sum(counted)
    tl.store(losses_ptr + group, tl.div_rn(tl.sum(total), count))
    tl.store(count_ptr, count)


@jit(do_not_specialize=["rows", "ignore_index"])
def cross_entropy_backward_kernel(
    logits_ptr, target_ptr, weight_ptr, grad_ptr, count_ptr, out_ptr, rows, classes, ignore_index,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of rows, groups)."""
    group = tl.program_id(1)
    scale = tl.div_rn(tl.load(grad_ptr + group), tl.load(count_ptr))
    _write_gradient(
        logits_ptr,
        target_ptr,
        weight_ptr,
        out_ptr,
        tl.program_id(0) * R,
        rows,
        classes,
        ignore_index,
        group,
        scale,
        R,
        C,
    )


# ---------------------------------------------------------------------------------------------------------- launchers


def cross_entropy_tile(rows: int, classes: int) -> tuple[int, int, int]:
    """R, C and the rows of a program, for a group of ``rows`` rows."""
    c = min(_BLOCK, max(8, 1 << (classes - 1).bit_length()))
    r = min(_BLOCK // c, max(1, 1 << (rows - 1).bit_length()))
    return r, c, rows if rows * max(c, classes) <= WHOLE else r


def _grid(logits, target, groups: int) -> tuple[int, int, int]:
    rows, classes = target.numel(), logits.shape[1]
    if max(rows, classes) + _BLOCK >= 1 << 31:
        raise NotImplementedError(f"cross_entropy: {rows} rows of {classes} classes: 2^31 is the limit")
    check_grid("cross_entropy", groups)
    return cross_entropy_tile(rows, classes)


def launch_cross_entropy(logits, target, weight, ignore_index, grad, losses, count, out) -> None:
    """Write the loss of each group, how many rows count in it, and with ``grad`` the gradient; contiguous tensors."""
    require()
    groups, rows = losses.numel(), target.numel()
    if not rows:
        losses.fill_(float("nan"))
        count.zero_()
        return
    r, c, span = _grid(logits, target, groups)
    programs = -(-rows // span)
    parts = None if programs == 1 else losses.new_empty(groups * programs * 2)
    one = programs == 1
    now = one and grad is not None
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(programs, groups)](
            logits, target, weight, grad if now else None, losses, count, parts, out if now else None,
            rows, logits.shape[1], span, ignore_index, ONE=one, GRADIENT=now, R=r, C=c,
            num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        if not one:
            cross_entropy_mean_kernel[(groups,)](
                parts, losses, count, programs, BLOCK=_PARTS, num_warps=_WARPS, enable_fp_fusion=False
            )
    if grad is not None and not now:
        launch_cross_entropy_backward(logits, target, weight, ignore_index, grad, count, out)


def launch_cross_entropy_backward(logits, target, weight, ignore_index, grad, count, out) -> None:
    """Write the gradient of all logits; contiguous tensors."""
    require()
    groups, rows = grad.numel(), target.numel()
    if not rows:
        return
    r, c, _ = _grid(logits, target, groups)
    with torch.cuda.device_of(logits):
        cross_entropy_backward_kernel[(-(-rows // r), groups)](
            logits, target, weight, grad, count, out, rows, logits.shape[1], ignore_index, R=r, C=c, num_warps=_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def variants():
    """Ten classes of one program a group, and a vocabulary, for the static report and the compile tests."""
    require()
    integers = dict.fromkeys(("rows", "classes", "span", "ignore_index"), "i32")
    for dtype in ("fp32", "bf16", "fp16"):
        floats = {"logits_ptr": f"*{dtype}", "target_ptr": "*i64"}
        sums = dict.fromkeys(("losses_ptr", "count_ptr", "parts_ptr"), "*fp32")
        for rows, classes in ((32, 10), (1024, 32000)):
            r, c, span = cross_entropy_tile(rows, classes)
            options = {"num_warps": _WARPS, "num_stages": 3, "expects": ("call",), "representative": dtype != "fp16"}
            options["divisible"] = ("classes",) if classes % 16 == 0 else ()
            kinds = {**floats, "weight_ptr": "*fp32", "grad_ptr": "*fp32", "count_ptr": "*fp32", "out_ptr": f"*{dtype}"}
            one = span == rows
            for now, weighted in ((False, False), (True, False), (True, True))[: 1 + 2 * one]:
                gone = ("parts_ptr",) * one + ("grad_ptr", "out_ptr") * (not now) + ("weight_ptr",) * (not weighted)
                absent = dict.fromkeys(gone)
                own = {name: kind for name, kind in {**kinds, **sums, **integers}.items() if name not in absent}
                what = "/gradient" * now + "/weighted" * weighted
                yield Variant(
                    cross_entropy_kernel, f"cross_entropy/{dtype}/{rows}x{classes}{what}", own,
                    {**absent, "ONE": one, "GRADIENT": now, "R": r, "C": c}, **options,
                )  # fmt: skip
            own = {name: kind for name, kind in {**kinds, **integers}.items() if name not in ("weight_ptr", "span")}
            yield Variant(
                cross_entropy_backward_kernel, f"cross_entropy_backward/{dtype}/{rows}x{classes}", own,
                {"weight_ptr": None, "R": r, "C": c}, **options,
            )  # fmt: skip
    sums = dict.fromkeys(("parts_ptr", "losses_ptr", "count_ptr"), "*fp32")
    yield Variant(
        cross_entropy_mean_kernel, "cross_entropy_mean", {**sums, "programs": "i32"}, {"BLOCK": _PARTS}, _WARPS, 3,
        expects=("call",),
    )  # fmt: skip

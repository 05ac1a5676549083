"""g, the sum of the losses and the count of an integer step on the GPU (:mod:`ezo_kernels.ops.int8_signs`): one program.

That of a launch of its own, or the last one of the launch that made the losses.
"""

from __future__ import annotations

import torch

from ._tiles import one_program
from ._triton import jit, require, tl
from ._variants import Variant


@jit
def signs(losses_ptr, g_ptr, total_ptr, groups, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """FORM: 2 for both signs of a query, 1 for one sign, 0 for losses without a trunk."""
    i = tl.arange(0, BLOCK)
    if FORM == 2:
        inside = i < groups // 2
        own = tl.load(losses_ptr + 2 * i, mask=inside, other=0)
        other = tl.load(losses_ptr + 2 * i + 1, mask=inside, other=0)
        tl.store(g_ptr + i, (own > other).to(tl.int32) - (own < other).to(tl.int32), mask=inside)
        total = tl.sum(own + other, axis=0)
    else:
        inside = i < groups
        own = tl.load(losses_ptr + i, mask=inside, other=0)
        total = tl.sum(own, axis=0)
        if FORM == 1:
            lowest = tl.min(tl.where(inside, own, 0x7FFFFFFFFFFFFFFF), axis=0)
            mean = total - groups * lowest
            own = (own - lowest) * groups
            tl.store(g_ptr + i, (own > mean).to(tl.int32) - (own < mean).to(tl.int32), mask=inside)
    tl.store(total_ptr, total)


@jit
def signs_by_the_last(losses_ptr, arrived_ptr, g_ptr, total_ptr, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """:func:`signs` by the last program of a grid (any, groups) to have added to its group's loss; with FORM 0 nothing.

    Which one that is does not matter: the losses that it reads are the same, and none waits for another.
    """
    if FORM != 0:
        tl.debug_barrier()  # this program's addition is before its arrival
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == tl.num_programs(0) * tl.num_programs(1) - 1:
            signs(losses_ptr, g_ptr, total_ptr, tl.num_programs(1), FORM, BLOCK)


@jit(do_not_specialize=["groups"])
def int8_signs_kernel(losses_ptr, g_ptr, total_ptr, step_ptr, groups, FORM: tl.constexpr, BLOCK: tl.constexpr):
    signs(losses_ptr, g_ptr, total_ptr, groups, FORM, BLOCK)
    tl.store(step_ptr, tl.load(step_ptr) + 1)


def form_of(g: torch.Tensor | None, antithetic: bool) -> int:
    """FORM of :func:`signs`, for this ``g``."""
    return 0 if g is None or not g.numel() else 2 if antithetic else 1


def launch_signs(losses, antithetic, g, total, step) -> None:
    """Arguments as in :func:`ezo_kernels.ops.int8_signs.int8_signs`, all checked there."""
    require()
    groups = losses.numel()
    block, warps = one_program(groups)
    with torch.cuda.device_of(losses):
        int8_signs_kernel[(1,)](
            losses, g, total, step, groups, FORM=form_of(g, antithetic), BLOCK=block, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip


def variants():
    """A pair, one sign of many queries, and a step without a trunk."""
    signature = {**dict.fromkeys(("losses_ptr", "total_ptr", "step_ptr"), "*i64"), "g_ptr": "*i32", "groups": "i32"}
    for form, groups in ((2, 2), (1, 64), (0, 1)):
        block, warps = one_program(groups)
        yield Variant(
            int8_signs_kernel, f"int8_signs/{('plain', 'one_sign', 'pair')[form]}/{groups}", signature,
            {"FORM": form, "BLOCK": block}, warps, 1, expects=("no float",),
        )  # fmt: skip

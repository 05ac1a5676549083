"""g, coefficients and counts of a step on the GPU (:mod:`ezo_kernels.ops.coefficients`): one program, one launch.

With torch's operators the same takes twenty launches, and five more for each of the head's parameters: more than the forward
of a small network.
"""

from __future__ import annotations

import torch

from ._tiles import one_program
from ._triton import jit, require, tl
from ._variants import Variant


@jit(do_not_specialize=["groups", "clip", "factor"])
def coefficients_kernel(
    losses_ptr, lr_ptr, eps_ptr, bad_ptr, g_ptr, coef_ptr, ok_ptr, skip_ptr, mean_ptr, step_ptr, skipped_ptr,
    groups, clip, factor,
    FORM: tl.constexpr, BAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """FORM: 2 for both signs of a query, 1 for one sign, 0 for losses without a trunk. ``factor``: n / (n - 1)."""
    i = tl.arange(0, BLOCK)
    infinite: tl.constexpr = float("inf")
    eps = tl.load(eps_ptr)
    if FORM == 2:
        queries = groups // 2
        inside = i < queries
        plus = tl.load(losses_ptr + 2 * i, mask=inside, other=0.0)
        minus = tl.load(losses_ptr + 2 * i + 1, mask=inside, other=0.0)
        g = tl.div_rn(plus - minus, 2.0 * eps)
        finite = (tl.abs(plus) < infinite) & (tl.abs(minus) < infinite)
        mean = tl.div_rn(tl.sum(plus + minus, axis=0), groups.to(tl.float32))
    else:
        queries = groups
        inside = i < groups
        own = tl.load(losses_ptr + i, mask=inside, other=0.0)
        finite = tl.abs(own) < infinite
        g = own
        mean = tl.div_rn(tl.sum(own, axis=0), groups.to(tl.float32))
        if FORM == 1:
            g = tl.div_rn((own - mean) * factor, eps)
    finite = (finite & (tl.abs(g) < infinite)) | (i >= queries)
    fine = tl.min(finite.to(tl.int32), axis=0)
    if BAD:
        fine = tl.where(tl.load(bad_ptr) == 0.0, fine, 0)
    if FORM != 0:
        # a NaN stays one: it is neither above nor below
        g = tl.where(g > clip, clip, tl.where(g < -clip, -clip, g))
        tl.store(g_ptr + i, g, mask=inside)
        coef = tl.div_rn(tl.load(lr_ptr) * g, queries.to(tl.float32))
        tl.store(coef_ptr + i, tl.where(fine == 1, coef, 0.0), mask=inside)
    tl.store(mean_ptr, mean)
    tl.store(ok_ptr, fine.to(tl.int8))
    tl.store(skip_ptr, (1 - fine).to(tl.float32))
    tl.store(step_ptr, tl.load(step_ptr) + fine.to(tl.int64))
    tl.store(skipped_ptr, tl.load(skipped_ptr) + (1 - fine).to(tl.int64))


def launch_coefficients(losses, lr, eps, bad, antithetic, clip, g, coef, ok, skip, mean, step, skipped) -> None:
    """Arguments as in :func:`ezo_kernels.ops.coefficients.coefficients`, all checked there."""
    require()
    groups = losses.numel()
    block, warps = one_program(groups)
    form = 0 if not g.numel() else 2 if antithetic else 1
    with torch.cuda.device_of(losses):
        coefficients_kernel[(1,)](
            losses.contiguous(), lr, eps, bad, g, coef, ok.view(torch.int8), skip, mean, step, skipped,
            groups, float(clip), groups / max(1, groups - 1),
            FORM=form, BAD=bad is not None, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def variants():
    """A pair, one sign of many queries, and a step without a trunk."""
    floats = ("losses_ptr", "lr_ptr", "eps_ptr", "bad_ptr", "g_ptr", "coef_ptr", "skip_ptr", "mean_ptr")
    signature = {
        **dict.fromkeys(floats, "*fp32"), "ok_ptr": "*i8", "step_ptr": "*i64", "skipped_ptr": "*i64",
        "groups": "i32", "clip": "fp32", "factor": "fp32",
    }  # fmt: skip
    for form, groups in ((2, 2), (1, 64), (0, 1)):
        block, warps = one_program(groups)
        constexprs = {"FORM": form, "BAD": True, "BLOCK": block}
        yield Variant(
            coefficients_kernel, f"coefficients/{('plain', 'one_sign', 'pair')[form]}/{groups}", signature, constexprs,
            warps, 1, expects=("call",),
        )  # fmt: skip

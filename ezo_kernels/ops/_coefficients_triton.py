"""g, coefficients and counts of a step on the GPU (:mod:`ezo_kernels.ops.coefficients`): one program, one launch.

With torch's operators the same takes twenty launches, and five more for each of the head's parameters: more than the forward
of a small network. A small head's gradients are looked at here, and its SGD is carried out: the program reads what others
would have to tell it.
"""

from __future__ import annotations

import torch

from ._tiles import one_program
from ._triton import jit, require, tl
from ._variants import Variant
from .coefficients import MOST_TENSORS


@jit
def _finite(grad_ptr, n, BLOCK: tl.constexpr):
    """1 if all n gradients are finite, else 0."""
    infinite: tl.constexpr = float("inf")
    i = tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    return tl.min((tl.abs(grad) < infinite).to(tl.int32), axis=0)


@jit
def _sgd(w_ptr, grad_ptr, n, lr, fine, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = (i < n) & (fine == 1)
    w = tl.load(w_ptr + i, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(w_ptr + i, (w - lr * grad).to(w_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["groups", "clip", "factor", "n0", "n1", "n2", "n3"])
def coefficients_kernel(
    losses_ptr, lr_ptr, eps_ptr, bad_ptr, g_ptr, coef_ptr, ok_ptr, skip_ptr, mean_ptr, step_ptr, skipped_ptr,
    head_lr_ptr, grad0_ptr, grad1_ptr, grad2_ptr, grad3_ptr, w0_ptr, w1_ptr, w2_ptr, w3_ptr,
    groups, clip, factor, n0, n1, n2, n3,
    FORM: tl.constexpr, BLOCK: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
):  # fmt: skip
    """FORM: 2 for both signs of a query, 1 for one sign, 0 for losses without a trunk. ``factor``: n / (n - 1).

    B0 to B3: blocks of the head's gradients, whose pointers are None where there are fewer.
    """
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
    if bad_ptr is not None:
        fine = tl.where(tl.load(bad_ptr) == 0.0, fine, 0)
        tl.debug_barrier()  # every warp reads it before one of them writes
        tl.store(bad_ptr, 0.0)
    if grad0_ptr is not None:
        fine = tl.minimum(fine, _finite(grad0_ptr, n0, B0))
    if grad1_ptr is not None:
        fine = tl.minimum(fine, _finite(grad1_ptr, n1, B1))
    if grad2_ptr is not None:
        fine = tl.minimum(fine, _finite(grad2_ptr, n2, B2))
    if grad3_ptr is not None:
        fine = tl.minimum(fine, _finite(grad3_ptr, n3, B3))
    if head_lr_ptr is not None:
        head_lr = tl.load(head_lr_ptr)
        if w0_ptr is not None:
            _sgd(w0_ptr, grad0_ptr, n0, head_lr, fine, B0)
        if w1_ptr is not None:
            _sgd(w1_ptr, grad1_ptr, n1, head_lr, fine, B1)
        if w2_ptr is not None:
            _sgd(w2_ptr, grad2_ptr, n2, head_lr, fine, B2)
        if w3_ptr is not None:
            _sgd(w3_ptr, grad3_ptr, n3, head_lr, fine, B3)
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


def _blocks(sizes: list[int]) -> tuple[list[int], int]:
    """The blocks of gradients of these sizes, 0 for one that is missing, and the warps that they want."""
    found = [one_program(n)[0] if n else 0 for n in sizes]
    return found, min(16, max(1, max(found) // 256))


def launch_coefficients(
    losses, lr, eps, grads, head_lr, antithetic, clip, bad, weights, g, coef, ok, skip, mean, step, skipped
) -> None:
    """Arguments as in :func:`ezo_kernels.ops.coefficients.coefficients`, all checked there."""
    require()
    groups = losses.numel()
    block, warps = one_program(groups)
    form = 0 if not g.numel() else 2 if antithetic else 1
    sizes = [t.numel() for t in grads] + [0] * (MOST_TENSORS - len(grads))
    # an empty gradient has nothing to look at
    grads, weights = (
        [*(t if t.numel() else None for t in ts), *[None] * (MOST_TENSORS - len(ts))] for ts in (grads, weights)
    )
    blocks, more = _blocks(sizes)
    moved = [w for w in weights if w is not None]
    with torch.cuda.device_of(losses):
        coefficients_kernel[(1,)](
            losses.contiguous(), lr, eps, bad, g, coef, ok.view(torch.int8), skip, mean, step, skipped, head_lr,
            *grads, *weights, groups, float(clip), groups / max(1, groups - 1), *sizes,
            FORM=form, BLOCK=block, **dict(zip(("B0", "B1", "B2", "B3"), blocks, strict=True)),
            num_warps=max(warps, more), enable_fp_fusion=False,
        )  # fmt: skip
    if moved:
        torch.autograd.graph.increment_version(moved)  # a kernel wrote them behind autograd's back


def variants():
    """A pair, one sign of many queries, and a step without a trunk; without a head, with a large one, and with LeNet-5's."""
    floats = ("losses_ptr", "lr_ptr", "eps_ptr", "g_ptr", "coef_ptr", "skip_ptr", "mean_ptr")
    signature = {
        **dict.fromkeys(floats, "*fp32"), "ok_ptr": "*i8", "step_ptr": "*i64", "skipped_ptr": "*i64",
        "groups": "i32", "clip": "fp32", "factor": "fp32", **dict.fromkeys(("n0", "n1", "n2", "n3"), "i32"),
    }  # fmt: skip
    heads = {"": (), "/large": (), "/fc3": (840, 10), "/fc2+fc3": (10080, 84, 840, 10)}
    for form, groups in ((2, 2), (1, 64), (0, 1)):
        for head, sizes in heads.items():
            block, warps = one_program(groups)
            blocks, more = _blocks([*sizes, *[0] * (MOST_TENSORS - len(sizes))])
            pointers = [f"{what}{i}_ptr" for i in range(len(sizes)) for what in ("grad", "w")]
            pointers += ["head_lr_ptr"] if sizes else ["bad_ptr"] if head else []
            all_of = [f"{what}{i}_ptr" for i in range(MOST_TENSORS) for what in ("grad", "w")] + [
                "head_lr_ptr",
                "bad_ptr",
            ]
            constexprs = {
                **{p: None for p in all_of if p not in pointers}, "FORM": form, "BLOCK": block,
                **{f"B{i}": b for i, b in enumerate(blocks)},
            }  # fmt: skip
            yield Variant(
                coefficients_kernel, f"coefficients/{('plain', 'one_sign', 'pair')[form]}/{groups}{head}",
                {**signature, **dict.fromkeys(pointers, "*fp32")}, constexprs, max(warps, more), 1, expects=("call",),
                representative=head != "/large",
            )  # fmt: skip

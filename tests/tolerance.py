"""How far from the truth a float result may be: one rule, one table."""

from __future__ import annotations

import numpy as np
import torch

#: What is allowed beyond twice torch's own error, relative to the largest value: one rounding of it.
FLOORS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bits of ``t`` as integers, contiguous."""
    t = t.detach().cpu().contiguous()
    return t.view(_BITS[t.element_size()]) if t.dim() else t.reshape(1).view(_BITS[t.element_size()])


def assert_bitwise_equal(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    """Same dtype, shape and bits (NaN equals the same NaN, -0 differs from 0); names the first element that differs."""
    assert a.dtype == b.dtype and a.shape == b.shape, f"{what} {a.dtype} {tuple(a.shape)} != {b.dtype} {tuple(b.shape)}"
    left, right = bits(a), bits(b)
    wrong = (left != right).flatten().nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        at = tuple(int(c) for c in np.unravel_index(i, a.shape)) if a.dim() else ()
        x, y = a.detach().cpu().contiguous().flatten()[i].item(), b.detach().cpu().contiguous().flatten()[i].item()
        mask = (1 << 8 * a.element_size()) - 1
        raise AssertionError(
            f"{what} {len(wrong)} of {a.numel()} elements differ, the first is element {i} at {at}: {x!r} != {y!r} "
            f"(bits {int(left.flatten()[i]) & mask:#x} != {int(right.flatten()[i]) & mask:#x})"
        )


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference from the fp64 ``truth``, relative to its largest magnitude. Not finite counts as infinite."""
    assert truth.dtype == torch.float64 and result.shape == truth.shape, (truth.dtype, result.shape, truth.shape)
    if not truth.numel():
        return 0.0
    difference = (result.detach().cpu().double() - truth.cpu()).abs()
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.max()) / max(float(truth.abs().max()), 1e-30)


def assert_within_torch_error(
    ours: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, what: str = ""
) -> None:
    """err(ours) <= 2 err(torch in the same dtype) + floor, both against fp64."""
    assert ours.dtype == same_dtype.dtype and ours.shape == same_dtype.shape, (
        f"{what} {ours.dtype} {tuple(ours.shape)} where torch gives {same_dtype.dtype} {tuple(same_dtype.shape)}"
    )
    mine, limit = error(ours, truth), 2 * error(same_dtype, truth) + FLOORS[ours.dtype]
    assert mine <= limit, f"{what} error {mine:.3g} is above 2 * torch's + floor = {limit:.3g}"

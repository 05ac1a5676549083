"""Parts of K: where a product's programs are few, each makes a share of its outputs, and a second kernel adds the shares up.

| tensor | shape |
|---|---|
| parts | fp32 [parts, size], of which the first has the bias |
| out | [size], any float dtype |
"""

from __future__ import annotations

import warnings

import torch

from ._triton import jit, require, tl
from ._variants import Variant

#: Outputs of a program that adds parts up.
_BLOCK = 1024


@jit
def finish(y, dtype: tl.constexpr, RELU: tl.constexpr):
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays
    return y.to(dtype)


@jit(do_not_specialize=["parts"])
def sum_parts_kernel(parts_ptr, out_ptr, size, parts, RELU: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of fp32 [parts, size], in order, rounded once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(parts_ptr + at, mask=inside, other=0.0)
    for i in range(1, parts):
        total += tl.load(parts_ptr + (tl.cast(i, tl.int64) * size + at), mask=inside, other=0.0)
    tl.store(out_ptr + at, finish(total, out_ptr.dtype.element_ty, RELU), mask=inside)


def sum_parts(memory: torch.Tensor, out: torch.Tensor, parts: int, relu: bool) -> None:
    """Write the sum of the parts in ``memory`` to ``out``, contiguous, perhaps with a relu; on the current device."""
    sum_parts_kernel[(-(-out.numel() // _BLOCK),)](
        memory, out, out.numel(), parts, RELU=relu, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False
    )


def room_for_parts(name: str, parts: int, out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Memory of that many ``out``; None, with a warning, where there is too little."""
    try:
        return torch.empty(parts * out.numel(), dtype=dtype, device=out.device)
    except torch.OutOfMemoryError:
        more = (
            "" if dtype == torch.int32 else ", and a sign made alone may differ from one made before in its last bits"
        )
        size = parts * out.numel() * dtype.itemsize
        warnings.warn(f"{name}: no memory for {size} bytes of parts; K is not cut{more}", RuntimeWarning, 3)
        return None


# ----------------------------------------------------------------------------------------------------------- variants


def variants():
    """For the static report and the compile tests."""
    require()
    for relu in (False, True):
        signature = {"parts_ptr": "*fp32", "out_ptr": "*bf16", "size": "i32", "parts": "i32"}
        yield Variant(
            sum_parts_kernel, f"sum_parts/bf16{'/relu' if relu else ''}", signature, {"RELU": relu, "BLOCK": _BLOCK}, 4, 3,
            expects=(), divisible=("size",),
        )  # fmt: skip

"""Dropout masks on the GPU: mask[r, c] = lane(r, c) >= threshold, stream 5 of the noise contract.

| tensor | shape |
|---|---|
| out | bool [rows, features] |
"""

from __future__ import annotations

import torch

from . import _constants as C
from ._noise_triton import ASM, lane_units, load_key, signed32
from ._triton import constexpr, jit, require, tl, triton
from ._variants import Variant

_S_DROPOUT = constexpr(C.STREAM_DROPOUT)
_ROWS, _COLUMNS, _WARPS = 4, 256, 4


@jit(do_not_specialize=["site", "query", "threshold"])
def dropout_mask_kernel(
    out_ptr, key_ptr, site, query, threshold, rows, features,
    ROUNDS: tl.constexpr, ASM: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    k0, k1 = load_key(key_ptr)
    tiles = tl.cdiv(features, COLUMNS)
    r = tl.program_id(0) // tiles * R + tl.arange(0, R)[:, None]
    first = tl.program_id(0) % tiles * COLUMNS
    c = first + tl.arange(0, COLUMNS)[None, :]
    blocks = first + tl.arange(0, COLUMNS // 8)[None, :] * 8
    counter2 = (query.to(tl.uint32) << 8) | _S_DROPOUT
    lanes = lane_units(k0, k1, site, counter2, r.to(tl.uint32), blocks.to(tl.uint32), ROUNDS, ASM)
    kept = (lanes >= threshold).to(tl.int8)
    tl.store(out_ptr + r.to(tl.int64) * features + c, kept, mask=(r < rows) & (c < features))


def launch_dropout_mask(
    out: torch.Tensor, key: torch.Tensor, site: int, query: int, rounds: int, threshold: int
) -> None:
    """Fill ``out``, bool [rows, features], contiguous."""
    require()
    rows, features = out.shape
    # one axis: the others end at 65535
    grid = (triton.cdiv(rows, _ROWS) * triton.cdiv(features, _COLUMNS),)
    with torch.cuda.device_of(out):
        dropout_mask_kernel[grid](
            out.view(torch.int8), key, signed32(site), query, threshold, rows, features,
            ROUNDS=rounds, ASM=ASM, R=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def variants():
    """The kernel as it is launched."""
    signature = dict.fromkeys(("site", "query", "threshold", "rows", "features"), "i32")
    constexprs = {"ROUNDS": 7, "ASM": True, "R": _ROWS, "COLUMNS": _COLUMNS}
    yield Variant(
        dropout_mask_kernel, "dropout_mask/bool/7", {"out_ptr": "*i8", "key_ptr": "*i32", **signature}, constexprs,
        _WARPS, 1, z_per_program=_ROWS * _COLUMNS,
    )  # fmt: skip

"""Rows drawn by importance on the GPU: formulas and shapes in :mod:`.importance`.

| tensor | shape |
|---|---|
| logits | [P, classes], contiguous |
| target | int64 [P] |
| q | int32 [P]: -1 of a row that does not count |
| rows, weight | int64, fp32 [R] |

The first kernel has a program for a block of rows, whose classes it goes over twice. Of the second, each program goes through
all q, which is little, and makes the rows of its own block: nothing waits for another program.
"""

from __future__ import annotations

import torch

from . import _constants as K
from ._cross_entropy_triton import maximum_and_sum
from ._noise_triton import ASM, load_key, philox
from ._triton import constexpr, jit, require, tl
from ._variants import Variant
from .importance import NO_NUMBER

_S_IMPORTANCE, _NO_NUMBER = constexpr(K.STREAM_IMPORTANCE), constexpr(NO_NUMBER)
#: Of the first kernel's block, rows times classes, which are fp32 and as many addresses: 4096 spill.
_BLOCK, _WARPS = 1024, 4
#: Of a program of the second kernel: rows drawn times rows drawn from.
_PAIRS = 4096


@jit(do_not_specialize=["rows", "ignore_index"])
def importance_score_kernel(
    logits_ptr, target_ptr, q_ptr, rows, classes, ignore_index, R: tl.constexpr, C: tl.constexpr
):
    """The grid is (blocks of R rows)."""
    r = (tl.program_id(0) * R + tl.arange(0, R))[:, None]
    c = tl.arange(0, C)[None, :]
    target = tl.load(target_ptr + r, mask=r < rows, other=ignore_index)
    counts = (r < rows) & (target != ignore_index)
    at = logits_ptr + r.to(tl.int64) * classes
    m, s = maximum_and_sum(at, counts, classes, R, C)
    square = tl.zeros((R, 1), tl.float32)
    for first in range(0, classes, C):
        inside = counts & (first + c < classes)
        x = tl.load(at + (first + c), mask=inside, other=0.0).to(tl.float32)
        e = tl.div_rn(tl.exp(x - m), tl.where(inside, s, 1.0)) - tl.where(target == first + c, 1.0, 0.0)
        square += tl.sum(tl.where(inside, e * e, 0.0), axis=1)[:, None]
    # a target that is no class has no largest probability to compare with
    known = (target >= 0) & (target < classes) & (square == square)
    q = tl.where(known, (tl.sqrt_rn(square) * 65536.0 + 0.5).to(tl.int32), _NO_NUMBER)
    tl.store(q_ptr + r, tl.where(counts, q, -1), mask=r < rows)


@jit(do_not_specialize=["count", "draw"])
def importance_draw_kernel(
    q_ptr, key_ptr, rows_ptr, weight_ptr, rows, count, draw,
    ROUNDS: tl.constexpr, ASM: tl.constexpr, P: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """The grid is (blocks of J drawn rows); P is at least ``rows``."""
    r = tl.arange(0, P)
    j = tl.program_id(0) * J + tl.arange(0, J)
    q = tl.load(q_ptr + r, mask=r < rows, other=-1)
    counts = q >= 0
    no_number = tl.max(q, axis=0) == _NO_NUMBER
    n = tl.sum(counts.to(tl.int64), axis=0)
    q = tl.maximum(q, 0).to(tl.int64)
    total = tl.sum(q, axis=0)
    q = tl.where(total == 0, counts.to(tl.int64), q)
    total = tl.where(total == 0, n, total)
    mass = tl.where(counts, 9 * n * q + total, 0)
    everything = 10 * n * total
    k0, k1 = load_key(key_ptr)
    zero = draw.to(tl.uint32) * 0
    word, _, _, _ = philox(zero, zero, (draw.to(tl.uint32) << 8) | _S_IMPORTANCE, zero, k0, k1, ROUNDS, ASM)
    u = word.to(tl.int64)
    # everything * u needs more than 64 bits: its halves do not
    low = ((everything & 0xFFFF) * u) >> 16
    at = j.to(tl.int64) * everything + (((everything >> 16) * u + low) >> 16)
    before = tl.cumsum(mass, axis=0) * count
    row = tl.sum((before[None, :] <= at[:, None]).to(tl.int32), axis=1)
    row = tl.minimum(row, rows - 1)  # no row counts, or j is beyond the last
    own = tl.sum(tl.where(r[None, :] == row[:, None], mass[None, :], 0), axis=1)
    tl.store(rows_ptr + j, row.to(tl.int64), mask=j < count)
    share = tl.where(no_number, float("nan"), (10 * total).to(tl.float32))
    tl.store(weight_ptr + j, tl.div_rn(share, own.to(tl.float32)), mask=j < count)


# ---------------------------------------------------------------------------------------------------------- launchers


def score_tile(rows: int, classes: int) -> tuple[int, int]:
    """R and C."""
    c = min(_BLOCK, max(8, 1 << (classes - 1).bit_length()))
    return min(_BLOCK // c, max(1, 1 << (rows - 1).bit_length())), c


def draw_tile(rows: int) -> tuple[int, int]:
    """P, and the rows that a program draws."""
    p = max(32, 1 << (rows - 1).bit_length())
    return p, max(1, min(32, _PAIRS // p))


def launch_importance_rows(logits, target, key, ignore_index, draw, rounds, rows, weight) -> None:
    """Arguments as in :func:`ezo_kernels.ops.importance.importance_rows`, all checked there; contiguous tensors."""
    require()
    taken, classes = logits.shape
    r, c = score_tile(taken, classes)
    p, j = draw_tile(taken)
    q = torch.empty(taken, dtype=torch.int32, device=logits.device)
    count = rows.numel()
    with torch.cuda.device_of(logits):
        importance_score_kernel[(-(-taken // r),)](
            logits, target, q, taken, classes, ignore_index, R=r, C=c, num_warps=_WARPS, enable_fp_fusion=False
        )
        importance_draw_kernel[(-(-count // j),)](
            q, key, rows, weight, taken, count, draw, ROUNDS=rounds, ASM=ASM, P=p, J=j, num_warps=_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def variants():
    """Ten classes and a thousand; a few rows and the most, for the static report and the compile tests."""
    require()
    for dtype, rows, classes in (("fp32", 128, 10), ("bf16", 256, 1000)):
        r, c = score_tile(rows, classes)
        signature = {"logits_ptr": f"*{dtype}", "target_ptr": "*i64", "q_ptr": "*i32"}
        signature |= dict.fromkeys(("rows", "classes", "ignore_index"), "i32")
        yield Variant(
            importance_score_kernel, f"importance_score/{dtype}/{rows}x{classes}", signature, {"R": r, "C": c}, _WARPS, 3,
            expects=("call",),
        )  # fmt: skip
    for rows in (128, 4096):
        p, j = draw_tile(rows)
        signature = {"q_ptr": "*i32", "key_ptr": "*i32", "rows_ptr": "*i64", "weight_ptr": "*fp32"}
        signature |= dict.fromkeys(("rows", "count", "draw"), "i32")
        yield Variant(
            importance_draw_kernel, f"importance_draw/{rows}", signature, {"ROUNDS": 7, "ASM": True, "P": p, "J": j},
            _WARPS, 3, expects=("call",),
        )  # fmt: skip

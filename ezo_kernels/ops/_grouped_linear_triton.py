"""Backward of a small linear layer of the head on the GPU, in one launch; formulas in :mod:`.grouped_linear`.

    dW = dy^T x,   db = sum of dy over rows,   dx = dy W          dy is 0 where a relu's y is

| tensor | shape |
|---|---|
| dy, x, W | [R, N], [R, K], [N, K], contiguous, of one dtype; R is of all groups |
| y | as dy: what a relu gave; missing without one |
| dx, dW, db | as x, W and [N], in that dtype; each may be missing |

The first programs have a tile of dW each and go over all rows, and those of the first column of tiles add up db as they do; the
others have a tile of dx each and go over all outputs.
"""

from __future__ import annotations

import torch

from ._linear_triton import architecture
from ._rounding_triton import add_product
from ._triton import jit, require, tl
from ._variants import ARCHS, Variant
from .linear import input_precision

#: Rows of all groups up to which one program may go through them for a tile of dW; a library's product splits more.
MOST_ROWS = 512
_N, _K, _WARPS = 32, 32, 8


def inner_block(size: int) -> int:
    """Rows or outputs that a step takes of ``size``."""
    return min(32, max(16, 1 << (size - 1).bit_length()))


def _stages(arch: int, fp32: bool) -> int:
    """Loads that are under way at once; on sm_100 two would make fp32 spill."""
    return 1 if fp32 and arch == 100 else 2


@jit
def _slope(dy_ptr, y_ptr, at, mask):
    """dy at ``at``, 0 where a relu's output is (and not where that is NaN, as torch has it)."""
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0)
    if y_ptr is not None:
        dy = tl.where(tl.load(y_ptr + at, mask=mask, other=0.0) <= 0.0, 0.0, dy).to(dy.dtype)
    return dy


@jit
def _of_weight(
    dy_ptr, x_ptr, y_ptr, dw_ptr, db_ptr, at, rows, n, k, k_tiles,
    PRECISION: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile ``at`` of dW; the first of a row of tiles has its part of db, too."""
    i = (at // k_tiles) * BN + tl.arange(0, BN)
    j = (at % k_tiles) * BK + tl.arange(0, BK)
    product = tl.zeros((BN, BK), tl.float32)
    total = tl.zeros((BN, R), tl.float32)
    for first in range(0, rows, R):
        r = first + tl.arange(0, R)
        dy = _slope(dy_ptr, y_ptr, r[None, :] * n + i[:, None], (r[None, :] < rows) & (i[:, None] < n))
        if dw_ptr is not None:
            x = tl.load(x_ptr + r[:, None] * k + j[None, :], mask=(r[:, None] < rows) & (j[None, :] < k), other=0.0)
            product = add_product(product, dy, x, PRECISION)
        total += dy.to(tl.float32)
    if dw_ptr is not None:
        inside = (i[:, None] < n) & (j[None, :] < k)
        tl.store(dw_ptr + i[:, None] * k + j[None, :], product.to(dw_ptr.dtype.element_ty), mask=inside)
    if db_ptr is not None:
        tl.store(db_ptr + i, tl.sum(total, axis=1).to(db_ptr.dtype.element_ty), mask=(i < n) & (at % k_tiles == 0))


@jit
def _of_x(
    dy_ptr, w_ptr, y_ptr, dx_ptr, at, rows, n, k, k_tiles,
    PRECISION: tl.constexpr, R: tl.constexpr, INNER: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile ``at`` of dx."""
    r = (at // k_tiles) * R + tl.arange(0, R)
    j = (at % k_tiles) * BK + tl.arange(0, BK)
    product = tl.zeros((R, BK), tl.float32)
    for first in range(0, n, INNER):
        i = first + tl.arange(0, INNER)
        dy = _slope(dy_ptr, y_ptr, r[:, None] * n + i[None, :], (r[:, None] < rows) & (i[None, :] < n))
        w = tl.load(w_ptr + i[:, None] * k + j[None, :], mask=(i[:, None] < n) & (j[None, :] < k), other=0.0)
        product = add_product(product, dy, w, PRECISION)
    inside = (r[:, None] < rows) & (j[None, :] < k)
    tl.store(dx_ptr + r[:, None] * k + j[None, :], product.to(dx_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows", "weight_programs"])
def grouped_linear_backward_kernel(
    dy_ptr, x_ptr, w_ptr, y_ptr, dx_ptr, dw_ptr, db_ptr, rows, n, k, weight_programs,
    PRECISION: tl.constexpr, R: tl.constexpr, INNER: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The grid is one-dimensional: ``weight_programs`` of tiles BN x BK of dW, then tiles R x BK of dx."""
    pid, k_tiles = tl.program_id(0), tl.cdiv(k, BK)
    if pid < weight_programs:
        _of_weight(dy_ptr, x_ptr, y_ptr, dw_ptr, db_ptr, pid, rows, n, k, k_tiles, PRECISION, R, BN, BK)
    elif dx_ptr is not None:
        _of_x(dy_ptr, w_ptr, y_ptr, dx_ptr, pid - weight_programs, rows, n, k, k_tiles, PRECISION, R, INNER, BK)


def takes(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether the kernel is for these: few rows, and addresses of 32 bits."""
    return x.shape[0] <= MOST_ROWS and max(t.numel() for t in (dy, x, w)) < 1 << 30


def launch_grouped_linear_backward(dy, x, w, y, dx, dw, db) -> None:
    """Write those of dx, dw and db that are not None; what :func:`takes` allows, contiguous."""
    require()
    (rows, n), k = dy.shape, x.shape[1]
    r, inner = inner_block(rows), inner_block(n)
    k_tiles = -(-k // _K)
    of_weight = -(-n // _N) * k_tiles if dw is not None or db is not None else 0
    of_x = -(-rows // r) * k_tiles if dx is not None else 0
    if not of_weight + of_x:
        return
    with torch.cuda.device_of(dy):
        grouped_linear_backward_kernel[(of_weight + of_x,)](
            dy, x, w, y, dx, dw, db, rows, n, k, of_weight, PRECISION=input_precision(x.dtype, ""),
            R=r, INNER=inner, BN=_N, BK=_K, num_warps=_WARPS, enable_fp_fusion=False,
            num_stages=_stages(architecture(dy.device), x.dtype == torch.float32),
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


#: Name, rows, outputs and what is missing.
_LAYERS = (
    ("fc3", 64, 10, ("y_ptr", "dx_ptr")),
    ("fc3/dx", 64, 10, ("y_ptr",)),
    ("fc2/relu", 512, 84, ("dx_ptr",)),
    ("fc2/relu/dx", 512, 84, ()),
)


def variants():
    """LeNet-5's fc2 and fc3, for the static report and the compile tests."""
    require()
    for dtype in ("fp32", "bf16"):
        for name, rows, n, absent in _LAYERS:
            pointers = ("dy_ptr", "x_ptr", "w_ptr", "y_ptr", "dx_ptr", "dw_ptr", "db_ptr")
            signature = {p: f"*{dtype}" for p in pointers if p not in absent}
            signature |= dict.fromkeys(("rows", "n", "k", "weight_programs"), "i32")
            constexprs = {
                **dict.fromkeys(absent), "PRECISION": "ieee", "R": inner_block(rows), "INNER": inner_block(n), "BN": _N,
                "BK": _K,
            }  # fmt: skip
            fp32 = dtype == "fp32"
            for archs in ((100,), tuple(arch for arch in ARCHS if arch != 100)) if fp32 else (ARCHS,):
                yield Variant(
                    grouped_linear_backward_kernel,
                    f"grouped_linear_backward/{dtype}/{name}" + "/sm_100" * (archs == (100,)),
                    signature, constexprs, _WARPS, _stages(archs[0], fp32), archs, ("ieee" if fp32 else "mma",),
                )  # fmt: skip

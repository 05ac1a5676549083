"""Noise of outputs on the GPU: formulas and shapes in :mod:`.node`.

| tensor | shape |
|---|---|
| y | [groups, R, C], or [R, C] of all groups; contiguous |
| out | [groups, R, C] |
| coef | fp32 [queries, B] |
| e | fp32 [R, C] |

A program makes one tile of rows by columns: for one query and both its signs, or for all queries, whose noise it adds up.
"""

from __future__ import annotations

import torch

from ._noise_triton import NOISE_ID, load_key, noise_args, noise_constexprs, signed32, z_units
from ._tiles import ElementTile, element_tile, update_tile
from ._triton import jit, require, tl
from ._variants import Variant
from .noise import Noise


@jit(do_not_specialize=["site", "query", "rows", "columns", "tiles", "threshold"])
def perturb_outputs_kernel(
    y_ptr, out_ptr, key_ptr, eps_ptr, site, query, rows, columns, tiles, threshold, scale,
    SIGNS: tl.constexpr, SHARED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The grid is (tiles, queries). SIGNS: 2 for the pair, else the sign."""
    first = (tl.program_id(0) % tiles) * C
    r = ((tl.program_id(0) // tiles) * R + tl.arange(0, R))[:, None]
    c = (first + tl.arange(0, C))[None, :]
    mask = (r < rows) & (c < columns)
    at = r.to(tl.int64) * columns + c
    q = tl.program_id(1)
    groups: tl.constexpr = 2 if SIGNS == 2 else 1
    size = rows.to(tl.int64) * columns
    own = q.to(tl.int64) * groups * size
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    begin = y_ptr if SHARED else y_ptr + own
    y = tl.load(begin + at, mask=mask, other=0.0).to(tl.float32)
    if SIGNS == 0:
        tl.store(out_ptr + own + at, y.to(dtype), mask=mask)
    else:
        k0, k1 = load_key(key_ptr)
        units = (first + tl.arange(0, C // UNIT) * UNIT)[None, :].to(tl.uint32)
        z = z_units(k0, k1, site, query + q, r.to(tl.uint32), units, NOISE, ROUNDS, UNIT, ASM, threshold, scale)
        step = z * tl.load(eps_ptr)
        if SIGNS == -1:
            step = -step
        tl.store(out_ptr + own + at, (y + step).to(dtype), mask=mask)
        if SIGNS == 2:
            if not SHARED:
                y = tl.load(begin + size + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + own + size + at, (y - step).to(dtype), mask=mask)


@jit(do_not_specialize=["site", "query", "queries", "samples", "times", "rows", "columns", "tiles", "threshold"])
def output_errors_kernel(
    coef_ptr, out_ptr, key_ptr, site, query, queries, samples, times, rows, columns, tiles, threshold, scale,
    R: tl.constexpr, C: tl.constexpr,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The grid is (tiles). times: rows of a sample."""
    first = (tl.program_id(0) % tiles) * C
    r = ((tl.program_id(0) // tiles) * R + tl.arange(0, R))[:, None]
    c = (first + tl.arange(0, C))[None, :]
    units = (first + tl.arange(0, C // UNIT) * UNIT)[None, :].to(tl.uint32)
    k0, k1 = load_key(key_ptr)
    e = tl.zeros((R, C), tl.float32)
    own = coef_ptr + r // times
    for q in range(queries):
        z = z_units(k0, k1, site, query + q, r.to(tl.uint32), units, NOISE, ROUNDS, UNIT, ASM, threshold, scale)
        e += z * tl.load(own, mask=r < rows, other=0.0)
        own += samples
    tl.store(out_ptr + r.to(tl.int64) * columns + c, e, mask=(r < rows) & (c < columns))


# ---------------------------------------------------------------------------------------------------------- launchers


def _cover(rows: int, columns: int, tile: ElementTile) -> tuple[int, dict]:
    """Tiles in all, and the arguments they give."""
    across = -(-columns // tile.columns)
    total = -(-rows // tile.rows) * across
    if max(rows + tile.rows, columns + tile.columns, total) >= 1 << 31:
        raise NotImplementedError(f"outputs of {rows} rows by {columns} columns: 2^31 is the limit")
    return total, {"rows": rows, "columns": columns, "tiles": across}


def launch_perturb_outputs(y, key, eps, site, shared, query, queries, signs, noise, rounds, p_zero, out) -> None:
    """Arguments as in :func:`ezo_kernels.ops.node.perturb_outputs`, all checked there; contiguous tensors."""
    require()
    if queries > 65535:
        raise NotImplementedError(f"perturb_outputs: 65535 queries a pass at most, got {queries}")
    noise, columns = Noise(noise, rounds, p_zero), out.shape[-1]
    rows = out.numel() // (columns * queries * len(signs))
    tile = element_tile(rows, noise.name)
    total, scalars = _cover(rows, columns, tile)
    threshold, scale = noise_args(noise)
    with torch.cuda.device_of(y):
        perturb_outputs_kernel[(total, queries)](
            y, out, key, eps, signed32(site), query, **scalars, threshold=threshold, scale=scale,
            SIGNS=2 if len(signs) == 2 else signs[0], SHARED=shared, R=tile.rows, C=tile.columns,
            **noise_constexprs(noise, tile.columns), num_warps=tile.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


def launch_output_errors(coef, key, site, query, noise, rounds, p_zero, out) -> None:
    """Arguments as in :func:`ezo_kernels.ops.node.output_errors`, all checked there; contiguous tensors."""
    require()
    noise, (queries, samples), (rows, columns) = Noise(noise, rounds, p_zero), coef.shape, out.shape
    tile = update_tile(noise.name)
    total, scalars = _cover(rows, columns, tile)
    threshold, scale = noise_args(noise)
    with torch.cuda.device_of(coef):
        output_errors_kernel[(total,)](
            coef, out, key, signed32(site), query, queries, samples, rows // samples, **scalars, threshold=threshold,
            scale=scale, R=tile.rows, C=tile.columns,
            **noise_constexprs(noise, tile.columns), num_warps=tile.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def variants():
    """Both kernels with every noise, for the static report and the compile tests."""
    require()
    shape = ("rows", "columns", "tiles")
    for name in NOISE_ID:
        if name == "sparse_int8":
            continue
        noise = Noise(name, p_zero=0.5 if name == "sparse" else 0.0)
        expects = ("multiply", "integer mma") if name == "hadamard" else ("multiply",)
        for dtype in ("fp32", "bf16"):
            tile = element_tile(4096, name)
            signature = {"y_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "key_ptr": "*i32", "eps_ptr": "*fp32"}
            signature |= dict.fromkeys(("site", "query", *shape, "threshold"), "i32") | {"scale": "fp32"}
            own = {
                "SIGNS": 2,
                "SHARED": False,
                "R": tile.rows,
                "C": tile.columns,
                **noise_constexprs(noise, tile.columns),
            }
            yield Variant(
                perturb_outputs_kernel, f"perturb_outputs/{dtype}/{name}/pair", signature, {**own, "ASM": True}, tile.warps, 1,
                expects=expects, z_per_program=tile.rows * tile.columns, representative=(dtype, name) == ("fp32", "gaussian"),
            )  # fmt: skip
        tile = update_tile(name)
        signature = {"coef_ptr": "*fp32", "out_ptr": "*fp32", "key_ptr": "*i32"}
        signature |= dict.fromkeys(("site", "query", "queries", "samples", "times", *shape, "threshold"), "i32")
        own = {"R": tile.rows, "C": tile.columns, **noise_constexprs(noise, tile.columns), "ASM": True}
        yield Variant(
            output_errors_kernel, f"output_errors/{name}", signature | {"scale": "fp32"}, own, tile.warps, 1,
            expects=expects, z_per_loop=tile.rows * tile.columns, representative=name == "gaussian",
        )  # fmt: skip

"""Perturbed linear at few rows: y_g = x_g W^T + sign_g eps (x_g z_q^T) + bias_g, the strategy ``two_products``.

| tensor | shape |
|---|---|
| x | [groups * rows, K] by any leading dimensions and strides, or [rows, K] shared by all groups |
| W | [N, K], any strides, of x's dtype |
| b | [N] |
| y | [groups * rows, N], contiguous |

A program makes BN outputs of both groups of a pair: HALF columns of its accumulators are rows of x at +eps, HALF at -eps
(shared rows need only one set). W goes from memory to the tensor core as it is, z is rounded to x's dtype, which must be
the dtype of the site's z, and eps * z never meets an ulp of W: the sum is made in fp32 in the epilogue. No element of an
accumulator sees another column, so groups run alike, together or one by one.

Where outputs are so few that their programs would leave multiprocessors idle, K is cut into parts: each leaves its share of y
in fp32, the first with the bias, and a second kernel adds them up in order.
"""

from __future__ import annotations

import torch

from ._address import address, strided
from ._linear_triton import architecture, bias_noise, whole_loads
from ._noise_triton import NOISE_ID, load_key, noise_args, noise_constexprs, rademacher_words, signed32, z_units
from ._noise_triton import UNIT as UNITS
from ._parts_triton import finish, room_for_parts, sum_parts
from ._rounding_triton import add_product
from ._tiles import small_parts, small_tile
from ._triton import jit, require, tl
from ._variants import ARCHS, Variant
from .noise import Noise


@jit
def signs16(k0, k1, site, query, rows, units, ROUNDS: tl.constexpr, HALF: tl.constexpr):
    """z of ``rademacher`` in fp16 (HALF) or bf16, two columns in one operation; units of 32 columns; compiled only."""
    w = rademacher_words(k0, k1, site.to(tl.uint32), query.to(tl.uint32) << 8, rows, units, ROUNDS, True)
    x = w[:, :, None] << (15 - tl.arange(0, 16)[None, None, :]).to(tl.uint32)
    x = tl.reshape(tl.join(x, x), (w.shape[0], w.shape[1] * 32))
    # both columns of a pair get the same x, with their signs in bits 15 and 31
    if HALF:
        z = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80008000, 0x3c003c00, 0xea;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        z = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80008000, 0x3f803f80, 0xea;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return z


@jit(
    do_not_specialize=[
        "site", "bias_site", "query", "rows", "tiles_m", "tiles_n", "queries", "steps", "n1", "n2", "n3", "threshold",
    ]
)  # fmt: skip
def linear_small_kernel(
    x_ptr, w_ptr, b_ptr, out_ptr, key_ptr, eps_ptr, site, bias_site, query, rows, N, K, tiles_m, tiles_n, queries, steps,
    n1, n2, n3, s0, s1, s2, s3, x_stride, w_stride_n, w_stride_k, b_stride, threshold, scale,
    SIGNS: tl.constexpr, SHARED: tl.constexpr, BIAS: tl.constexpr, X_DIMS: tl.constexpr, EVEN_K: tl.constexpr,
    EIGHTS: tl.constexpr, NEAR: tl.constexpr, PRECISION: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr,
    HALF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """SIGNS: 2 for the pair, else 1 or -1. EIGHTS, NEAR: as in ``_linear_triton.linear_kernel``. SPLIT: a program has ``steps``
    tiles of K, and out is fp32 [parts, all of y].

    Programs that share a tile of W are neighbours, so that it stays in L2.
    """
    if EIGHTS:
        K, w_stride_n = K // 8 * 8, w_stride_n // 8 * 8
        s0, s1, s2, s3 = s0 // 8 * 8, s1 // 8 * 8, s2 // 8 * 8, s3 // 8 * 8
    pid = tl.program_id(0)
    first_m = (pid % tiles_m) * HALF
    pid = pid // tiles_m
    first_n = (pid % tiles_n) * BN
    q = pid // tiles_n
    part = 0
    if SPLIT:
        part = q // queries
        q -= part * queries
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # columns of the accumulators: HALF rows of the first group, then HALF of the second. A group by itself runs with the
    # same instructions, its rows twice, so that it gets the bits that it gets in a pair
    M: tl.constexpr = HALF if SHARED else 2 * HALF
    groups: tl.constexpr = 2 if SIGNS == 2 else 1
    row0 = q.to(tl.int64) * groups * rows
    cm, rn, rk = tl.arange(0, M), first_n + tl.arange(0, BN), tl.arange(0, BK)
    rm, second = first_m + cm % HALF, cm // HALF
    # rows beyond the end are read again from the last one and never stored: no mask in the loop
    xm, wn = tl.minimum(rm, rows - 1), tl.minimum(rn, N - 1)
    x_row = xm if SHARED else xm + row0 + (second * rows if SIGNS == 2 else 0)
    x_at = x_ptr + strided(x_row, n1, n2, n3, s0, s1, s2, s3, X_DIMS)[:, None] + rk.to(tl.int64)[None, :] * x_stride
    w_at = w_ptr + wn.to(tl.int64)[:, None] * w_stride_n + rk.to(tl.int64)[None, :] * w_stride_k
    x_step = tl.full((), BK, tl.int64) * x_stride
    w_step = tl.full((), BK, tl.int64) * w_stride_k
    units = (tl.arange(0, BK // UNIT) * UNIT)[None, :]
    z_rows = rn[:, None].to(tl.uint32)
    k0, k1 = load_key(key_ptr)
    acc_w = tl.zeros((BN, M), tl.float32)
    acc_z = tl.zeros((BN, M), tl.float32)
    begin, end = 0, K
    if SPLIT:
        begin = part * (steps * BK)
        end = tl.minimum(K, begin + steps * BK)
        x_at += x_step * (part * steps)
        w_at += w_step * (part * steps)
        out_ptr += (part * queries).to(tl.int64) * (groups * rows) * N
    for k in range(begin, end, BK):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            left = (rk < K - k)[None, :]
            x = tl.load(x_at, mask=left, other=0.0)
            w = tl.load(w_at, mask=left, other=0.0)
        # beyond K z is not zero, but x is
        if NOISE == 5 and ASM and dtype != tl.float32:
            z = signs16(k0, k1, site, query + q, z_rows, (k + units).to(tl.uint32), ROUNDS, dtype == tl.float16)
        else:
            z = z_units(
                k0, k1, site, query + q, z_rows, (k + units).to(tl.uint32), NOISE, ROUNDS, UNIT, ASM, threshold, scale
            )  # fmt: skip
        x = tl.trans(x)
        acc_w = add_product(acc_w, w, x, PRECISION)
        acc_z = add_product(acc_z, z.to(dtype), x, PRECISION)
        x_at += x_step
        w_at += w_step
    eps = tl.load(eps_ptr)
    step = acc_z * eps
    if BIAS:
        b = tl.load(b_ptr + rn.to(tl.int64) * b_stride, mask=rn < N, other=0.0).to(tl.float32)
        z = bias_noise(k0, k1, bias_site, query + q, first_n, BN, NOISE, ROUNDS, BIAS_UNIT, ASM, threshold, scale)
        if SPLIT:
            b, z = tl.where(part == 0, b, 0.0), tl.where(part == 0, z, 0.0)
        acc_w += b[:, None]
        step += (z * eps)[:, None]
    inside = (rm < rows)[None, :] & (rn < N)[:, None]
    if NEAR:
        at = out_ptr + row0 * N
        column = rm + (second * rows if SIGNS == 2 and not SHARED else 0)
        at += column[None, :] * N + rn[:, None]
    else:
        at = out_ptr + (row0 + rm)[None, :] * N + rn[:, None]
        if SIGNS == 2 and not SHARED:
            at += (second * rows).to(tl.int64)[None, :] * N
    if SIGNS == 2 and not SHARED:
        step = tl.where((second == 0)[None, :], step, -step)
    elif not SHARED:
        inside = inside & (second == 0)[None, :]
    if SIGNS == -1:
        step = -step
    kept: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(at, finish(acc_w + step, kept, RELU), mask=inside)
    if SIGNS == 2 and SHARED:
        tl.store(at + rows.to(tl.int64) * N, finish(acc_w - step, kept, RELU), mask=inside)


def constexprs(
    tile, noise, signs: int, shared: bool, bias: bool, x_dims: int, even_k: bool, precision: str, eights: bool = True,
    near: bool = False, relu: bool = False, split: bool = False,
) -> dict:  # fmt: skip
    """Everything that :func:`linear_small_kernel` is compiled for."""
    return {
        **{"SIGNS": signs, "SHARED": bool(shared), "BIAS": bias, "X_DIMS": x_dims, "EVEN_K": even_k},
        "EIGHTS": eights,
        "NEAR": near,
        "RELU": relu and not split,
        "SPLIT": split,
        **{"PRECISION": precision, "HALF": tile.half, "BN": tile.bn, "BK": tile.bk},
        **noise_constexprs(noise, tile.bk),
        "BIAS_UNIT": min(UNITS[noise.name], tile.bn),
    }


def launch_linear_small(
    x, w, b, key, eps, site, bias_site, shared, precision, query, queries, signs, noise, out, *, relu=False,
) -> None:  # fmt: skip
    """Write the outputs of every group; arguments as in :func:`perturbed_linear`, all checked there.

    Args:
        signs: not (0,), which has nothing to multiply twice.
        precision: ``ieee`` or ``tf32``.
        out: contiguous.
        relu: of the outputs.
    """
    require()
    n, k = w.shape
    rows = out.numel() // (n * queries * len(signs))
    place = address(x, "matrix")
    if place is None:
        x = x.contiguous()
        place = address(x, "matrix")
    eights = whole_loads(x, w)
    arch = architecture(x.device)
    tile = small_tile(rows, x.dtype, noise.name, eights, arch)
    parts, steps = small_parts(tile, rows, n, k, arch)
    memory = room_for_parts("perturbed_linear", parts, out, torch.float32) if parts > 1 else None
    if memory is None:
        parts, steps = 1, -(-k // tile.bk)
    tiles_m, tiles_n = -(-rows // tile.half), -(-n // tile.bn)
    if max(n + tile.bn, k + tile.bk, rows + tile.half, tiles_m * tiles_n * queries * parts) >= 1 << 31:
        raise NotImplementedError(f"perturbed_linear: {rows} rows, {n} outputs, {k} inputs: 2^31 is the limit")
    threshold, scale = noise_args(noise)
    sign = 2 if len(signs) == 2 else signs[0]
    near = n % 16 != 0 and 2 * (rows + tile.half) * n < 1 << 31
    with torch.cuda.device_of(x):
        linear_small_kernel[(tiles_m * tiles_n * queries * parts,)](
            x, w, b if b is not None else w, out if memory is None else memory, key, eps, signed32(site),
            signed32(bias_site), query, rows, n, k, tiles_m, tiles_n, queries, steps,
            **place.index_args(), x_stride=place.channel, w_stride_n=w.stride(0),
            w_stride_k=w.stride(1), b_stride=b.stride(0) if b is not None else 1, threshold=threshold, scale=scale,
            **constexprs(
                tile, noise, sign, shared, b is not None, place.dims, k % tile.bk == 0, precision, eights, near, relu,
                memory is not None,
            ),
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
        if memory is not None:
            sum_parts(memory, out, parts, relu)


# ----------------------------------------------------------------------------------------------------------- variants

_KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TESTED = {
    ("bf16", "gaussian", 64, "pair"), ("bf16", "hadamard", 64, "pair"), ("bf16", "sparse", 16, "pair"),
    ("fp16", "rademacher", 16, "shared"), ("bf16", "uniform", 16, "plus"),
    ("bf16", "gaussian", 64, "eights"), ("bf16", "rademacher", 64, "eights"), ("bf16", "clt4", 64, "ragged"),
    ("bf16", "clt4", 64, "whole"), ("bf16", "gaussian", 16, "whole"),
}  # fmt: skip


def _variant(dtype: str, name: str, rows: int, how: str, arch: int) -> Variant:
    noise = Noise(name, p_zero=0.5 if name == "sparse" else 0.0)
    eights, even = how != "ragged", how not in ("ragged", "eights")
    tile = small_tile(rows, _KINDS[dtype], name, eights, arch)
    archs = tuple(a for a in ARCHS if small_tile(rows, _KINDS[dtype], name, eights, a) == tile)
    split = how in ("pair", "shared", "plus")  # of 4096 outputs K is cut; the others are of wider layers
    pointers = {"x_ptr": dtype, "w_ptr": dtype, "b_ptr": dtype, "out_ptr": dtype, "key_ptr": "i32", "eps_ptr": "fp32"}
    pointers["out_ptr"] = "fp32" if split else dtype
    integers = (
        "site", "bias_site", "query", "rows", "N", "K", "tiles_m", "tiles_n", "queries", "steps", "n1", "n2", "n3", "threshold"
    )  # fmt: skip
    strides = ("s0", "s1", "s2", "s3", "w_stride_n")
    return Variant(
        kernel=linear_small_kernel,
        name=f"linear_small/{dtype}/{name}/{rows}/{how}" + ("" if len(archs) == len(ARCHS) else f"/sm_{archs[0]}"),
        signature={
            **{pointer: "*" + of for pointer, of in pointers.items()},
            **dict.fromkeys((*integers, *strides), "i32"),
            "scale": "fp32",
        },
        constexprs={
            **{"x_stride": 1, "b_stride": 1, "w_stride_k": 1},
            **constexprs(
                tile,
                noise,
                1 if how == "plus" else 2,
                how == "shared",
                True,
                1,
                even,
                "ieee",
                eights,
                not even,
                split=split,
            ),
            "ASM": True,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        archs=archs,
        expects=("ieee" if dtype == "fp32" else "mma", "multiply"),
        z_per_loop=tile.bn * tile.bk,
        divisible=("N", "K", *strides) if even else (),
        representative=(dtype, name, rows, how) in _TESTED,
    )


def variants():
    """A layer of 4096 by 4096 at 1 to 64 rows a group, for the static report and the compile tests."""
    require()
    cases = [(d, n, r, "pair") for d in ("bf16", "fp16") for n in NOISE_ID for r in (16, 64) if n != "sparse_int8"]
    cases += [case for case in sorted(_TESTED) if case not in cases]
    for case in cases:
        yield from {v.name: v for v in (_variant(*case, arch) for arch in ARCHS)}.values()

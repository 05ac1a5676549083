"""Perturbed embedding on the GPU: rows of W by id, and noise for those rows only.

    y_g[i, d] = W[id_g[i], d] + sign_g eps z_q[id_g[i], d]

| tile | shape | is |
|---|---|---|
| ids | [BI] | of one group of the pass; an id is a row of W and of z |
| w, z, y | [BI, BD] | features of these rows, fp32 until the store |

A program writes both signs of a pair. When the two groups have the same ids in its tile, as they have wherever ids are
the input of a network, W is read once and z made once; when any of them differs, the second sign reads and makes its
own.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ._int8_triton import check_grid
from ._noise_triton import ASM, NOISE_ID, UNIT, load_key, signed32, z_units
from ._triton import jit, require, tl
from ._variants import ARCHS, Variant


@jit
def _rows(
    ids, columns, w_ptr, k0, k1, eps, site, query, threshold, scale, vocabulary, width, w_v, w_d,
    SIGN: tl.constexpr, NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """W and eps z of the rows ``ids``; NaN instead of W where an id is outside the table."""
    known = (ids >= 0) & (ids < vocabulary)
    row = tl.where(known, ids, 0)
    d = columns + tl.arange(0, BD)
    at = (w_ptr + row.to(tl.int64) * w_v)[:, None] + (d.to(tl.int64) * w_d)[None, :]
    w = tl.load(at, mask=known[:, None] & (d < width)[None, :], other=float("nan")).to(tl.float32)
    step = w
    if SIGN != 0:
        units = columns + tl.arange(0, BD // UNIT) * UNIT
        z = z_units(
            k0, k1, site, query, row.to(tl.uint32)[:, None], units.to(tl.uint32)[None, :],
            NOISE, ROUNDS, UNIT, ASM, threshold, scale,
        )  # fmt: skip
        step = z * eps
    return w, step


@jit(do_not_specialize=["site", "query", "threshold"])
def embedding_kernel(
    ids_ptr, w_ptr, y_ptr, key_ptr, eps_ptr, site, query, threshold, scale,
    count, vocabulary, width, tiles_d, w_v, w_d, y_i, y_d,
    PAIR: tl.constexpr, SIGN: tl.constexpr, SHARED: tl.constexpr,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
    BI: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BI ids by BD features for one query, at both signs (PAIR) or at SIGN."""
    pid = tl.program_id(0)
    pid_q = tl.program_id(1)
    columns = pid % tiles_d * BD
    i = pid // tiles_d * BI + tl.arange(0, BI)
    d = columns + tl.arange(0, BD)
    inside_i = i < count
    inside = inside_i[:, None] & (d < width)[None, :]
    group = pid_q.to(tl.int64) * (2 if PAIR else 1)
    first = group * count
    ids_at = ids_ptr + i if SHARED else ids_ptr + first + i
    ids = tl.load(ids_at, mask=inside_i, other=0)

    k0, k1 = load_key(key_ptr)
    eps = tl.load(eps_ptr) * SIGN
    w, step = _rows(
        ids, columns, w_ptr, k0, k1, eps, site, query + pid_q, threshold, scale, vocabulary, width, w_v, w_d,
        SIGN, NOISE, ROUNDS, UNIT, ASM, BD,
    )  # fmt: skip
    at = (y_ptr + (first + i) * y_i)[:, None] + (d.to(tl.int64) * y_d)[None, :]
    y = w if SIGN == 0 else w + step
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if PAIR:
        if not SHARED:
            others = tl.load(ids_at + count, mask=inside_i, other=0)
            if tl.max((others != ids).to(tl.int32), axis=0) != 0:
                w, step = _rows(
                    others, columns, w_ptr, k0, k1, eps, site, query + pid_q, threshold, scale, vocabulary, width,
                    w_v, w_d, SIGN, NOISE, ROUNDS, UNIT, ASM, BD,
                )  # fmt: skip
        y = w - step
        at = (y_ptr + (first + count + i) * y_i)[:, None] + (d.to(tl.int64) * y_d)[None, :]
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------------- launcher


def _tile(width: int, noise: str) -> tuple[int, int]:
    """Ids and features of a tile. Hadamard noise needs sixteen rows, and mixes a tile's columns by one matrix that is
    zero between segments: the fewer segments the better."""
    if noise == "hadamard":
        return 32, 32
    return 16, min(128, max(32, 1 << (width - 1).bit_length()))


def launch_embedding(ids, w, key, eps, site, shared, query, queries, signs, noise, out) -> None:
    """Launch one grid over (tiles of a group of the pass, queries); no synchronisation.

    An id outside [0, V) cannot raise here without waiting for the device: its rows of ``out`` are NaN.

    Raises:
        NotImplementedError: no triton; 2^31 or more ids in a group of the pass.
    """
    require()
    groups = queries * len(signs)
    width = w.shape[1]
    pair = len(signs) == 2
    ids = ids.reshape(-1)  # a copy only where the ids have gaps
    rows = out.view(-1, width)
    count = rows.shape[0] // groups
    if count >= 1 << 31:
        raise NotImplementedError(f"perturbed_embedding: {count} ids in a group, at most 2^31 - 1")
    check_grid("perturbed_embedding", queries)
    bi, bd = _tile(width, noise.name)
    tiles_d = -(-width // bd)
    with torch.cuda.device_of(w):
        embedding_kernel[(-(-count // bi) * tiles_d, queries)](
            ids, w, rows, key, eps, signed32(site), query, noise.threshold, noise.scale,
            count, w.shape[0], width, tiles_d, *w.stride(), *rows.stride(),
            PAIR=pair, SIGN=1 if pair else signs[0], SHARED=shared or groups == 1,
            NOISE=NOISE_ID[noise.name], ROUNDS=noise.rounds, UNIT=UNIT[noise.name], ASM=ASM, BI=bi, BD=bd,
            num_warps=4, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def variants():
    """A table of 768 features and more: a pair of stacked groups, and single signs."""
    require()
    for dtype in ("bf16", "fp16", "fp32"):
        for noise in NOISE_ID:
            if noise != "sparse_int8":
                tested = (dtype, noise) in (("bf16", "gaussian"), ("bf16", "hadamard"), ("fp32", "rademacher"))
                yield _variant(dtype, noise, True, 1, False, tested)
    yield _variant("bf16", "gaussian", True, 1, True, True)
    for sign in (1, 0):
        yield _variant("bf16", "gaussian", False, sign, True, sign == 0)
    one = _variant("bf16", "gaussian", True, 1, False, True)  # a launch turns arguments that are one into constants
    ones = dict.fromkeys(("count", "vocabulary", "width", "tiles_d", "w_v", "y_i"), 1)
    yield replace(
        one,
        name="embedding/bf16/gaussian/pair/one",
        signature={name: kind for name, kind in one.signature.items() if name not in ones},
        constexprs={**one.constexprs, **ones},
        divisible=(),
    )


def _variant(dtype: str, noise: str, pair: bool, sign: int, shared: bool, tested: bool) -> Variant:
    bi, bd = _tile(768, noise)
    pointers = {"ids_ptr": "i64", "w_ptr": dtype, "y_ptr": dtype, "key_ptr": "i32", "eps_ptr": "fp32"}
    integers = ("site", "query", "threshold", "count", "vocabulary", "width", "tiles_d", "w_v", "y_i")
    return Variant(
        kernel=embedding_kernel,
        name=f"embedding/{dtype}/{noise}/{'pair' if pair else sign}/{'shared' if shared else 'stacked'}",
        signature={
            **{name: "*" + kind for name, kind in pointers.items()},
            **dict.fromkeys(integers, "i32"),
            "scale": "fp32",
        },
        constexprs={
            **{"w_d": 1, "y_d": 1, "PAIR": pair, "SIGN": sign, "SHARED": shared},
            **{"NOISE": NOISE_ID[noise], "ROUNDS": 7, "UNIT": UNIT[noise], "ASM": True, "BI": bi, "BD": bd},
        },
        num_warps=4,
        num_stages=1,
        archs=ARCHS,
        expects=("multiply",) * (sign != 0) + ("integer mma",) * (noise == "hadamard"),
        z_per_program=bi * bd if shared and sign else 0,
        divisible=("width", "w_v", "y_i"),
        representative=tested,
    )

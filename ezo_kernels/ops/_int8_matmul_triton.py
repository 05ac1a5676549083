"""Integer products on the GPU: acc_g = x_g clamp(W + sign_g z_q)^T + clamp(b + sign_g z'_q) 2^(s_b - s_x - s_W).

| tensor | shape |
|---|---|
| x | int8 [groups, rows, K], any strides; one group may be shared by all |
| W | int8 [N, K], any strides; of the batched product [groups, N, K] or one for all |
| b | int8 [N] |
| acc | int32 [groups, rows, N], contiguous (STORE, ONCE) |
| peak | int32 [groups], zero at first: largest |acc| (STORE, PEAK, ONCE), read by REQUANTIZE |
| out, exponent | int8 [groups, rows, N], its relu if RELU, int32 [groups] (REQUANTIZE, ONCE) |
| arrived | int32 [groups], zero at first: programs that are done (ONCE) |

A program makes BM rows of one group (both groups of a pair) by BN outputs: it reads a tile of W once, makes its z once,
clamps W + z and W - z, and multiplies on the integer matrix unit. SWAP puts W's rows on its long side.

ONCE: where outputs are few, the last program of a pair, or of a group without a sign, to have left its accumulators rounds
those of all. Which one that is does not matter: what it reads is the same.

Where accumulators go to memory and programs are few, K is cut into parts as in :mod:`._linear_small_triton`: each leaves its
own, the first with the bias, and a second kernel adds them up and takes their peak.
"""

from __future__ import annotations

import torch

from ._int8_pointwise_triton import launch_requantize
from ._int8_triton import (
    ONCE,
    PART,
    REQUANTIZE,
    align_bias,
    check_grid,
    divide,
    leave,
    leave_exponent,
    magic,
    or_dummy,
    perturb_tile,
    perturbed_bias,
    raise_peak,
)
from ._linear_triton import architecture
from ._noise_triton import ASM, load_key, noise_args, signed32, sparse_int8_units
from ._parts_triton import room_for_parts
from ._tiles import LARGE, int8_parts, int8_tile
from ._triton import constexpr, jit, require, tl
from ._variants import ARCHS, Variant
from .int8_pass import ROUNDINGS
from .noise import Noise

#: Accumulators that the last program of a launch rounds at a time.
_LAST_BLOCK = constexpr(2048)
#: Of a thread of such a launch, whose programs are few: the assembler would spill to run more of them on a multiprocessor.
_ONCE_REGISTERS = 255


@jit
def _multiply(w, x, acc, SWAP: tl.constexpr):
    """acc + w x^T ([BN, BM]) if SWAP, else acc + x w^T; x is int8 [BM, BK], w int8 [BN, BK]."""
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    return acc


@jit
def _finish(
    acc, bias, group, own, first_m, first_n, rm, rn, rows, N, x_exponent_ptr, w_exponent_ptr, b_exponent_ptr,
    acc_ptr, peak_ptr, out_ptr, exponent_ptr,
    SWAP: tl.constexpr, BIAS: tl.constexpr, WHAT: tl.constexpr, ROUNDING: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Bias and epilogue of one group's tile."""
    if SWAP:
        acc = tl.trans(acc)
    if BIAS:
        acc += align_bias(bias, b_exponent_ptr, x_exponent_ptr, own, w_exponent_ptr)[None, :]
    at = (group.to(tl.int64) * rows + rm)[:, None] * N + rn[None, :]
    inside = (rm < rows)[:, None] & (rn < N)[None, :]
    leave(acc, acc_ptr, out_ptr, at, inside, peak_ptr + group, WHAT, ROUNDING, RELU)
    if WHAT == REQUANTIZE:  # noqa: SIM102 - the outer if is the compiler's
        if first_m + first_n == 0:
            leave_exponent(exponent_ptr, group, x_exponent_ptr, own, w_exponent_ptr, peak_ptr)


@jit
def _round(
    acc_ptr, peak_ptr, out_ptr, exponent_ptr, group, own, size, x_exponent_ptr, w_exponent_ptr,
    ROUNDING: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All accumulators of a group, which other programs have left."""
    for first in range(0, size, BLOCK):
        within = first + tl.arange(0, BLOCK)
        at = group.to(tl.int64) * size + within
        acc = tl.load(acc_ptr + at, mask=within < size, other=0)
        leave(acc, acc_ptr, out_ptr, at, within < size, peak_ptr + group, REQUANTIZE, ROUNDING, RELU)
    leave_exponent(exponent_ptr, group, x_exponent_ptr, own, w_exponent_ptr, peak_ptr)


@jit(
    do_not_specialize=["site", "bias_site", "query", "packed", "rows", "repeats", "repeats_mul", "repeats_div", "steps"]
)
def int8_linear_kernel(
    x_ptr, w_ptr, b_ptr, x_exponent_ptr, w_exponent_ptr, b_exponent_ptr, key_ptr,
    acc_ptr, peak_ptr, out_ptr, exponent_ptr, arrived_ptr, site, bias_site, query, packed, rows, N, K, repeats, repeats_mul,
    repeats_div, steps, x_group, x_row, x_k, w_group, w_n, w_k, b_n,
    SIGNS: tl.constexpr, SHARED: tl.constexpr, BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    WHAT: tl.constexpr, ROUNDING: tl.constexpr, RELU: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, ROUNDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """SIGNS: 2 for the pair, else the sign. The grid is (tiles of rows, tiles of N, queries, or groups without a sign).

    Programs that share a tile of W are neighbours, so that it stays in L2. WHAT == PART: the third axis is repeated for each
    part of ``steps`` tiles of K, and acc is [parts, all of it].
    """
    first_m, first_n = tl.program_id(0) * BM, tl.program_id(1) * BN
    q = tl.program_id(2)
    part, begin, end = 0, 0, K
    if WHAT == PART:
        part = divide(q, repeats_mul, repeats_div)
        q -= part * repeats
        begin = part * (steps * BK)
        end = tl.minimum(K, begin + steps * BK)
    rm, rn, rk = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN), tl.arange(0, BK)
    # rows beyond the end are read again from the last one and never stored: no mask in the loop
    xm, wn = tl.minimum(rm, rows - 1).to(tl.int64), tl.minimum(rn, N - 1).to(tl.int64)
    group = q * 2 if SIGNS == 2 else q
    # Addresses are put together in the loop: one held for each byte of an unaligned tile would fill the registers.
    # x of one group for all has a stride of zero.
    x_rows = x_ptr + group.to(tl.int64) * x_group + xm * x_row
    w_rows = w_ptr + q.to(tl.int64) * w_group + wn * w_n
    counter_rows, units = rn.to(tl.uint32)[:, None], (tl.arange(0, BK // 4) * 4)[None, :]
    k0, k1 = load_key(key_ptr)
    if SWAP:
        acc = tl.zeros((BN, BM), tl.int32)
        other = tl.zeros((BN, BM), tl.int32)
    else:
        acc = tl.zeros((BM, BN), tl.int32)
        other = tl.zeros((BM, BN), tl.int32)
    for k in range(begin, end, BK):
        column = (k + rk).to(tl.int64)
        x_at = x_rows[:, None] + (column * x_k)[None, :]
        w_at = w_rows[:, None] + (column * w_k)[None, :]
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            inside = (rk < K - k)[None, :]
            x = tl.load(x_at, mask=inside, other=0)
            w = tl.load(w_at, mask=inside, other=0)
        if SIGNS == 0:
            acc = _multiply(w, x, acc, SWAP)
        else:
            # beyond K z is not zero, but x is
            z = sparse_int8_units(
                k0, k1, site, query + q, counter_rows, (k + units).to(tl.uint32), ROUNDS, ASM, packed
            )  # fmt: skip
            plus, minus = perturb_tile(w, z, SIGNS, ASM)
            if SIGNS == 2:
                if SHARED:
                    y = x
                elif EVEN_K:
                    y = tl.load(x_at + x_group)
                else:
                    y = tl.load(x_at + x_group, mask=inside, other=0)
                acc = _multiply(plus, x, acc, SWAP)
                other = _multiply(minus, y, other, SWAP)
            else:
                acc = _multiply(plus, x, acc, SWAP)
    plus, minus = rn, rn
    if BIAS:
        plus, minus = perturbed_bias(
            b_ptr, b_n, rn, rn < N, k0, k1, bias_site, query + q, packed, SIGNS, ROUNDS, ASM
        )  # fmt: skip
        if WHAT == PART:
            plus, minus = tl.where(part == 0, plus, 0), tl.where(part == 0, minus, 0)
    if WHAT == PART:
        acc_ptr += (part * repeats).to(tl.int64) * ((2 if SIGNS == 2 else 1) * rows) * N
    own = group * 0 if SHARED else group
    _finish(
        acc, plus, group, own, first_m, first_n, rm, rn, rows, N, x_exponent_ptr, w_exponent_ptr, b_exponent_ptr,
        acc_ptr, peak_ptr, out_ptr, exponent_ptr, SWAP, BIAS, WHAT, ROUNDING, RELU,
    )  # fmt: skip
    if SIGNS == 2:
        own = group * 0 if SHARED else group + 1
        _finish(
            other, minus, group + 1, own, first_m, first_n, rm, rn, rows, N,
            x_exponent_ptr, w_exponent_ptr, b_exponent_ptr,
            acc_ptr, peak_ptr, out_ptr, exponent_ptr, SWAP, BIAS, WHAT, ROUNDING, RELU,
        )  # fmt: skip
    if WHAT == ONCE:
        tl.debug_barrier()  # all of this program's stores are before its arrival
        if tl.atomic_add(arrived_ptr + q, 1, sem="acq_rel") == tl.num_programs(0) * tl.num_programs(1) - 1:
            own = group * 0 if SHARED else group
            _round(
                acc_ptr, peak_ptr, out_ptr, exponent_ptr, group, own, rows * N, x_exponent_ptr, w_exponent_ptr, ROUNDING, RELU,
                _LAST_BLOCK,
            )  # fmt: skip
            if SIGNS == 2:
                own = group * 0 if SHARED else group + 1
                _round(
                    acc_ptr, peak_ptr, out_ptr, exponent_ptr, group + 1, own, rows * N, x_exponent_ptr, w_exponent_ptr,
                    ROUNDING, RELU, _LAST_BLOCK,
                )  # fmt: skip


@jit(do_not_specialize=["parts"])
def int8_sum_parts_kernel(parts_ptr, acc_ptr, peak_ptr, size, whole, parts, BLOCK: tl.constexpr):
    """acc = the sum of int32 [parts, whole], and the largest magnitude of each group of ``size``: the second axis."""
    group = tl.program_id(1)
    within = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at, inside = group.to(tl.int64) * size + within, within < size
    acc = tl.load(parts_ptr + at, mask=inside, other=0)
    for i in range(1, parts):
        acc += tl.load(parts_ptr + (tl.cast(i, tl.int64) * whole + at), mask=inside, other=0)
    tl.store(acc_ptr + at, acc, mask=inside)
    raise_peak(peak_ptr + group, tl.where(inside, tl.abs(acc), 0))


def constexprs(
    tile, signs: int, shared: bool, bias: bool, even_k: bool, what: int, rounding: str, relu: bool, rounds: int
) -> dict:
    """Everything that :func:`int8_linear_kernel` is compiled for."""
    return {
        **{"SIGNS": signs, "SHARED": bool(shared), "BIAS": bias, "EVEN_K": even_k, "WHAT": what},
        **{
            "ROUNDING": ROUNDINGS.index(rounding),
            "RELU": bool(relu and what in (REQUANTIZE.value, ONCE.value)),
            "SWAP": tile.swap,
        },
        **{"BM": tile.bm, "BN": tile.bn, "BK": tile.bk},
        **{"ROUNDS": rounds, "ASM": ASM},
    }


def _launch(
    name, x, x_strides, w, w_strides, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, what, rounding, relu,
    query, repeats, signs, rows, noise, acc, peak, out, exponent, arrived=None,
) -> None:  # fmt: skip
    """One grid over (tiles of rows, tiles of outputs, ``repeats``); strides are (group, row, column)."""
    n, k = w.shape[-2:]
    aligned = k % 16 == 0 and x_strides[2] == w_strides[2] == 1 and x_strides[1] % 16 == w_strides[1] % 16 == 0
    arch = architecture(x.device)
    tile = int8_tile(rows, n, k, aligned, arch)
    parts, steps = 1, -(-k // tile.bk)
    if signs and what in (0, ONCE.value):
        parts, steps = int8_parts(tile, rows, n, k, repeats, arch)
    memory = room_for_parts(name, parts, acc, torch.int32) if parts > 1 else None
    if memory is None:
        parts = 1
    tiles_m, tiles_n = -(-rows // tile.bm), -(-n // tile.bn)
    if max(n + tile.bn, k + tile.bk, rows + tile.bm) >= 1 << 31:
        raise NotImplementedError(f"{name}: {rows} rows, {n} outputs, {k} inputs: 2^31 is the limit")
    check_grid(name, tiles_n, repeats * parts)
    once = what == ONCE.value
    if memory is not None:
        what = PART.value
    with torch.cuda.device_of(x):
        int8_linear_kernel[(tiles_m, tiles_n, repeats * parts)](
            x, w, or_dummy(b, w), x_exponent, w_exponent, or_dummy(b_exponent, w_exponent), key,
            acc if memory is None else memory, peak, out, exponent, or_dummy(arrived, peak), signed32(site),
            signed32(bias_site), query,
            noise_args(noise)[0], rows, n, k, repeats, *magic(repeats), steps, *x_strides, *w_strides,
            1 if b is None else b.stride(0),
            **constexprs(
                tile, signs, not x_strides[0], b is not None, k % tile.bk == 0, what, rounding, relu, noise.rounds
            ),
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
            **({"maxnreg": _ONCE_REGISTERS} if what == ONCE.value else {}),
        )  # fmt: skip
        if memory is not None:
            groups = peak.numel()
            size = acc.numel() // groups
            int8_sum_parts_kernel[(-(-size // _BLOCK), groups)](
                memory, acc, peak, size, acc.numel(), parts, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False
            )
            if once:
                launch_requantize(acc, peak, x_exponent, w_exponent, rounding, relu, None, out, exponent)


def launch_linear(
    x, w, b, x_exponent, w_exponent, b_exponent, key, site, bias_site, what, rounding, relu,
    query, queries, signs, rounds, p_zero, r_max, acc, peak, out, exponent, arrived=None,
) -> None:  # fmt: skip
    """Write what is asked for of every group; arguments as ``ezo::int8_linear``, x contiguous, all checked there.

    With ``arrived`` everything, by ONCE.
    """
    require()
    k = w.shape[1]
    rows = x.numel() // (k * x_exponent.numel())
    sign = 2 if len(signs) == 2 else signs[0]
    _launch(
        "int8_linear", x, (rows * k if x_exponent.numel() > 1 else 0, k, 1), w, (0, *w.stride()), b,
        x_exponent, w_exponent, b_exponent, key, site, bias_site, what, rounding, relu, query,
        queries if sign else peak.numel(), sign, rows, Noise("sparse_int8", rounds, p_zero, r_max),
        acc, peak, out, exponent, arrived,
    )  # fmt: skip


def launch_gemm(x, w, acc, peak) -> None:
    """acc[g] = x[g] w[g]^T and its largest magnitude, if there is room for it; arguments as ``ezo::int8_gemm``."""
    require()
    groups, rows, _ = x.shape
    x_group = x.stride(0) if groups > 1 else 0
    w_group = w.stride(0) if len(w) > 1 else 0
    _launch(
        "int8_gemm", x, (x_group, *x.stride()[1:]), w, (w_group, *w.stride()[1:]), None, acc, acc, None, acc, 0, 0,
        0 if peak is not None else PART.value, "nearest", False, 0, groups, 0, rows, Noise("sparse_int8"),
        acc, acc if peak is None else peak, acc, acc,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants

#: Accumulators of a program that adds parts up.
_BLOCK = 1024

_POINTERS = {
    **dict.fromkeys(("x_ptr", "w_ptr", "b_ptr", "out_ptr"), "*i8"),
    **dict.fromkeys(("x_exponent_ptr", "w_exponent_ptr", "b_exponent_ptr", "key_ptr"), "*i32"),
    **dict.fromkeys(("acc_ptr", "peak_ptr", "exponent_ptr", "arrived_ptr"), "*i32"),
}
_INTEGERS = (
    "site", "bias_site", "query", "packed", "rows", "N", "K", "repeats", "repeats_mul", "repeats_div", "steps",
    "x_group", "x_row", "w_group", "w_n",
)  # fmt: skip
#: What a launch leaves, as the report has it.
_NAMES = {0: "store", 1: "peak", 2: "requantize", PART.value: "part", ONCE.value: "once"}
#: Of these those that may be any number.
_NUMBERS = ("site", "bias_site", "query", "packed", "rows", "repeats", "repeats_mul", "repeats_div", "steps")


def _variant(
    rows: int, how: str, what: int, rounding: str, archs: tuple[int, ...], tested: bool, relu: bool = False,
    n: int = 4096,
) -> Variant:  # fmt: skip
    tile = int8_tile(rows, n, 4096, how not in ("tail", "gemm"), archs[0])
    signs = {"plus": 1, "plain": 0, "gemm": 0}.get(how, 2)
    ones = ("x_k", "w_k", "b_n")
    if how == "gemm":  # both operands transposed, as in the gradient of a weight
        ones = ("x_row", "w_n", "b_n")
    names = [name for name in (*_INTEGERS, "x_k", "w_k") if name not in ones]
    return Variant(
        kernel=int8_linear_kernel,
        name=f"int8_linear/{rows}/{how}/{_NAMES[what]}/{rounding}{'/relu' if relu else ''}"
        + ("" if n == 4096 else f"/{n}")
        + ("" if len(archs) == len(ARCHS) else f"/sm_{archs[0]}"),
        signature={**_POINTERS, **dict.fromkeys(names, "i32")},
        constexprs={
            **dict.fromkeys(ones, 1),
            **constexprs(tile, signs, how == "shared", how != "gemm", how not in ("tail", "gemm"), what, rounding, relu, 7),
            "ASM": True,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        archs=archs,
        expects=("integer mma", "no float", *(("multiply",) if signs else ())),
        z_per_loop=tile.bn * tile.bk if signs else 0,
        divisible=tuple(n for n in names if n not in _NUMBERS) if how not in ("tail", "gemm") else (),
        representative=tested,
        maxnreg=_ONCE_REGISTERS if what == ONCE.value else 0,
    )  # fmt: skip


def variants():
    """A layer of 4096 by 4096 at few and at many rows, for the static report and the compile tests."""
    require()
    small = tuple(arch for arch in ARCHS if arch not in LARGE)
    for rows in (16, 64, 2048):
        for archs in ((90,), (100,), small) if rows > 16 else (ARCHS,):
            yield _variant(rows, "pair", 1, "nearest", archs, True)
            yield _variant(rows, "pair", 2, "nearest", archs, rows != 64)
            yield _variant(rows, "pair", 0, "nearest", archs, False)
            if rows <= 64:
                yield _variant(rows, "pair", PART.value, "nearest", archs, True)
                yield _variant(rows, "pair", ONCE.value, "nearest", archs, True, relu=True)
                yield _variant(rows, "plain", ONCE.value, "nearest", archs, False)
            yield _variant(rows, "pair", 2, "pseudo", archs, False)
            yield _variant(rows, "pair", 2, "nearest", archs, rows == 16, relu=True)
            yield _variant(rows, "shared", 1, "nearest", archs, rows == 16)
            yield _variant(rows, "tail", 1, "nearest", archs, rows == 16)
            yield _variant(rows, "plus", 1, "nearest", archs, False)
            yield _variant(rows, "plain", 2, "nearest", archs, rows == 2048)
            yield _variant(rows, "gemm", 0, "nearest", archs, rows == 64)
    for rows in (16, 64):
        for archs in ((90,), (100,), small):
            yield _variant(rows, "pair", 1, "nearest", archs, True, n=8192)
    pointers = dict.fromkeys(("parts_ptr", "acc_ptr", "peak_ptr"), "*i32")
    yield Variant(
        int8_sum_parts_kernel, "int8_sum_parts", {**pointers, **dict.fromkeys(("size", "whole", "parts"), "i32")},
        {"BLOCK": _BLOCK}, 4, 3, expects=("no float",), divisible=("size", "whole"),
    )  # fmt: skip

"""Perturbed linear on the GPU: y_g = x_g (W + sign_g eps z_q)^T + (b + sign_g eps z'_q), one launch for all groups.

| tensor | shape |
|---|---|
| x | [groups * rows, K] by any leading dimensions and strides, or [rows, K] shared by all groups |
| W | [N, K], or [K, N] when transposed; any strides; z has W's own rows and columns |
| b | [N] |
| y | [groups * rows, N], contiguous |

A program makes BM rows of one group (both groups of a pair) by BN outputs: it reads a tile of W once, makes its z once,
forms W + eps z and W - eps z in fp32 (product rounded, then sum), rounds them to x's dtype and multiplies. Tiles never
straddle two groups. SWAP puts W's rows on the tensor core's long side, for few rows of x. Where programs are few and memory is
allowed, K is cut into parts, which :mod:`._parts_triton` adds up.
"""

from __future__ import annotations

import torch

from ._address import address, strided
from ._noise_triton import NOISE_ID, load_key, noise_args, noise_constexprs, signed32, z_units
from ._noise_triton import UNIT as UNITS
from ._parts_triton import finish, room_for_parts, sum_parts
from ._rounding_triton import add_product, of_precision, round_z
from ._strategy import regular
from ._tiles import LARGE, linear_parts, linear_tile
from ._triton import jit, require, tl
from ._variants import ARCHS, Variant
from .noise import Noise


@jit
def perturb_tile(w, z, eps, dtype: tl.constexpr):
    """w + eps z and w - eps z in fp32, each rounded once to ``dtype``."""
    step = z * eps
    w = w.to(tl.float32)
    return (w + step).to(dtype), (w - step).to(dtype)


@jit
def bias_noise(
    k0, k1, site, query, first,
    BN: tl.constexpr, NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
    threshold, scale,
):  # fmt: skip
    """z of a bias, fp32 [BN] from column ``first``: the row 0 of its own site."""
    # hadamard mixes on the tensor core, which wants 16 rows: 16 times the same row
    R: tl.constexpr = 16 if NOISE == 4 else 1
    units = (first + tl.arange(0, BN // UNIT) * UNIT)[None, :].to(tl.uint32)
    rows = (tl.arange(0, R) * 0)[:, None].to(tl.uint32)
    z = z_units(k0, k1, site, query, rows, units, NOISE, ROUNDS, UNIT, ASM, threshold, scale)
    return tl.max(z, axis=0)


@jit
def _multiply(w, x, acc, SWAP: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, ASM: tl.constexpr):
    """acc + w x^T ([BN, BM]) if SWAP, else acc + x w^T; x is [BM, BK], w [BN, BK] ([BK, BN] if TRANSPOSED)."""
    w = of_precision(w, PRECISION, ASM)
    if SWAP:
        if TRANSPOSED:
            w = tl.trans(w)
        acc = add_product(acc, w, tl.trans(x), PRECISION)
    else:
        if not TRANSPOSED:
            w = tl.trans(w)
        acc = add_product(acc, x, w, PRECISION)
    return acc


@jit
def _store(
    out_ptr, acc, bias, row0, first, rm, rn, rows, N,
    BM: tl.constexpr, NEAR: tl.constexpr, SWAP: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    if SWAP:
        acc = tl.trans(acc)
    if BIAS:
        acc += bias[None, :]
    if NEAR:
        out_ptr += (row0 + first).to(tl.int64) * N
        at = tl.arange(0, BM)[:, None] * N + rn[None, :]
    else:
        at = (row0 + rm).to(tl.int64)[:, None] * N + rn[None, :]
    out = finish(acc, out_ptr.dtype.element_ty, RELU)
    tl.store(out_ptr + at, out, mask=(rm < rows)[:, None] & (rn < N)[None, :])


#: Run-time integers of the kernel that are of no use to know when it is compiled.
_SCALARS = [
    "site", "bias_site", "query", "rows", "tiles_m", "tiles_n", "queries", "steps", "n1", "n2", "n3", "threshold"
]  # fmt: skip


@jit(do_not_specialize=_SCALARS)
def linear_kernel(
    x_ptr, w_ptr, b_ptr, out_ptr, key_ptr, eps_ptr, site, bias_site, query, rows, N, K, tiles_m, tiles_n,
    queries, steps, n1, n2, n3, s0, s1, s2, s3, x_stride, w_stride_n, w_stride_k, b_stride, threshold, scale,
    SIGNS: tl.constexpr, SHARED: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, X_DIMS: tl.constexpr,
    EVEN_K: tl.constexpr, EIGHTS: tl.constexpr, PRECISION: tl.constexpr, SWAP: tl.constexpr, ROUNDED: tl.constexpr,
    RELU: tl.constexpr, NEAR: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, BIAS_UNIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """SIGNS: 2 for the pair, else the sign. ROUNDED: z of the weight has x's dtype.

    EIGHTS: :func:`whole_loads`; the divisions below tell the compiler, which knows multiples of 16 by itself, of 8 by them.
    NEAR: outputs are stored one by one, and those of a tile lie within 2^31 of each other: from its first row on their
    addresses have 32 bits, which is half the registers.
    SPLIT: a program has ``steps`` steps of BK, and out is fp32 [parts, groups * rows, N].
    Programs that share a tile of W are neighbours, so that it stays in L2.
    """
    if EIGHTS:
        s0, s1, s2, s3 = s0 // 8 * 8, s1 // 8 * 8, s2 // 8 * 8, s3 // 8 * 8
        if TRANSPOSED:
            N, w_stride_k = N // 8 * 8, w_stride_k // 8 * 8
        else:
            K, w_stride_n = K // 8 * 8, w_stride_n // 8 * 8
    pid = tl.program_id(0)
    first_m = (pid % tiles_m) * BM
    pid = pid // tiles_m
    first_n = (pid % tiles_n) * BN
    q = pid // tiles_n
    first_k = 0
    last_k = K
    part = 0
    if SPLIT:
        part = q // queries
        q = q % queries
        first_k = part * steps * BK
        last_k = tl.minimum(K, first_k + steps * BK)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    rm, rn, rk = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN), tl.arange(0, BK)
    # rows beyond the end are read again from the last one and never stored: no mask in the loop
    xm, wn = tl.minimum(rm, rows - 1), tl.minimum(rn, N - 1)
    groups: tl.constexpr = 2 if SIGNS == 2 else 1
    row0 = q.to(tl.int64) * groups * rows
    x_row = xm if SHARED else xm + row0
    xk = rk.to(tl.int64)[None, :] * x_stride
    x_at = x_ptr + strided(x_row, n1, n2, n3, s0, s1, s2, s3, X_DIMS)[:, None] + xk
    if SIGNS == 2 and not SHARED:
        y_at = x_ptr + strided(x_row + rows, n1, n2, n3, s0, s1, s2, s3, X_DIMS)[:, None] + xk
    if TRANSPOSED:
        w_at = w_ptr + rk.to(tl.int64)[:, None] * w_stride_k + wn.to(tl.int64)[None, :] * w_stride_n
        units = (first_n + tl.arange(0, BN // UNIT) * UNIT)[None, :]
    else:
        w_at = w_ptr + wn.to(tl.int64)[:, None] * w_stride_n + rk.to(tl.int64)[None, :] * w_stride_k
        units = (tl.arange(0, BK // UNIT) * UNIT)[None, :]
    if SPLIT:
        out_ptr += part.to(tl.int64) * queries * groups * rows * N
        x_at += first_k.to(tl.int64) * x_stride
        w_at += first_k.to(tl.int64) * w_stride_k
        if SIGNS == 2 and not SHARED:
            y_at += first_k.to(tl.int64) * x_stride
    x_step = tl.full((), BK, tl.int64) * x_stride
    w_step = tl.full((), BK, tl.int64) * w_stride_k
    eps = 0.0
    if SIGNS != 0:
        k0, k1 = load_key(key_ptr)
        eps = tl.load(eps_ptr)
    if SWAP:
        acc = tl.zeros((BN, BM), tl.float32)
        other = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
        other = tl.zeros((BM, BN), tl.float32)
    for k in range(first_k, last_k, BK):
        if EVEN_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            left = K - k
            x = tl.load(x_at, mask=(rk < left)[None, :], other=0.0)
            w = tl.load(w_at, mask=(rk < left)[:, None] if TRANSPOSED else (rk < left)[None, :], other=0.0)
        if SIGNS == 0:
            acc = _multiply(w.to(dtype), x, acc, SWAP, TRANSPOSED, PRECISION, ASM)
        else:
            # beyond K z is not zero, but x is
            if TRANSPOSED:
                z = z_units(
                    k0, k1, site, query + q, (k + rk)[:, None].to(tl.uint32), units.to(tl.uint32),
                    NOISE, ROUNDS, UNIT, ASM, threshold, scale,
                )  # fmt: skip
            else:
                z = z_units(
                    k0, k1, site, query + q, rn[:, None].to(tl.uint32), (k + units).to(tl.uint32),
                    NOISE, ROUNDS, UNIT, ASM, threshold, scale,
                )  # fmt: skip
            if ROUNDED:
                z = round_z(z, dtype, ASM)
            plus, minus = perturb_tile(w, z, eps, dtype)
            if SIGNS == 2:
                if SHARED:
                    y = x
                elif EVEN_K:
                    y = tl.load(y_at)
                else:
                    y = tl.load(y_at, mask=(rk < left)[None, :], other=0.0)
                acc = _multiply(plus, x, acc, SWAP, TRANSPOSED, PRECISION, ASM)
                other = _multiply(minus, y, other, SWAP, TRANSPOSED, PRECISION, ASM)
                if not SHARED:
                    y_at += x_step
            elif SIGNS == 1:
                acc = _multiply(plus, x, acc, SWAP, TRANSPOSED, PRECISION, ASM)
            else:
                acc = _multiply(minus, x, acc, SWAP, TRANSPOSED, PRECISION, ASM)
        x_at += x_step
        w_at += w_step
    b_plus, b_minus = eps, eps
    if BIAS:
        b_plus = tl.load(b_ptr + rn.to(tl.int64) * b_stride, mask=rn < N, other=0.0).to(tl.float32)
        b_minus = b_plus
        if SIGNS != 0:
            z = bias_noise(
                k0, k1, bias_site, query + q, first_n, BN, NOISE, ROUNDS, BIAS_UNIT, ASM, threshold, scale
            )  # fmt: skip
            b_plus, b_minus = perturb_tile(b_plus, z, eps, tl.float32)
    if SIGNS == -1:
        b_plus = b_minus
    if SPLIT and BIAS:
        b_plus, b_minus = tl.where(part == 0, b_plus, 0.0), tl.where(part == 0, b_minus, 0.0)
    _store(out_ptr, acc, b_plus, row0, first_m, rm, rn, rows, N, BM, NEAR, SWAP, BIAS, RELU)
    if SIGNS == 2:
        _store(out_ptr, other, b_minus, row0 + rows, first_m, rm, rn, rows, N, BM, NEAR, SWAP, BIAS, RELU)


def architecture(device: torch.device) -> int:
    """Compute capability as a number, 90 for an H100. Where there is no GPU (the interpreter), 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def whole_loads(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether rows of both are contiguous and begin and end at multiples of 8 elements, the first at one of 16 bytes."""
    return regular(x, w) and x.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0


def constexprs(
    tile, noise, signs: int, shared: bool, transposed: bool, bias: bool, x_dims: int, even_k: bool, precision: str,
    rounded: bool = False, eights: bool = True, near: bool = False, relu: bool = False, split: bool = False,
) -> dict:  # fmt: skip
    """Everything that :func:`linear_kernel` is compiled for."""
    return {
        **{"SIGNS": signs, "SHARED": bool(shared), "TRANSPOSED": bool(transposed), "BIAS": bias, "X_DIMS": x_dims},
        **{
            "EVEN_K": even_k,
            "EIGHTS": eights,
            "NEAR": near,
            "ROUNDED": rounded,
            "RELU": relu and not split,
            "SPLIT": split,
            "PRECISION": precision,
            "SWAP": tile.swap,
            "BM": tile.bm,
            "BN": tile.bn,
            "BK": tile.bk,
        },
        **noise_constexprs(noise, tile.bn if transposed else tile.bk),
        "BIAS_UNIT": min(UNITS[noise.name], tile.bn),
    }


def launch_linear(
    x, w, b, key, eps, site, bias_site, shared, transposed, precision, query, queries, signs, noise, out, *, rounded=False,
    relu=False, split=False,
) -> None:  # fmt: skip
    """Write the outputs of every group; arguments as in :func:`perturbed_linear`, all checked there.

    Args:
        key, eps: None where no sign is perturbed, ``signs`` of (0,).
        precision: ``ieee`` or ``tf32``.
        out: contiguous.
        rounded: z of the weight is rounded to x's dtype.
        relu: of the outputs.
        split: K may be cut into parts, which take memory.
    """
    require()
    rounded = rounded and not noise.sixteen_bits
    n, k = w.shape[::-1] if transposed else w.shape
    groups = queries * len(signs)
    rows = out.numel() // (n * groups)
    place = address(x, "matrix")
    if place is None:
        x = x.contiguous()
        place = address(x, "matrix")
    eights = whole_loads(x, w)
    arch, mixed = architecture(x.device), w.dtype != x.dtype
    tile = linear_tile(rows, n, k, x.dtype, noise.name, precision, transposed, arch, eights, mixed)
    ieee = x.dtype == torch.float32 and precision == "ieee"
    parts, steps = linear_parts(tile, rows, n, k, ieee, arch) if split else (1, 0)
    memory = room_for_parts("perturbed_linear", parts, out, torch.float32) if parts > 1 else None
    parts = 1 if memory is None else parts
    tiles_m, tiles_n = -(-rows // tile.bm), -(-n // tile.bn)
    if max(n + tile.bn, k + tile.bk, rows + tile.bm, tiles_m * tiles_n * queries * parts) >= 1 << 31:
        raise NotImplementedError(f"perturbed_linear: {rows} rows, {n} outputs, {k} inputs: 2^31 is the limit")
    threshold, scale = noise_args(noise)
    sign = 2 if len(signs) == 2 else signs[0]
    stride_n, stride_k = w.stride()[::-1] if transposed else w.stride()
    with torch.cuda.device_of(x):
        linear_kernel[(tiles_m * tiles_n * queries * parts,)](
            x, w, b if b is not None else w, out if memory is None else memory, key, eps, signed32(site), signed32(bias_site),
            query, rows, n, k, tiles_m, tiles_n, queries, steps, **place.index_args(), x_stride=place.channel,
            w_stride_n=stride_n, w_stride_k=stride_k,
            b_stride=b.stride(0) if b is not None else 1, threshold=threshold, scale=scale,
            **constexprs(
                tile, noise, sign, shared, transposed, b is not None, place.dims, k % tile.bk == 0, precision, rounded,
                eights, n % 16 != 0 and tile.bm * n < 1 << 31, relu, memory is not None,
            ),
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
        if memory is not None:
            sum_parts(memory, out, parts, relu)


# ----------------------------------------------------------------------------------------------------------- variants

_FLOATS = {
    "bf16": ("bf16", "bf16", torch.bfloat16, "ieee"),
    "fp16": ("fp16", "fp16", torch.float16, "ieee"),
    "mixed": ("bf16", "fp32", torch.bfloat16, "ieee"),
    "fp32": ("fp32", "fp32", torch.float32, "ieee"),
    "tf32": ("fp32", "fp32", torch.float32, "tf32"),
}
#: What the tests compile: dtype, noise, rows, how.
_TESTED = {
    ("bf16", "gaussian", 16, "pair"), ("bf16", "gaussian", 2048, "pair"), ("mixed", "gaussian", 2048, "pair"),
    ("bf16", "hadamard", 16, "pair"), ("bf16", "hadamard", 2048, "pair"), ("bf16", "sparse", 2048, "pair"),
    ("fp16", "clt4", 32, "pair"), ("bf16", "rademacher", 32, "pair"), ("tf32", "gaussian", 32, "pair"),
    ("fp32", "gaussian", 32, "pair"), ("bf16", "gaussian", 16, "transposed"), ("bf16", "hadamard", 2048, "transposed"),
    ("bf16", "gaussian", 16, "shared"), ("fp32", "gaussian", 32, "tail"), ("bf16", "gaussian", 2048, "plus"),
    ("bf16", "gaussian", 2048, "plain"), ("bf16", "clt4", 64, "rounded"), ("bf16", "clt4", 64, "ragged"),
    ("bf16", "clt4", 64, "eights"), ("bf16", "gaussian", 2048, "eights"), ("bf16", "hadamard", 32, "ragged"),
    ("fp32", "gaussian", 32, "split"), ("bf16", "clt4", 128, "split"), ("fp16", "hadamard", 128, "split"),
    ("mixed", "clt4", 2048, "pair"), ("mixed", "gaussian", 2048, "ragged"), ("tf32", "rademacher", 2048, "ragged"),
}  # fmt: skip


def _variant(dtype: str, name: str, rows: int, how: str, archs: tuple[int, ...], n: int = 4096) -> Variant:
    x, w, kind, precision = _FLOATS[dtype]
    noise = Noise(name, p_zero=0.5 if name == "sparse" else 0.0)
    transposed = how == "transposed"
    odd = how in ("ragged", "eights")
    regular = how != "ragged"
    tile = linear_tile(rows, n + 4 * odd, 4096, kind, name, precision, transposed, archs[0], regular, dtype == "mixed")
    out = "fp32" if how == "split" else x
    pointers = {"x_ptr": x, "w_ptr": w, "b_ptr": w, "out_ptr": out, "key_ptr": "i32", "eps_ptr": "fp32"}
    along, across = ("w_stride_n", "w_stride_k") if transposed else ("w_stride_k", "w_stride_n")
    strides = ("s0", "s1", "s2", "s3", across)
    signs, even = {"plus": 1, "plain": 0}.get(how, 2), not odd and how != "tail"
    return Variant(
        kernel=linear_kernel,
        name=f"linear/{dtype}/{name}/{rows}/{how}" + ("" if len(archs) == len(ARCHS) else f"/sm_{archs[0]}"),
        signature={
            **{pointer: "*" + of for pointer, of in pointers.items()},
            **dict.fromkeys((*_SCALARS, "N", "K", *strides), "i32"),
            "scale": "fp32",
        },
        constexprs={
            **{"x_stride": 1, "b_stride": 1, along: 1},
            **constexprs(
                tile,
                noise,
                signs,
                how == "shared",
                transposed,
                True,
                1,
                even,
                precision,
                how == "rounded",
                how != "ragged",
                odd,
                split=how == "split",
            ),
            "ASM": True,
        },
        num_warps=tile.warps,
        num_stages=tile.stages,
        archs=archs,
        expects=(("ieee",) if dtype == "fp32" else ("mma",)) + (("multiply",) if signs else ()),
        z_per_loop=tile.bn * tile.bk if signs else 0,
        divisible=() if odd else ("N", "K", *strides) if even else ("N", *strides),
        representative=(dtype, name, rows, how) in _TESTED,
    )


def variants():
    """A layer of 4096 by 4096 at few and at many rows, for the static report and the compile tests."""
    require()
    cases = [(d, n, r, "pair") for d in _FLOATS for n in NOISE_ID for r in (16, 32, 64, 2048) if n != "sparse_int8"]
    cases += [("bf16", n, r, "transposed") for n in ("gaussian", "hadamard", "clt4") for r in (16, 2048)]
    cases += [case for case in sorted(_TESTED) if case not in cases]
    for case in cases:
        large = tuple(arch for arch in ARCHS if arch in LARGE)
        small = tuple(arch for arch in ARCHS if arch not in LARGE)
        for archs in (large, small) if case[2] > 64 and case[0] != "fp32" else (ARCHS,):
            yield _variant(*case, archs)

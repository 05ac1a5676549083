"""Kernels that write z, or perturbed copies of a parameter, to memory.

    out = z_query                              (materialize)
    out[g] = w + (sign_g eps) z_query(g)       (perturb; fp32, rounded once to out's dtype)

| tensor | shape |
|---|---|
| w | any, any strides |
| out | w's, or [groups, *w.shape]; any strides |

A program makes one tile of rows by logical columns (docs/rng.md) for one query and writes it for every sign.
"""

from __future__ import annotations

import torch

from ._address import Address, address, offsets
from ._layout import Grid, grid
from ._noise_triton import NOISE_ID, load_key, noise_args, noise_constexprs, signed32, z_units
from ._rounding_triton import round_z
from ._tiles import element_tile
from ._triton import jit, require, tl
from ._variants import Variant
from .noise import Noise

_SCALARS = ["site", "query", "rows", "columns", "padded", "tiles", "threshold", "n1", "n2", "n3"]


@jit
def _place(pid, tiles, channels, padded, R: tl.constexpr, C: tl.constexpr, CONV: tl.constexpr):
    """Rows [R, 1], logical columns [1, C], taps and channels [1, C] of tile ``pid``."""
    first = (pid % tiles) * C
    rows = ((pid // tiles) * R + tl.arange(0, R))[:, None]
    columns = (first + tl.arange(0, C))[None, :]
    if CONV:
        taps = columns // padded
        within = columns - taps * padded
    else:
        taps = columns * 0
        within = columns
    return first, rows, columns, taps, within


@jit(do_not_specialize=_SCALARS)
def noise_kernel(
    out_ptr, key_ptr, site, query, rows, columns, channels, padded, tiles,
    n1, n2, n3, s0, s1, s2, s3, row_stride, channel_stride, threshold, scale,
    R: tl.constexpr, C: tl.constexpr, DIMS: tl.constexpr, CONV: tl.constexpr,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr, EIGHTS: tl.constexpr = False,
):  # fmt: skip
    """EIGHTS: as in :func:`perturb_kernel`, of out."""
    if EIGHTS:
        channels, padded = channels // 8 * 8, padded // 8 * 8
        s0, s1, s2, s3, row_stride = s0 // 8 * 8, s1 // 8 * 8, s2 // 8 * 8, s3 // 8 * 8, row_stride // 8 * 8
    k0, k1 = load_key(key_ptr)
    first, r, c, taps, within = _place(tl.program_id(0), tiles, channels, padded, R, C, CONV)
    units = (first + tl.arange(0, C // UNIT) * UNIT)[None, :].to(tl.uint32)
    z = z_units(k0, k1, site, query, r.to(tl.uint32), units, NOISE, ROUNDS, UNIT, ASM, threshold, scale)
    at = offsets(r, taps, within, n1, n2, n3, s0, s1, s2, s3, row_stride, channel_stride, DIMS, CONV)
    mask = (r < rows) & (within < channels)
    if CONV:
        mask = mask & (taps < columns // padded)
    tl.store(out_ptr + at, z.to(out_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=[*_SCALARS, "first_row", "w_n1", "w_n2", "w_n3"])
def perturb_kernel(
    w_ptr, out_ptr, key_ptr, eps_ptr, site, query, first_row, rows, columns, channels, padded, tiles, group_stride,
    w_n1, w_n2, w_n3, w_s0, w_s1, w_s2, w_s3, w_row_stride, w_channel_stride,
    n1, n2, n3, s0, s1, s2, s3, row_stride, channel_stride, threshold, scale,
    SIGNS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, W_DIMS: tl.constexpr, DIMS: tl.constexpr, CONV: tl.constexpr,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr, ROUNDED: tl.constexpr = False,
    EIGHTS: tl.constexpr = False,
):  # fmt: skip
    """SIGNS: 2 for the pair, else the sign. ROUNDED: z has out's dtype.

    EIGHTS: channels lie side by side in w and out, begin at multiples of 16 bytes, and they, the padding and every stride are
    multiples of 8: the divisions below tell the compiler, which then moves 16 bytes at a time.
    first_row: of the parameter, where w is some of its rows.
    """
    if EIGHTS:
        channels, padded, group_stride = channels // 8 * 8, padded // 8 * 8, group_stride // 8 * 8
        w_s0, w_s1, w_s2, w_s3 = w_s0 // 8 * 8, w_s1 // 8 * 8, w_s2 // 8 * 8, w_s3 // 8 * 8
        s0, s1, s2, s3 = s0 // 8 * 8, s1 // 8 * 8, s2 // 8 * 8, s3 // 8 * 8
        w_row_stride, row_stride = w_row_stride // 8 * 8, row_stride // 8 * 8
    first, r, c, taps, within = _place(tl.program_id(0), tiles, channels, padded, R, C, CONV)
    q = tl.program_id(1)
    mask = (r < rows) & (within < channels)
    if CONV:
        mask = mask & (taps < columns // padded)
    w_at = offsets(
        r, taps, within, w_n1, w_n2, w_n3, w_s0, w_s1, w_s2, w_s3, w_row_stride, w_channel_stride, W_DIMS, CONV
    )
    w = tl.load(w_ptr + w_at, mask=mask, other=0.0).to(tl.float32)
    at = offsets(r, taps, within, n1, n2, n3, s0, s1, s2, s3, row_stride, channel_stride, DIMS, CONV)
    groups: tl.constexpr = 2 if SIGNS == 2 else 1
    out_ptr += q.to(tl.int64) * groups * group_stride
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if SIGNS == 0:
        tl.store(out_ptr + at, w.to(dtype), mask=mask)
    else:
        k0, k1 = load_key(key_ptr)
        units = (first + tl.arange(0, C // UNIT) * UNIT)[None, :].to(tl.uint32)
        own = (r + first_row).to(tl.uint32)
        z = z_units(k0, k1, site, query + q, own, units, NOISE, ROUNDS, UNIT, ASM, threshold, scale)
        if ROUNDED:
            z = round_z(z, dtype, ASM)
        step = z * tl.load(eps_ptr)
        if SIGNS >= 1:
            tl.store(out_ptr + at, (w + step).to(dtype), mask=mask)
        if SIGNS == 2:
            tl.store(out_ptr + group_stride + at, (w - step).to(dtype), mask=mask)
        if SIGNS == -1:
            tl.store(out_ptr + at, (w - step).to(dtype), mask=mask)


def _cover(where: Grid, noise, scattered: bool = False) -> tuple:
    """Tile, tiles in all and the arguments they give."""
    tile = element_tile(where.rows, noise.name, scattered)
    across = -(-where.columns // tile.columns)
    total = -(-where.rows // tile.rows) * across
    if max(where.rows + tile.rows, where.columns + tile.columns, total) >= 1 << 31:
        raise NotImplementedError(f"a parameter of {where.rows} rows by {where.columns} columns: 2^31 is the limit")
    scalars = {
        "rows": where.rows,
        "columns": where.columns,
        "channels": where.channels,
        "padded": where.padded,
        "tiles": across,
    }
    return tile, total, scalars


def _eights(where: Grid, tensor: torch.Tensor, place: Address) -> bool:
    """Whether a tensor's channels lie side by side in whole runs of eight that begin at multiples of 16 bytes."""
    steps = (*place.strides, place.row, where.channels, where.padded)
    return place.channel == 1 and tensor.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in steps)


def launch_noise(out: torch.Tensor, key: torch.Tensor, site: int, query: int, layout: str, noise) -> None:
    """Write z of one parameter.

    Args:
        out: fp32 (int8 for sparse_int8) of the parameter's shape, any strides.
        key: int32 [2].
        site, query, layout: as in the contract.
        noise: a :class:`Noise`.
    """
    require()
    where = grid(out.shape, layout, noise.segment)
    place = address(out, layout)
    if place is None:
        whole = torch.empty_like(out, memory_format=torch.contiguous_format)
        launch_noise(whole, key, site, query, layout, noise)
        out.copy_(whole)
        return
    tile, total, scalars = _cover(where, noise)
    threshold, scale = noise_args(noise)
    with torch.cuda.device_of(out):
        noise_kernel[(total,)](
            out, key, signed32(site), query, **scalars, **place.args(), threshold=threshold, scale=scale,
            R=tile.rows, C=tile.columns, DIMS=place.dims, CONV=layout == "conv", EIGHTS=_eights(where, out, place),
            **noise_constexprs(noise, tile.columns), num_warps=tile.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


def launch_perturb(
    w, key, eps, site, layout, query, queries, signs, noise, out, *, first_row: int = 0, rounded: bool = False
) -> None:  # fmt: skip
    """Write the perturbed copies of one parameter, group-major.

    Args:
        w: fp32, fp16 or bf16, any shape and strides.
        key, eps: int32 [2], fp32 [1], on the device.
        site, layout, query, queries, signs, noise: as in :class:`Perturbation`.
        out: [queries * len(signs), *w.shape].
        first_row: w is these rows and on of a larger parameter.
        rounded: z is rounded to out's dtype.
    """
    more = {"first_row": first_row, "rounded": rounded}
    require()
    rounded = rounded and not noise.sixteen_bits
    if queries > 65535:
        raise NotImplementedError(f"perturb: 65535 queries a pass at most, got {queries}")
    where = grid(w.shape, layout, noise.segment)
    source, place = address(w, layout), address(out[0], layout)
    if source is None:
        return launch_perturb(w.contiguous(), key, eps, site, layout, query, queries, signs, noise, out, **more)
    if place is None:
        whole = torch.empty_like(out, memory_format=torch.contiguous_format)
        launch_perturb(w, key, eps, site, layout, query, queries, signs, noise, whole, **more)
        out.copy_(whole)
        return
    eights = out.stride(0) % 8 == 0 and _eights(where, w, source) and _eights(where, out, place)
    tile, total, scalars = _cover(where, noise, scattered=not eights)
    threshold, scale = noise_args(noise)
    with torch.cuda.device_of(w):
        perturb_kernel[(total, queries)](
            w, out, key, eps, signed32(site), query, first_row, **scalars, group_stride=out.stride(0),
            **source.args("w_"), **place.args(), threshold=threshold, scale=scale,
            SIGNS=2 if len(signs) == 2 else signs[0], R=tile.rows, C=tile.columns,
            W_DIMS=source.dims, DIMS=place.dims, CONV=layout == "conv", ROUNDED=rounded, EIGHTS=eights,
            **noise_constexprs(noise, tile.columns), num_warps=tile.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


def _variant(kernel, name, pointers, integers, constexprs, tile, noise, ones, representative):
    """A launch whose strides ``ones`` are one, and so constants, and whose other strides are multiples of 16."""
    return Variant(
        kernel=kernel,
        name=name,
        signature={
            **{pointer: "*" + kind for pointer, kind in pointers.items()},
            **{integer: "i32" for integer in integers if integer not in ones},
            "scale": "fp32",
        },
        constexprs={
            "R": tile.rows,
            "C": tile.columns,
            **dict.fromkeys(ones, 1),
            **noise_constexprs(noise, tile.columns),
            "ASM": True,
            **constexprs,
        },
        num_warps=tile.warps,
        num_stages=1,
        expects=("multiply", "integer mma") if noise.name == "hadamard" else ("multiply",),
        z_per_program=tile.rows * tile.columns,
        divisible=tuple(
            n for n in integers if n not in ones and n not in (*_SCALARS, "first_row") and not n.startswith("w_n")
        ),
        representative=representative,
    )


def variants():
    """For the static report and the compile tests: a matrix, a bias and a 3 x 3 convolution.

    z alone is written to contiguous tensors. Perturbed copies are those of slabs: matrices and channels_last convolutions by 16
    bytes at a time, contiguous convolutions and biases in the general form.
    """
    require()
    strides = ("s0", "s1", "s2", "s3", "row_stride", "channel_stride")
    out = [*_SCALARS, "channels", *strides]
    both = [*out, "first_row", "group_stride", "w_n1", "w_n2", "w_n3", *("w_" + s for s in strides)]
    for name in NOISE_ID:
        noise = Noise(name, p_zero=0.5 if name.startswith("sparse") else 0.0)
        for shape, rows, conv in (("matrix", 4096, False), ("bias", 1, False), ("conv3x3", 128, True)):
            tile = element_tile(rows, name)
            one = "s3" if conv else "channel_stride"
            tested = (shape, name) in {("matrix", "gaussian"), ("matrix", "hadamard"), ("conv3x3", "rademacher")}
            pointers = {"out_ptr": "i8" if name == "sparse_int8" else "fp32", "key_ptr": "i32"}
            constexprs = {"DIMS": 1, "CONV": conv, "EIGHTS": shape == "matrix"}
            yield _variant(
                noise_kernel, f"noise/{name}/{shape}", pointers, out, constexprs, tile, noise, (one,), tested
            )
            if name == "sparse_int8":
                continue
            of_bias, of_slab = {("bf16", "gaussian"), ("fp32", "hadamard")}, {("bf16", "clt4"), ("fp32", "gaussian")}
            for dtype in ("bf16", "fp16", "fp32"):
                pointers = {"w_ptr": dtype, "out_ptr": dtype, "key_ptr": "i32", "eps_ptr": "fp32"}
                constexprs = {"DIMS": 1, "W_DIMS": 1, "CONV": conv, "SIGNS": 2, "ROUNDED": False, "EIGHTS": rows > 1}
                yield _variant(
                    perturb_kernel, f"perturb/{dtype}/{name}/{shape}/pair", pointers, both, constexprs, tile, noise,
                    ("channel_stride", "w_channel_stride"), (dtype, name) in (of_slab if rows > 1 else of_bias),
                )  # fmt: skip
                if conv:
                    yield _variant(
                        perturb_kernel, f"perturb/{dtype}/{name}/{shape}/pair/scattered", pointers, both,
                        {**constexprs, "EIGHTS": False}, element_tile(rows, name, True), noise, ("s3", "w_s3"),
                        (dtype, name) in {("bf16", "gaussian"), ("fp32", "sparse")},
                    )  # fmt: skip

"""The update on the GPU: w <- w - coef_0 z_0 - coef_1 z_1 - ..., one launch over all parameters, z made again.

| tensor | shape |
|---|---|
| params | any shapes and strides, fp32, fp16 or bf16, mixed |
| keys | int32 [steps, 2], on the device |
| coef | fp32 [steps, queries], on the device |
| table | int64, on the device: FIELDS numbers a parameter, then (parameter << 32 | tile) for each program |

A program reads and writes one tile of one parameter once, whatever the number of steps and queries. Arithmetic is fp32,
each product rounded; 16-bit weights round stochastically at the end of each step, in registers, bit for bit as
``ops.update.round_stochastic``.
"""

from __future__ import annotations

import numpy as np
import torch

from . import _constants as C
from ._address import MOST_DIMS, address, strided
from ._layout import grid, pointer
from ._noise_triton import NOISE_ID, lane_units, load_key, noise_args, noise_constexprs, signed32, z_units
from ._rounding_triton import round_stochastic, round_z
from ._tiles import update_tile
from ._triton import constexpr, jit, require, tl
from ._variants import Variant
from .noise import Noise

_S_ROUNDING = constexpr(C.STREAM_ROUNDING)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Numbers of one parameter in the table: address, site, code (:func:`code_of`), whether fast, rows, columns, channels, padded,
#: tiles across, whether conv, n1..n3, s0..s3, row stride, channel stride.
FIELDS = 20
_FIELDS = constexpr(FIELDS)
#: By the code of the parameters: what a kernel is compiled for.
FLAGS = ("FP32", "BF16", "FP16", "BF16_Z", "FP16_Z")


@jit
def _general(at, entry_ptr, rows, columns):
    """Pointers [R, C] of a tile in a parameter of any strides."""
    padded = tl.load(entry_ptr + 7).to(tl.int32)
    conv = tl.load(entry_ptr + 9)
    n1, n2 = tl.load(entry_ptr + 10).to(tl.int32), tl.load(entry_ptr + 11).to(tl.int32)
    n3 = tl.load(entry_ptr + 12).to(tl.int32)
    s0, s1, s2, s3 = tl.load(entry_ptr + 13), tl.load(entry_ptr + 14), tl.load(entry_ptr + 15), tl.load(entry_ptr + 16)
    taps = columns // padded
    within = columns - taps * padded
    # the sizes and strides are those of the taps of a conv weight, else of the rows
    of_rows = strided(rows * (1 - conv).to(tl.int32), n1, n2, n3, s0, s1, s2, s3, 4)
    of_taps = strided(taps * conv.to(tl.int32), n1, n2, n3, s0, s1, s2, s3, 4)
    of_rows += rows.to(tl.int64) * tl.load(entry_ptr + 17)
    of_taps += within.to(tl.int64) * tl.load(entry_ptr + 18)
    return at + of_rows + of_taps, within


@jit
def _tile(
    entry_ptr, tile, key_ptr, coef_ptr, steps, queries, query, threshold, scale,
    CODE: tl.constexpr, ROUNDED: tl.constexpr, ONE: tl.constexpr, STOCHASTIC: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of a parameter of dtype CODE. bf16 is read and written as int16, the upper half of an fp32.

    ROUNDED: z has the parameter's dtype.
    """
    dtype: tl.constexpr = tl.float32 if CODE == 0 else tl.int16 if CODE == 1 else tl.float16
    base = tl.load(entry_ptr).to(tl.pointer_type(dtype))
    site = tl.load(entry_ptr + 1).to(tl.int32)
    fast = tl.load(entry_ptr + 3) != 0
    factor = tl.load(entry_ptr + 19).to(tl.int32).to(tl.float32, bitcast=True)
    rows, columns = tl.load(entry_ptr + 4).to(tl.int32), tl.load(entry_ptr + 5).to(tl.int32)
    channels = tl.load(entry_ptr + 6).to(tl.int32)
    across = tl.load(entry_ptr + 8).to(tl.int32)
    first = (tile % across) * C
    r = ((tile // across) * R + tl.arange(0, R))[:, None]
    c = (first + tl.arange(0, C))[None, :]
    if fast:
        # rows of multiples of 8 elements, at multiples of 16 bytes: 16-byte accesses
        stride = tl.multiple_of(tl.load(entry_ptr + 16), 8)
        at = tl.multiple_of(base, 16) + r.to(tl.int64) * stride + c
        raw = tl.load(at, mask=(r < rows) & (c < tl.multiple_of(channels, 8)), other=0)
    else:
        at, within = _general(base, entry_ptr, r, c)
        raw = tl.load(at, mask=(r < rows) & (c < columns) & (within < channels), other=0)
    out = raw
    counter_rows = r.to(tl.uint32)
    units = (first + tl.arange(0, C // UNIT) * UNIT)[None, :].to(tl.uint32)
    touched = 0
    for step in range(1 if ONE else steps):
        if CODE == 1:
            v = (out.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            v = out.to(tl.float32)
        k0, k1 = load_key(key_ptr + 2 * step)
        moved = 0
        for q in range(1 if ONE else queries):
            coef = tl.load(coef_ptr + step * queries + q) * factor
            # a skipped step leaves every bit alone, that of -0 too
            if coef != 0.0:
                z = z_units(k0, k1, site, query + q, counter_rows, units, NOISE, ROUNDS, UNIT, ASM, threshold, scale)
                if ROUNDED:
                    z = round_z(z, tl.bfloat16 if CODE == 1 else tl.float16, ASM)
                v = v - z * coef
                moved = 1
        if moved != 0:
            touched = 1
            if CODE == 0:
                out = v
            elif STOCHASTIC:
                blocks = (first + tl.arange(0, C // 8) * 8)[None, :].to(tl.uint32)
                stream = (query * 0 + _S_ROUNDING).to(tl.uint32)
                lanes = lane_units(k0, k1, site, stream, counter_rows, blocks, ROUNDS, ASM)
                out = round_stochastic(v, lanes, CODE)
            elif CODE == 1:
                out = v.to(tl.bfloat16).to(tl.int16, bitcast=True)
            else:
                out = v.to(tl.float16)
    if touched != 0:
        if fast:
            stride = tl.multiple_of(tl.load(entry_ptr + 16), 8)
            at = tl.multiple_of(base, 16) + r.to(tl.int64) * stride + c
            tl.store(at, out, mask=(r < rows) & (c < tl.multiple_of(channels, 8)))
        else:
            at, within = _general(base, entry_ptr, r, c)
            tl.store(at, out, mask=(r < rows) & (c < columns) & (within < channels))


@jit(do_not_specialize=["count", "steps", "queries", "query", "threshold"])
def update_kernel(
    table_ptr, key_ptr, coef_ptr, count, steps, queries, query, threshold, scale,
    FP32: tl.constexpr, BF16: tl.constexpr, FP16: tl.constexpr, BF16_Z: tl.constexpr, FP16_Z: tl.constexpr,
    ONE: tl.constexpr, STOCHASTIC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    NOISE: tl.constexpr, ROUNDS: tl.constexpr, UNIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """FP32, BF16, FP16: which dtypes the parameters have; BF16_Z, FP16_Z: those whose z has the dtype, too. A parameter's
    own is a branch of the whole program.

    ONE: there is one step of one query, and no loop: a training step of one query, without the registers of a loop.
    """
    work = tl.load(table_ptr + count.to(tl.int64) * _FIELDS + tl.program_id(0))
    entry_ptr = table_ptr + (work >> 32) * _FIELDS
    tile = (work & 0x7FFFFFFF).to(tl.int32)
    code = tl.load(entry_ptr + 2)
    if FP32:  # noqa: SIM102 - the outer ifs are the compiler's
        if code == 0:
            _tile(
                entry_ptr, tile, key_ptr, coef_ptr, steps, queries, query, threshold, scale,
                0, False, ONE, STOCHASTIC, R, C, NOISE, ROUNDS, UNIT, ASM,
            )  # fmt: skip
    if BF16:  # noqa: SIM102
        if code == 1:
            _tile(
                entry_ptr, tile, key_ptr, coef_ptr, steps, queries, query, threshold, scale,
                1, False, ONE, STOCHASTIC, R, C, NOISE, ROUNDS, UNIT, ASM,
            )  # fmt: skip
    if FP16:  # noqa: SIM102
        if code == 2:
            _tile(
                entry_ptr, tile, key_ptr, coef_ptr, steps, queries, query, threshold, scale,
                2, False, ONE, STOCHASTIC, R, C, NOISE, ROUNDS, UNIT, ASM,
            )  # fmt: skip
    if BF16_Z:  # noqa: SIM102
        if code == 3:
            _tile(
                entry_ptr, tile, key_ptr, coef_ptr, steps, queries, query, threshold, scale,
                1, True, ONE, STOCHASTIC, R, C, NOISE, ROUNDS, UNIT, ASM,
            )  # fmt: skip
    if FP16_Z:  # noqa: SIM102
        if code == 4:
            _tile(
                entry_ptr, tile, key_ptr, coef_ptr, steps, queries, query, threshold, scale,
                2, True, ONE, STOCHASTIC, R, C, NOISE, ROUNDS, UNIT, ASM,
            )  # fmt: skip


def code_of(dtype: torch.dtype, rounded: bool, noise) -> int:
    """What the table says of a parameter: 0 fp32, 1 bf16, 2 fp16; 3 and 4 are bf16 and fp16 with z rounded to them."""
    return DTYPES.index(dtype) + (2 if rounded and not noise.sixteen_bits else 0)


def update_table(params, sites, layouts, noise, tile=None, rounded=None, scales=None) -> torch.Tensor:
    """The device table of :func:`launch_update`; valid while the parameters stay where they are.

    Args:
        params: tensors of one device.
        sites, layouts: of each.
        noise: a :class:`Noise`.
        tile: of another kernel; by default this one's.
        rounded: whether z of each is rounded to its dtype; by default none is.
        scales: of each, as in :func:`ezo_kernels.ops.update_`; by default 1.

    Returns:
        int64, on the parameters' device.

    Raises:
        NotImplementedError: a parameter of more dimensions than can be addressed, or of more than 2^31 rows or columns.
    """
    tile = tile or update_tile(noise.name)
    entries = np.zeros((len(params), FIELDS), np.int64)
    rounded = rounded or [False] * len(params)
    factors = np.asarray(scales or [1.0] * len(params), np.float32).view(np.int32)
    work = []
    for i, (w, site, layout, rounds_z, factor) in enumerate(zip(params, sites, layouts, rounded, factors, strict=True)):
        where, place = grid(w.shape, layout, noise.segment), address(w, layout)
        if place is None:
            raise NotImplementedError(
                f"update_: a parameter of shape {tuple(w.shape)} and strides {w.stride()} has more than {MOST_DIMS} "
                "dimensions that do not lie behind one another in memory; make it contiguous"
            )
        across = -(-where.columns // tile.columns)
        tiles = -(-where.rows // tile.rows) * across if w.numel() else 0
        if max(where.rows + tile.rows, where.columns + tile.columns, tiles) >= 1 << 31:
            raise NotImplementedError(f"update_: shape {tuple(w.shape)}: 2^31 rows or columns is the limit")
        fast = (
            layout == "matrix" and place.dims == 1 and place.channel == 1 and pointer(w) % 16 == 0
            and where.channels % 8 == 0 and place.strides[-1] % 8 == 0
        )  # fmt: skip
        entries[i] = [
            pointer(w), signed32(site), code_of(w.dtype, rounds_z, noise), fast, where.rows, where.columns, where.channels,
            where.padded, across, layout == "conv", *place.sizes[1:], *place.strides, place.row, place.channel,
            factor,
        ]  # fmt: skip
        work.append(np.arange(tiles, dtype=np.int64) + (i << 32))
    table = np.concatenate([entries.ravel(), *work])
    return torch.from_numpy(table).to(params[0].device)


def launch_update(params, keys, coef, table, rounded, query, stochastic, noise) -> None:
    """Update every parameter, in place, in one launch.

    Args:
        params: those of ``table``.
        keys, coef: int32 [steps, 2], fp32 [steps, queries], on the device, contiguous.
        table: of :func:`update_table` for these parameters and this noise.
        rounded: as the table was made with.
        query: first direction of ``coef``.
        stochastic: rounding of 16-bit parameters.
        noise: a :class:`Noise`.
    """
    require()
    programs = table.numel() - len(params) * FIELDS
    if programs <= 0:
        return
    tile = update_tile(noise.name)
    threshold, scale = noise_args(noise)
    present = {code_of(w.dtype, rounds_z, noise) for w, rounds_z in zip(params, rounded, strict=True)}
    with torch.cuda.device_of(table):
        update_kernel[(programs,)](
            table, keys, coef, len(params), *coef.shape, query, threshold, scale,
            **{flag: code in present for code, flag in enumerate(FLAGS)},
            ONE=coef.numel() == 1, STOCHASTIC=bool(stochastic), R=tile.rows, C=tile.columns,
            **noise_constexprs(noise, tile.columns),
            num_warps=tile.warps, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- variants


_TESTED = {
    ("bf16", "gaussian"), ("bf16", "hadamard"), ("fp32", "clt4"), ("fp16", "sparse"), ("bf16+bf16 z", "gaussian"),
    ("fp16 z", "clt4"),
}  # fmt: skip


def variants():
    """For the static report and the compile tests; the fast and the strided path are both in each."""
    require()
    dtypes = {"bf16": ("BF16",), "fp16": ("FP16",), "fp32": ("FP32",), "fp32+bf16": ("FP32", "BF16")}
    # weights that two products multiply, and biases
    dtypes |= {"bf16 z": ("BF16_Z",), "fp16 z": ("FP16_Z",), "bf16+bf16 z": ("BF16", "BF16_Z")}
    for dtype, flags in dtypes.items():
        for name in NOISE_ID:
            if name == "sparse_int8" or (name == "rademacher" and "z" in dtype):
                continue
            noise = Noise(name, p_zero=0.5 if name == "sparse" else 0.0)
            tile = update_tile(name)
            present = {flag: flag in flags for flag in FLAGS}
            forms = [(True, True)]  # stochastic, one step of one query
            if "16" in dtype and name == "gaussian":
                forms += [(False, True), (True, False)]
            for stochastic, one in forms:
                yield Variant(
                    kernel=update_kernel,
                    name=f"update/{dtype}/{name}/{'stochastic' if stochastic else 'nearest'}{'' if one else '/steps'}",
                    signature={
                        **{"table_ptr": "*i64", "key_ptr": "*i32", "coef_ptr": "*fp32"},
                        **dict.fromkeys(("count", "steps", "queries", "query", "threshold"), "i32"),
                        "scale": "fp32",
                    },
                    constexprs={
                        **present,
                        **{"ONE": one, "STOCHASTIC": stochastic, "R": tile.rows, "C": tile.columns},
                        **noise_constexprs(noise, tile.columns),
                        "ASM": True,
                    },
                    num_warps=tile.warps,
                    num_stages=1,
                    expects=("multiply", "integer mma") if name == "hadamard" else ("multiply",),
                    z_per_program=tile.rows * tile.columns * sum(present.values()),
                    representative=stochastic and one and (dtype, name) in _TESTED,
                )

"""Which way a perturbed linear layer or convolution is multiplied: a pure function of shape, dtype, noise and architecture.

| strategy | what it does |
|---|---|
| ``fused`` | W + eps z and W - eps z are formed in the tile that multiplies; any shape |
| ``two_products`` | x W^T and x z^T in one kernel, joined in its epilogue; linear layers of few rows |
| ``slab`` | W + eps z and W - eps z of some outputs go to memory, then torch's batched matmul or convolution; for many rows |
| ``specialized`` | as fused, warps that make z beside warps that multiply; by name alone, linear layers in 16 bits on sm_90 |

``slab`` needs memory beside inputs and outputs, 32 MB at most, and ``two_products`` some for each query where K is cut into
parts (:func:`._tiles.small_parts`); ``fused`` needs none when it is asked for by name, and as much where ``auto`` takes it and
its programs are few (:func:`._tiles.linear_parts`). The numbers come from ``strategies.json``, which is shipped
and never measured on the user's machine: the same run makes the same choices. It holds, by architecture and for noise that is
dear, plain or cheap to make (:data:`KINDS`), or for fp32 by its precision: up to how many rows two products are taken, from how
many rows slabs are and how much work beyond those (rows beyond, times weights) pays for their launches, and from how many
multiplications convolutions take slabs. Rows are those of one group, so that a pass made one group at a time, or
with more queries, chooses alike.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import pathlib
from dataclasses import dataclass, field

import torch

from ._tiles import (
    SLAB_BYTES,
    conv_slab_plan,
    linear_parts,
    linear_tile,
    slab_bytes,
    slab_plan,
    small_parts,
    small_tile,
)

#: Of the rules below, for :func:`strategy_hash`: a higher one where the same table would be read otherwise, or give other bits.
VERSION = 6
#: Most that a layer takes beside inputs and outputs: a slab, or parts of K of as many queries as fit.
WORKSPACE_BYTES = SLAB_BYTES
STRATEGIES = ("auto", "fused", "two_products", "slab", "specialized")
_TABLE = pathlib.Path(__file__).with_name("strategies.json")
#: What a value of each noise costs; others are ``plain``.
KINDS = {"gaussian": "dear", "sparse": "dear", "hadamard": "cheap", "rademacher": "cheap"}
_ASKED, _CPU = "asked for by name", "the reference of a CPU"
_SIXTEEN = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Strategy:
    """What was chosen.

    Args:
        name: one of :data:`STRATEGIES`, never ``auto``.
        workspace_bytes: memory that it takes, if there is as much: of perturbed weights, or of one query's outputs in parts.
        reason: why, in words.
    """

    name: str
    workspace_bytes: int = 0
    reason: str = field(default="", compare=False)


@functools.cache
def _table() -> dict:
    return json.loads(_TABLE.read_text())


@functools.cache
def strategy_hash() -> str:
    """First 16 hexadecimal digits of the SHA-256 of the shipped table and :data:`VERSION`, for logs and states."""
    return hashlib.sha256(_TABLE.read_bytes() + f"choice {VERSION}".encode()).hexdigest()[:16]


def two_products_faults(
    x_dtype: torch.dtype, w_dtype: torch.dtype, noise: str, z_dtype: str, precision: str, transposed: bool
) -> list[str]:
    """Why two products cannot be taken, or nothing.

    The tensor core gets z in x's dtype, and the update must apply that same z: so either the site's z has that dtype, or
    z is the same in both (signs are).
    """
    faults = []
    if transposed:
        faults.append("the weight is stored [K, N]")
    if w_dtype != x_dtype:
        faults.append(f"the weight is {w_dtype} and x {x_dtype}: it would be rounded")
    exact = (
        noise == "rademacher" or (x_dtype == torch.float32 and precision == "ieee") or _SIXTEEN.get(x_dtype) == z_dtype
    )
    if not exact:
        faults.append(f"z of this site is {z_dtype}, and the tensor core would round it to {precision or x_dtype}")
    return faults


def slab_faults(transposed: bool, precision: str, torch_precision: str) -> list[str]:
    """Why slabs cannot be taken, or nothing; ``torch_precision``: of torch's own fp32 products."""
    faults = []
    if transposed:
        faults.append("the weight is stored [K, N]")
    if precision != torch_precision:
        faults.append(f"its product is torch's, which is {torch_precision} now, not {precision}")
    return faults


def specialized_faults(
    x_dtype: torch.dtype, w_dtype: torch.dtype, noise: str, transposed: bool, regular: bool, one_stride: bool, arch: int,
    missing: str,
) -> list[str]:  # fmt: skip
    """Why specialised warps cannot be taken, or nothing. A CPU (``arch`` 0) computes what they do for the same tensors.

    Args:
        one_stride: :func:`rows_at_one_stride` of x.
        missing: ``_gluon.MISSING``, of no concern to a CPU.
    """
    faults = []
    if arch not in (0, 90):
        faults.append(f"its instructions are sm_90's, and this GPU is sm_{arch}")
    if arch and missing:
        faults.append(missing)
    if x_dtype not in _SIXTEEN:
        faults.append(f"x is {x_dtype}, not bf16 or fp16")
    if w_dtype != x_dtype:
        faults.append(f"the weight is {w_dtype} and x {x_dtype}: it would be rounded")
    if transposed:
        faults.append("the weight is stored [K, N]")
    if not regular:
        faults.append("rows of x or of the weight are not in runs of 16 bytes")
    if not one_stride:
        faults.append("the rows of x are not at one stride")
    if noise == "sparse_int8":
        faults.append("sparse_int8 is the noise of integer layers")
    return faults


def rows_at_one_stride(x: torch.Tensor) -> bool:
    """Whether x [..., K] is a matrix [rows, K] without a copy, of rows that are not one and the same."""
    axes = [(n, step) for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    alike = all(outer[1] == inner[0] * inner[1] for outer, inner in zip(axes, axes[1:], strict=False))
    return alike and (not axes or axes[-1][1] > 0)


def regular(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether rows of x [..., K] and of W [N, K] are contiguous and begin at multiples of 8 elements: 16-byte loads."""
    steps = (*x.stride()[:-1], w.stride(0), w.shape[1])
    return x.stride(-1) == 1 and w.stride(1) == 1 and all(step % 8 == 0 for step in steps)


def choose(
    rows: int, shape: tuple[int, int], x_dtype: torch.dtype, w_dtype: torch.dtype, noise: str, *, arch: int,
    signs: tuple[int, ...] = (1, -1), z_dtype: str = "float32", precision: str = "ieee",
    torch_precision: str = "ieee", transposed: bool = False, regular: bool = True, one_stride: bool = True,
    missing: str = "", asked: str = "auto",
) -> Strategy:  # fmt: skip
    """The strategy of a linear layer.

    Args:
        rows: of one group, never of the stacked batch.
        shape: of the weight as it is stored, [N, K] or [K, N].
        x_dtype, w_dtype: of the product and of the weight.
        noise: its name.
        arch: compute capability, 90 for an H100; 0 for the CPU reference, which is always ``fused`` unless asked.
        signs: of the pass; (0,) is never anything but ``fused``.
        z_dtype: of the site's z, by name.
        precision: ``ieee`` or ``tf32`` of fp32.
        torch_precision: of torch's own fp32 products (``ieee`` for 16 bits).
        transposed: the weight is stored [K, N].
        regular: :func:`regular` of x and the weight.
        one_stride, missing: as in :func:`specialized_faults`.
        asked: a strategy by name, or ``auto``.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: a strategy that was asked for by name and cannot be taken, with every reason.
    """
    check_name(asked)
    faults = two_products_faults(x_dtype, w_dtype, noise, z_dtype, precision, transposed)
    if tuple(signs) == (0,):
        return Strategy("fused", reason="no sign is perturbed")

    n, k = shape[::-1] if transposed else shape

    def memory_of(parts: int) -> int:
        return 4 * parts * len(signs) * rows * n if parts > 1 else 0

    def in_parts() -> int:
        return memory_of(
            small_parts(small_tile(rows, x_dtype, noise, regular, arch), rows, n, k, arch)[0] if arch else 1
        )

    def fused(reason: str) -> Strategy:
        tile = linear_tile(rows, n, k, x_dtype, noise, precision, transposed, arch, regular, w_dtype != x_dtype)
        ieee = x_dtype == torch.float32 and precision == "ieee"
        return Strategy("fused", memory_of(linear_parts(tile, rows, n, k, ieee, arch)[0]), reason)

    if asked == "two_products":
        if faults:
            raise NotImplementedError("strategy 'two_products': " + "; ".join(faults))
        return Strategy("two_products", in_parts(), _ASKED)

    no_slab = slab_faults(transposed, precision, torch_precision)
    held = 0 if no_slab else slab_bytes(slab_plan(*shape, x_dtype.itemsize), shape[1], x_dtype.itemsize)
    if asked == "slab":
        if no_slab:
            raise NotImplementedError("strategy 'slab': " + "; ".join(no_slab))
        return Strategy("slab", held, _ASKED)
    if asked == "specialized":
        # auto never takes it: no GPU has run it yet, and the table has no place for what nobody measured
        found = specialized_faults(x_dtype, w_dtype, noise, transposed, regular, one_stride, arch, missing)
        if found:
            raise NotImplementedError("strategy 'specialized': " + "; ".join(found))
        return Strategy("specialized", reason=_ASKED)
    if asked == "fused":
        return Strategy("fused", reason=_ASKED)
    if arch == 0:
        return Strategy("fused", reason=_CPU)
    if not regular and x_dtype != torch.float32:
        return fused("rows of x or of the weight are not in runs of 16 bytes")
    table, kind = _table(), KINDS.get(noise, "plain")
    few = 0
    if x_dtype == torch.float32:  # no tensor core, or one of another rate: two products are of 16 bits
        kind = precision
    else:
        few = _known(table["two_products_rows"], arch)[kind]
    many, least = (_known(table[name], arch)[kind] for name in ("slab_rows", "slab_work"))
    if not faults and rows <= few:
        return Strategy("two_products", in_parts(), f"{rows} rows a sign, at most {few}")
    work = (rows - many) * shape[0] * shape[1]
    if not no_slab and rows >= many and work >= least:
        return Strategy(
            "slab", held, f"{rows} rows a sign, at least {many}; beyond those {work:.1e} products, at least {least:.1e}"
        )
    why = [f"{rows} rows a sign: " + (f"more than {few}, " if rows > few > 0 else "") + f"fewer than {many}"]
    if rows <= few:
        why = [f"no two products: {fault}" for fault in faults]
    elif rows >= many:
        few_products = f"{work:.1e} products beyond those of {many} rows, fewer than {least:.1e}"
        why = [f"no slab: {fault}" for fault in no_slab or [few_products]]
    return fused("; ".join(why))


def choose_conv(
    positions: int, shape: tuple[int, ...], groups: int, x_dtype: torch.dtype, noise: str, *, arch: int,
    signs: tuple[int, ...] = (1, -1), precision: str = "ieee", torch_precision: str = "ieee", asked: str = "auto",
) -> Strategy:  # fmt: skip
    """The strategy of a convolution.

    Args:
        positions: B H' W' of one group of the pass, never of the stacked batch.
        shape: of the weight, [O, I / groups, R, S].
        groups: of the convolution.
        x_dtype: of the product.
        noise, arch, asked: as in :func:`choose`.
        signs: of the pass. A pass of (0,) takes slabs where others do, so that eps = 0 gives its bits.
        precision, torch_precision: of fp32 products that were asked for, and that torch's convolution can give.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: a strategy that was asked for by name and cannot be taken, with every reason.
    """
    check_name(asked)
    if asked == "two_products":
        raise NotImplementedError("strategy 'two_products': linear layers alone have a kernel of two products")
    if asked == "specialized":
        raise NotImplementedError("strategy 'specialized': linear layers alone have a kernel of specialised warps")
    no_slab = slab_faults(False, precision, torch_precision)
    if asked == "slab" and no_slab:
        raise NotImplementedError("strategy 'slab': " + "; ".join(no_slab))
    outputs, channels, *kernel = shape
    taps = math.prod(kernel)
    held = conv_slab_plan(outputs, channels * taps, groups, x_dtype.itemsize).bytes_of(len(signs))
    if asked == "slab":
        return Strategy("slab", held, _ASKED)
    if asked == "fused":
        return Strategy("fused", reason=_ASKED)
    if arch == 0:
        return Strategy("fused", reason=_CPU)
    # what the fused kernel multiplies: its tiles have 16 outputs of a conv group and 4 channels of a tap at least
    products = positions * groups * max(outputs // groups, 16) * taps * max(channels, 4)
    least = _known(_table()["conv_slab_products"], arch)[KINDS.get(noise, "plain")]
    if no_slab or products < least:
        why = [f"no slab: {fault}" for fault in no_slab] or [f"{products:.1e} products a sign, fewer than {least:.1e}"]
        return Strategy("fused", reason="; ".join(why))
    return Strategy("slab", held, f"{products:.1e} products a sign, at least {least:.1e}")


def check_name(asked: str) -> None:
    """ValueError unless ``asked`` is one of :data:`STRATEGIES`."""
    if asked not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {asked!r}")


def _known(table: list[dict], arch: int) -> dict:
    """The row of a GPU; one that the table has never seen is taken for the newest that is older, or for the oldest."""
    return max((row for row in table if row["arch"] <= arch), key=lambda row: row["arch"], default=table[0])

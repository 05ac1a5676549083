"""Perturbed linear at many rows, the strategy ``slab``: W + eps z and W - eps z of some outputs in memory, then plain matmuls.

    room[i] = W[slab] + sign_i eps z_q[slab]         fp32, rounded once to x's dtype
    y_i[:, slab] = x_i room[i]^T + b_i[slab]

| tensor | shape |
|---|---|
| room | [2, rows of a slab, K], reused by every slab and query |
| x, y | [groups, B, K], [groups, B, N] |

z is made once for both signs. Every matmul is a batch of two of the same shape: both signs of a slab or, in a pass of one sign,
two neighbouring slabs. A library that chooses its algorithm by shape and batch then takes the same one for a pair, for one
sign alone and for any number of queries.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

from ._tiles import SLAB_ROWS, slab_bytes, slab_plan


def _parts(flat: torch.Tensor, *shape: int) -> torch.Tensor:
    """[2, *shape] at the start of ``flat``, the second part at a multiple of 64 bytes: both must look alike to a matmul."""
    line = 64 // flat.element_size()
    size = shape[0] * shape[1]
    step = -(-size // line) * line
    return flat[: 2 * step].view(2, step)[:, :size].view(2, *shape)


def reserve(x: torch.Tensor, op: str, make, least: int):
    """Slabs and the memory for one of them, in x's dtype and on its device.

    Out of memory, slabs get smaller, with a warning.

    Args:
        op: name of the operator, for the warning.
        make: ``make(most)``: slabs of at most so many outputs (None: as many as :data:`SLAB_BYTES` hold), the outputs of the
            largest, and the bytes of its copies.
        least: slabs of so many outputs are the smallest; without memory for them it raises.
    """
    plan, rows, held = make(None)
    while True:
        try:
            return plan, x.new_empty(held // x.element_size())
        except torch.OutOfMemoryError:
            if rows <= least:
                raise
            before = f"{held} bytes ({rows} outputs)"
            plan, rows, held = make(max(rows // 2, least))
        warnings.warn(
            f"{op}: no memory for a slab of {before}: {rows} outputs are tried. The last bits of a sum may depend on it, so a "
            "sign made alone may differ from one made before",
            RuntimeWarning,
            stacklevel=3,
        )


def allocate(x: torch.Tensor, n: int, k: int) -> tuple[tuple[tuple[int, int, int], ...], torch.Tensor]:
    """The slabs (:func:`slab_plan`) of a weight [n, k] and the memory for one of them; see :func:`reserve`."""
    size = x.element_size()

    def make(most: int | None):
        plan = slab_plan(n, k, size, most)
        return plan, max(rows for _, rows, _ in plan), slab_bytes(plan, k, size)

    return reserve(x, "perturbed_linear", make, SLAB_ROWS)


def multiply(x, w, b, out, queries, signs, fill, product) -> None:
    """Write ``out``.

    Args:
        x: [groups, B, K], or [1, B, K] for all groups; rows of a group contiguous, groups anywhere.
        w: [N, K].
        b: perturbed biases [groups, N] in x's dtype, or None.
        out: contiguous [groups * B, ..., N].
        queries, signs: as in :class:`Perturbation`; one sign or the pair.
        fill: ``fill(room, w, first, q)`` writes the perturbed copies of rows ``first`` and on of the weight, given as ``w``,
            for each sign of query q of this pass.
        product: ``product(x, room, b, y)``, y[i] = x[i] room[i]^T + b[i] for i in (0, 1).
    """
    n, k = w.shape
    groups = queries * len(signs)
    rows = out.numel() // (n * groups)
    x = x.expand(groups, rows, k)
    y = out.view(groups, rows, n)
    plan, memory = allocate(x, n, k)
    for first, height, count in plan:
        room, last = _parts(memory, height, k), first + height
        for q in range(queries):
            if len(signs) == 2:
                pair = slice(2 * q, 2 * q + 2)
                for at in range(first, first + count * height, height):
                    own = slice(at, at + height)
                    fill(room, w[own], at, q)
                    product(x[pair], room, None if b is None else b[pair, own], y[pair, :, own])
                continue
            both, own = x[q].expand(2, rows, k), slice(first, first + count * height)
            for i, at in enumerate(range(own.start, own.stop, height)):
                fill(room[i : i + 1], w[at : at + height], at, q)
            if count == 1:  # an odd output is left: it goes through the batch of two, twice
                room, to = room[:1].expand(2, height, k), y.new_empty(2, rows, height)
            else:
                to = y[q, :, own].unflatten(1, (2, height)).transpose(0, 1)
            product(both, room, None if b is None else b[q, own].expand(2 // count, -1).reshape(2, height), to)
            if count == 1:
                y[q, :, first:last] = to[0]


def batched(x, room, b, y) -> None:
    """One strided-batched matmul."""
    if b is None:
        torch.bmm(x, room.mT, out=y)
    else:
        torch.baddbmm(b[:, None], x, room.mT, out=y)


def one_by_one(x, room, b, y) -> None:
    """The same on a CPU, where bits depend on the strides and addresses of y, and on the batch: two results of their own."""
    for i in (0, 1):
        y[i].copy_(F.linear(x[i], room[i], None if b is None else b[i]))


def stacked(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of [groups, B, K] whose groups all begin at multiples of 64 bytes."""
    groups, rows, k = x.shape
    line = 64 // x.element_size()
    whole = x.new_empty(groups, -(-rows * k // line) * line)[:, : rows * k]
    return whole.view(x.shape).copy_(x)

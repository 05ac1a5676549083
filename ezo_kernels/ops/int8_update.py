"""The integer update of the trunk, in place, from ternary g and z made again; the head's is in :mod:`.int8_head`.

    w <- clamp(w - round(sum_q g_q z_q / 2^shift), -127, 127)          g_q in {-1, 0, 1}

| tensor | shape |
|---|---|
| params | list of int8, any shapes |
| g | int32 [queries], on the device |
| shift | int32 [1], on the device |
| step | int64 [1], one more: an update counts the step whose last launch it is; or nothing |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _cpu
from ._layout import LAYOUTS, default_layout, grid, pointer
from ._library import register
from ._perturbation import check_devices
from .int8_pass import ROUNDINGS, check_rounding
from .int8_pointwise import rounding_lanes
from .noise import Noise, check_index, filler_cpu, row_ids

#: Widths of an update, in bits.
LEAST_BITS, MOST_BITS = -8, 7


def check_bits(bits, name: str) -> int:
    """``bits`` as an int in [-8, 7], or TypeError / ValueError."""
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{name} must be an int, got {type(bits).__name__}")
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"{name} must be in [{LEAST_BITS}, {MOST_BITS}], got {bits}")
    return bits


def update_shift(bits: int, r_max: int) -> int:
    """How far a sum of g z is shifted so that one z of largest magnitude leaves ``bits`` bits."""
    return max(0, r_max.bit_length() - bits)


@dataclass(frozen=True)
class Int8UpdatePlan:
    """Where the parameters of an update lie: built once, valid while :meth:`fits`. On CUDA ``table`` holds addresses."""

    sites: tuple[int, ...]
    layouts: tuple[str, ...]
    addresses: tuple[tuple[int, ...], ...]
    table: torch.Tensor

    @staticmethod
    def _address(p: torch.Tensor) -> tuple[int, ...]:
        return (pointer(p) if p.is_cuda else 0, *p.shape, *p.stride())

    @classmethod
    def build(cls, params, sites, layouts) -> Int8UpdatePlan:
        """The plan of these parameters.

        Raises:
            TypeError: a parameter that is not int8. ValueError: lengths, devices, an unknown layout.
        """
        if not len(params) == len(sites) == len(layouts):
            raise ValueError(f"int8_update_: {len(params)} params, {len(sites)} sites and {len(layouts)} layouts")
        segment = Noise("sparse_int8").segment
        for w, layout in zip(params, layouts, strict=True):
            if w.dtype != torch.int8:
                raise TypeError(f"int8_update_ takes int8, got {w.dtype}")
            if w.device != params[0].device:
                raise ValueError(f"int8_update_: parameters on {w.device} and on {params[0].device}")
            if not w.is_contiguous():
                raise ValueError(f"int8_update_: a parameter of shape {tuple(w.shape)} is not contiguous")
            grid(w.shape, layout, segment)
        sites = [check_index(s, "site", 1 << 32) for s in sites]
        table = torch.empty(0, dtype=torch.int64)
        if params and params[0].is_cuda:
            from ._int8_update_triton import update_table

            table = update_table(params, sites, layouts)
        return cls(tuple(sites), tuple(layouts), tuple(map(cls._address, params)), table)

    def fits(self, params) -> bool:
        """Whether the parameters are still where the plan says."""
        return self.addresses == tuple(map(self._address, params))


def _update_cpu(params, key, g, shift, table, sites, layouts, query, rounding, rounds, p_zero, r_max, step) -> None:
    import numpy as np

    K = _cpu.integers()

    if step is not None:
        step += 1
    noise, mode, n = Noise("sparse_int8", rounds, p_zero, r_max), ROUNDINGS.index(rounding), int(shift)
    signs = g.tolist()
    if not any(signs):  # g of zero leaves every bit alone
        return
    for w, site, conv in zip(params, sites, layouts, strict=True):
        if not w.numel():
            continue
        where = grid(w.shape, LAYOUTS[conv], noise.segment)
        total = np.zeros((where.rows, where.columns), np.int32)
        make = filler_cpu(key, site, where.columns, noise, row_ids(where.rows))
        for q, sign in enumerate(signs):
            if sign:
                K.accumulate(total, make(query + q), sign)
        lanes = np.empty((0, 0), np.uint16)
        if rounding == "stochastic":
            lanes = rounding_lanes(key, site, where.rows, where.columns, 0, rounds)
        K.update(w.detach().view(-1).numpy(), where.taps, total, n, mode, lanes)
        torch.autograd.graph.increment_version(w)  # numba wrote it behind torch's back


def _update_cuda(params, *args) -> None:
    from ._int8_update_triton import launch_update

    launch_update(params, *args)
    torch.autograd.graph.increment_version(params)  # a kernel wrote them behind torch's back


_update = register(
    "int8_update_",
    "(Tensor(a!)[] params, Tensor key, Tensor g, Tensor shift, Tensor table, int[] sites, int[] layouts, int query, "
    "str rounding, int rounds, float p_zero, int r_max, Tensor(b!)? step) -> ()",
    cpu=_update_cpu,
    cuda=_update_cuda,
)


@torch.no_grad()
def int8_update_(
    params: list[torch.Tensor],
    key: torch.Tensor,
    g: torch.Tensor,
    shift: torch.Tensor,
    *,
    sites: list[int],
    layouts: list[str] | None = None,
    noise: Noise | None = None,
    query: int = 0,
    rounding: str = "stochastic",
    plan: Int8UpdatePlan | None = None,
    step: torch.Tensor | None = None,
) -> None:
    """Subtract ``round(sum_q g[q] z_q / 2^shift)`` from every parameter, clamped, in one launch.

    Args:
        params: int8 tensors of one device, contiguous.
        key: int32[2], of the step whose forward perturbed them.
        g: int32 [queries], each -1, 0 or 1, on the device.
        shift: int32 [1], 0 to 31, on the device (:func:`update_shift`).
        sites, layouts: of each.
        noise: that of the forward.
        query: first direction of ``g``.
        rounding: ``nearest``, ``pseudo`` or ``stochastic`` (stream 4 at the parameter's site).
        plan: of these parameters, to spare building it.
        step: int64 [1], which counts one more, whatever g is, in the same launch.

    Raises:
        TypeError: dtypes. ValueError: lengths, devices, an unknown name, a plan of other tensors.
    """
    noise = noise or Noise("sparse_int8")
    if noise.name != "sparse_int8":
        raise ValueError(f"int8_update_ takes noise 'sparse_int8', got {noise.name!r}")
    if step is not None and (step.dtype != torch.int64 or step.shape != (1,)):
        raise TypeError(f"int8_update_: step must be int64 [1], got {step.dtype} {tuple(step.shape)}")
    if g.dtype != torch.int32 or shift.dtype != torch.int32 or key.dtype != torch.int32:
        raise TypeError(f"int8_update_: key, g and shift must be int32, got {key.dtype}, {g.dtype}, {shift.dtype}")
    if g.dim() != 1 or not g.numel() or shift.numel() != 1 or key.shape != (2,):
        raise ValueError(f"int8_update_: g must be [queries] and shift [1], got {tuple(g.shape)}, {tuple(shift.shape)}")
    check_rounding(rounding)
    check_index(query, "query", (1 << 24) - g.numel() + 1)
    layouts = [default_layout(w.shape) for w in params] if layouts is None else layouts
    if plan is None:
        plan = Int8UpdatePlan.build(params, sites, layouts)
    elif not (plan.fits(params) and plan.sites == tuple(sites) and plan.layouts == tuple(layouts)):
        raise ValueError("int8_update_: the plan was built for other tensors; build it again after moving a parameter")
    if params:
        check_devices("int8_update_", params[0], key, g, shift, step)
        _update(
            params, key, g, shift, plan.table, list(plan.sites), [LAYOUTS.index(n) for n in layouts], query, rounding,
            noise.rounds, noise.p_zero, noise.r_max, step,
        )  # fmt: skip
    elif step is not None:
        step += 1

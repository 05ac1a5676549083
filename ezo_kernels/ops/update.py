"""The update, in place: w <- w - coef_0 z_0 - coef_1 z_1 - ..., z made again; one launch over all parameters.

| tensor | shape |
|---|---|
| params | list of any shapes, fp32, fp16 or bf16 |
| coef | fp32 [queries], on the device: lr * g_q / queries, zero on a step that is skipped |

Arithmetic is fp32, each product rounded, one rounding to the weight's dtype at the end: to nearest for fp32, stochastic
(stream 4 of the noise contract) for 16-bit weights, where an update is smaller than half an ulp more often than not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _constants as C
from . import _cpu
from ._layout import LAYOUTS, default_layout, grid
from ._library import register
from ._perturbation import FLOATS
from .noise import Noise, check_index, key_words, row_ids, shift_cpu

_GAUSSIAN = Noise()


@dataclass(frozen=True)
class UpdatePlan:
    """Where the parameters of an update lie: built once, valid while :meth:`fits`.

    On CUDA ``table`` holds addresses, so a parameter that was moved or rebound needs a new plan.
    """

    sites: tuple[int, ...]
    layouts: tuple[str, ...]
    addresses: tuple[tuple[int, ...], ...]
    table: torch.Tensor

    @staticmethod
    def _address(p: torch.Tensor) -> tuple[int, ...]:
        return (p.data_ptr() if p.is_cuda else 0, *p.shape, *p.stride())

    @classmethod
    def build(cls, params, sites, layouts, noise: Noise) -> UpdatePlan:
        """The plan of these parameters; raises as :func:`update_` does, and spares its later calls the checks."""
        if noise.name == "sparse_int8":
            raise NotImplementedError("sparse_int8 is noise of integer layers: use 'sparse' for float weights")
        if not len(params) == len(sites) == len(layouts):
            raise ValueError(f"update_: {len(params)} params, {len(sites)} sites and {len(layouts)} layouts")
        for w, layout in zip(params, layouts, strict=True):
            if w.dtype not in FLOATS:
                raise TypeError(f"update_ takes float32, float16 or bfloat16, got {w.dtype}")
            if w.device != params[0].device:
                raise ValueError(f"update_: parameters on {w.device} and on {params[0].device}")
            grid(w.shape, layout, noise.segment)  # refuses a layout before anything is written
        sites = [check_index(s, "site", 1 << 32) for s in sites]
        table = torch.empty(0, dtype=torch.int64)
        if params and params[0].is_cuda:
            from ._update_triton import update_table

            table = update_table(params, sites, layouts, noise)
        return cls(tuple(sites), tuple(layouts), tuple(map(cls._address, params)), table)

    def fits(self, params) -> bool:
        """Whether the parameters are still where the plan says."""
        return self.addresses == tuple(map(self._address, params))


def round_stochastic(v: torch.Tensor, lanes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 ``v`` rounded to a 16-bit ``dtype``, up with the probability of the discarded part.

    Args:
        v: fp32.
        lanes: int32 of v's shape, uniform in [0, 65536).
        dtype: bf16 or fp16. fp16 keeps 13 of the 16 random bits for normal numbers, all of them below 2^-14.
    """
    bits = v.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((bits + lanes) & -65536).view(torch.float32)
    else:
        normal = ((bits + (lanes >> 3)) & -8192).view(torch.float32)
        ulps = v.abs() * 2.0**24
        whole = torch.trunc(ulps)
        small = (whole + torch.trunc((ulps - whole) + lanes.float() * 2.0**-16)) * 2.0**-24
        rounded = torch.where(v.abs() < 2.0**-14, torch.copysign(small, v), normal)
    return torch.where(torch.isfinite(v), rounded, v).to(dtype)


def rounding_lanes(shape, key, site: int, where, rounds: int) -> torch.Tensor:
    """Stream 4 of one parameter as int32 of its shape."""
    import numpy as np

    N = _cpu.noises()

    k0, k1 = key_words(key)
    lanes = np.empty((where.rows, -(-where.columns // 8) * 8), np.uint16)
    N.lanes(lanes, k0, k1, np.uint32(site), np.uint32(C.STREAM_ROUNDING), row_ids(where.rows), rounds)
    return where.view(torch.from_numpy(lanes[:, : where.columns].astype(np.int32)), shape)


def _update_cpu(params, key, coef, table, sites, layouts, query, stochastic, noise, rounds, p_zero) -> None:
    spec = Noise(noise, rounds, p_zero)
    scales = coef.tolist()
    for w, site, conv in zip(params, sites, layouts, strict=True):
        layout = LAYOUTS[conv]
        if not w.numel() or not any(scales):
            continue
        acc = w.detach().float().contiguous()
        for q, scale in enumerate(scales):
            if scale == 0.0:  # a skipped step leaves every bit alone, that of -0 too
                continue
            shift_cpu([acc], acc, [-scale], key, site, query + q, spec, layout)
        if acc.data_ptr() == w.data_ptr():
            torch.autograd.graph.increment_version(w)  # numba wrote it behind autograd's back
            continue
        if stochastic and w.dtype != torch.float32:
            lanes = rounding_lanes(w.shape, key, site, grid(w.shape, layout, spec.segment), rounds)
            acc = round_stochastic(acc, lanes, w.dtype)
        w.copy_(acc)


def _update_cuda(params, key, coef, table, sites, layouts, query, stochastic, noise, rounds, p_zero) -> None:
    from ._update_triton import launch_update

    launch_update(params, key, coef, table, query, stochastic, Noise(noise, rounds, p_zero))


_update = register(
    "update_",
    "(Tensor(a!)[] params, Tensor key, Tensor coef, Tensor table, int[] sites, int[] layouts, int query, "
    "bool stochastic, str noise, int rounds, float p_zero) -> ()",
    cpu=_update_cpu,
    cuda=_update_cuda,
)


@torch.no_grad()
def update_(
    params: list[torch.Tensor],
    key: torch.Tensor,
    coef: torch.Tensor,
    *,
    sites: list[int],
    layouts: list[str] | None = None,
    noise: Noise = _GAUSSIAN,
    query: int = 0,
    stochastic_rounding: bool = True,
    plan: UpdatePlan | None = None,
) -> None:
    """Subtract ``coef[q] * z_q`` from every parameter, in place, in one launch.

    Args:
        params: tensors of one device, fp32, fp16 or bf16, any strides.
        key: int32[2], of the step whose forward perturbed them.
        coef: fp32 [queries], on the parameters' device; read there, never on the host.
        sites: id of each parameter.
        layouts: ``matrix`` or ``conv`` of each; by default by shape.
        noise: that of the forward.
        query: first direction of ``coef``.
        stochastic_rounding: of 16-bit parameters; to nearest if False.
        plan: :class:`UpdatePlan` of these parameters, to spare building it.

    Raises:
        TypeError: dtypes.
        NotImplementedError: ``sparse_int8``, or ``gaussian_fast`` on a CPU.
        ValueError: lengths, devices, an unknown layout, a plan of other tensors.
    """
    if layouts is None:
        layouts = [default_layout(w.shape) for w in params]
    if coef.dtype != torch.float32 or key.dtype != torch.int32:
        raise TypeError(f"update_: coef must be float32 and key int32, got {coef.dtype} and {key.dtype}")
    if coef.dim() != 1 or not coef.numel() or key.shape != (2,):
        raise ValueError(f"update_: coef must be [queries] and key [2], got {tuple(coef.shape)}, {tuple(key.shape)}")
    check_index(query, "query", (1 << 24) - coef.numel() + 1)
    if params and not params[0].device == coef.device == key.device:
        raise ValueError(f"update_: a parameter is on {params[0].device}, coef on {coef.device}, key on {key.device}")
    if plan is None:
        plan = UpdatePlan.build(params, sites, layouts, noise)
    elif not (plan.fits(params) and plan.sites == tuple(sites) and plan.layouts == tuple(layouts)):
        raise ValueError("update_: the plan was built for other tensors; build it again after moving a parameter")
    if not params:
        return
    _update(
        params, key, coef, plan.table, list(plan.sites), [LAYOUTS.index(name) for name in layouts], query, stochastic_rounding,
        noise.name, noise.rounds, noise.p_zero,
    )  # fmt: skip

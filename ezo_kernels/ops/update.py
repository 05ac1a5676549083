"""The update, in place: w <- w - s coef_0 z_0 - s coef_1 z_1 - ..., z made again; one launch over all parameters.

| tensor | shape |
|---|---|
| params | list of any shapes, fp32, fp16 or bf16 |
| key | int32 [2] of one step, or [steps, 2] |
| coef | fp32 [queries] or [steps, queries], on the device: lr * g_q / queries, zero on a step that is skipped |
| s | a number for each parameter, 1 unless said: how far, beside eps, the forward perturbed it |

Several steps are made in one pass over the weights, which rounds after each as a pass of its own would: a log of seeds is
replayed at the price of its noise. Arithmetic is fp32, each product rounded, one rounding to the weight's dtype at the end
of a step: to nearest for fp32, stochastic (stream 4 of the noise contract) for 16-bit weights, where an update is smaller
than half an ulp more often than not. z of a 16-bit parameter is rounded to its dtype first where the caller says that the
forward's was (``z_dtypes``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from . import _constants as C
from . import _cpu
from ._layout import LAYOUTS, default_layout, grid, pointer
from ._library import register
from ._perturbation import FLOATS
from .noise import Noise, check_index, key_words, row_ids, shifter_cpu

_GAUSSIAN = Noise()
STRATEGIES = ("triton", "cuda")
#: Noise -> dtypes whose weights a GPU was measured to update faster in CUDA C++ than in Triton. None has been measured yet: the
#: counts of docs/rng.md are too near each other to prefer a launch path that has not run.
FASTER_IN_CUDA: dict[str, frozenset[torch.dtype]] = {}


def update_strategy(noise: str, dtypes, cupy: bool) -> str:
    """The kernel that an update of CUDA tensors runs unless one is named: a pure function of what is given.

    Args:
        noise: its name.
        dtypes: of the parameters.
        cupy: whether CuPy is installed.

    Returns:
        ``cuda`` where :data:`FASTER_IN_CUDA` has the noise with all the dtypes and CuPy is installed, else ``triton``. Both
        give the same bits.
    """
    return "cuda" if cupy and set(dtypes) <= FASTER_IN_CUDA.get(noise, frozenset()) else "triton"


@dataclass(frozen=True)
class UpdatePlan:
    """Where the parameters of an update lie: built once, valid while :meth:`fits`.

    On CUDA ``table`` holds addresses, so a parameter that was moved, rebound or cast needs a new plan. ``strategy`` is the
    kernel that the table is for: ``triton`` or ``cuda``; a CPU has neither. ``rounded``: whether z of each parameter is rounded
    to its dtype; empty for none. ``scales``: of each parameter; empty for 1.
    """

    sites: tuple[int, ...]
    layouts: tuple[str, ...]
    addresses: tuple[tuple, ...]
    table: torch.Tensor
    strategy: str = "triton"
    rounded: tuple[bool, ...] = ()
    scales: tuple[float, ...] = ()

    @staticmethod
    def _address(p: torch.Tensor) -> tuple:
        return (pointer(p) if p.is_cuda else 0, p.dtype, *p.shape, *p.stride())

    @classmethod
    def build(
        cls, params, sites, layouts, noise: Noise, strategy: str | None = None, z_dtypes=None, scales=None
    ) -> UpdatePlan:  # fmt: skip
        """The plan of these parameters; raises as :func:`update_` does, and spares its later calls the checks.

        Args:
            params, sites, layouts, noise, z_dtypes, scales: as in :func:`update_`.
            strategy: ``triton`` or ``cuda``; by default :func:`update_strategy` chooses.
        """
        if strategy is not None and strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
        if strategy is not None and params and not params[0].is_cuda:
            raise NotImplementedError(f"update_: strategy {strategy!r} is a GPU's, and the parameters are on a CPU")
        if noise.name == "sparse_int8":
            raise NotImplementedError("sparse_int8 is noise of integer layers: use 'sparse' for float weights")
        if not len(params) == len(sites) == len(layouts):
            raise ValueError(f"update_: {len(params)} params, {len(sites)} sites and {len(layouts)} layouts")
        for w, layout in zip(params, layouts, strict=True):
            if w.dtype not in FLOATS:
                raise TypeError(f"update_ takes float32, float16 or bfloat16, got {w.dtype}")
            if any(n > 1 and s == 0 for n, s in zip(w.shape, w.stride(), strict=True)):
                raise ValueError(f"update_: a parameter {tuple(w.shape)} is expanded: its elements share their memory")
            if w.device != params[0].device:
                raise ValueError(f"update_: parameters on {w.device} and on {params[0].device}")
            grid(w.shape, layout, noise.segment)  # refuses a layout before anything is written
        rounded, scales = _rounded(params, z_dtypes), check_scales(scales, len(params))
        sites = [check_index(s, "site", 1 << 32) for s in sites]
        table = torch.empty(0, dtype=torch.int64)
        if params and params[0].is_cuda:
            from . import _cuda
            from ._update_triton import update_table

            strategy = strategy or update_strategy(noise.name, {w.dtype for w in params}, _cuda.available())
            if strategy == "cuda":
                _cuda.require()
            tile = _cuda.TILE if strategy == "cuda" else None
            table = update_table(params, sites, layouts, noise, tile, rounded, scales)
        where = tuple(map(cls._address, params))
        return cls(tuple(sites), tuple(layouts), where, table, strategy or "triton", rounded, scales)

    def fits(self, params) -> bool:
        """Whether the parameters are still where the plan says, and what."""
        return self.addresses == tuple(map(self._address, params))


#: The normal numbers of fp32, in which scales and what they multiply are held.
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_scale(value: float, what: str) -> None:
    """Refuse what fp32 holds as zero, a subnormal or infinity.

    Raises:
        ValueError: naming ``what`` and the value.
    """
    if not _LEAST <= value <= _MOST:
        raise ValueError(f"{what} must be above 0 and in the range of fp32, got {value}")


def check_scales(scales, count: int) -> tuple[float, ...]:
    """One scale for each of ``count`` parameters, above 0 and in the range of fp32; ValueError otherwise."""
    if scales is None:
        return (1.0,) * count
    if len(scales) != count:
        raise ValueError(f"update_: {count} params and {len(scales)} scales")
    for s in scales:
        if isinstance(s, bool) or not isinstance(s, (int, float)):
            raise TypeError(f"update_: a scale must be a number, got {type(s).__name__}")
        check_scale(s, "update_: a scale")
    return tuple(map(float, scales))


def _rounded(params, z_dtypes) -> tuple[bool, ...]:
    """Whether z of each parameter is rounded to its dtype."""
    if z_dtypes is None:
        return (False,) * len(params)
    if len(z_dtypes) != len(params):
        raise ValueError(f"update_: {len(params)} params and {len(z_dtypes)} z_dtypes")
    for w, name in zip(params, z_dtypes, strict=True):
        if name != "float32" and name != str(w.dtype).removeprefix("torch."):
            raise TypeError(f"update_: z_dtypes of a {w.dtype} parameter is 'float32' or its own 16 bits, got {name!r}")
    return tuple(name != "float32" for name in z_dtypes)


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
    N = _cpu.noises()

    k0, k1 = key_words(key)
    lanes = np.empty((where.rows, -(-where.columns // 8) * 8), np.uint16)
    N.lanes(lanes, k0, k1, np.uint32(site), np.uint32(C.STREAM_ROUNDING), row_ids(where.rows), rounds)
    return where.view(torch.from_numpy(lanes[:, : where.columns].astype(np.int32)), shape)


def _update_cpu(
    params, keys, coef, table, sites, layouts, rounded, scales, query, stochastic, noise, rounds, p_zero,
    strategy="triton",
) -> None:  # fmt: skip
    spec = Noise(noise, rounds, p_zero)
    coef, keys = coef.detach().numpy(), keys.unbind()
    by_factor = {}
    for factor in set(scales):
        of_step = zip(keys, (coef * np.float32(factor)).tolist(), strict=True)
        # a skipped step leaves every bit alone, that of -0 too
        by_factor[factor] = [(key, coefs) for key, coefs in of_step if any(coefs)]
    for w, site, conv, rounds_z, factor in zip(params, sites, layouts, rounded, scales, strict=True):
        layout, z_dtype = LAYOUTS[conv], str(w.dtype).removeprefix("torch.") if rounds_z else "float32"
        steps = by_factor[factor]
        if not w.numel() or not steps:
            continue
        acc = w.detach().float().contiguous()
        own = acc.data_ptr() == w.data_ptr()
        for key, coefs in steps:
            shift = shifter_cpu(acc, key, site, spec, layout, z_dtype)
            for q, one in enumerate(coefs):
                if one != 0.0:
                    shift([acc], [-one], query + q)
            if w.dtype != torch.float32:
                if stochastic:
                    lanes = rounding_lanes(w.shape, key, site, grid(w.shape, layout, spec.segment), rounds)
                    acc = round_stochastic(acc, lanes, w.dtype)
                acc = acc.to(w.dtype).float()
        if own:
            torch.autograd.graph.increment_version(w)  # numba wrote it behind autograd's back
        else:
            w.copy_(acc)


def _update_cuda(
    params, keys, coef, table, sites, layouts, rounded, scales, query, stochastic, noise, rounds, p_zero,
    strategy="triton",
) -> None:  # fmt: skip
    if strategy == "cuda":
        from ._cuda import launch_update
    else:
        from ._update_triton import launch_update

    keys, coef = keys.contiguous(), coef.contiguous()
    launch_update(params, keys, coef, table, rounded, query, stochastic, Noise(noise, rounds, p_zero))
    torch.autograd.graph.increment_version(params)  # a kernel wrote them behind autograd's back


_update = register(
    "update_",
    "(Tensor(a!)[] params, Tensor key, Tensor coef, Tensor table, int[] sites, int[] layouts, "
    "bool[] rounded, float[] scales, int query, bool stochastic, str noise, int rounds, float p_zero, "
    "str strategy='triton') -> ()",
    cpu=_update_cpu,
    cuda=_update_cuda,
)


def shared(w) -> torch.Tensor:
    """``w``, or a tensor over the memory of an array that speaks DLPack."""
    if isinstance(w, torch.Tensor):
        return w
    if not hasattr(w, "__dlpack__"):
        raise TypeError(f"update_ takes tensors or arrays with __dlpack__, got {type(w).__name__}")
    if w.__dlpack_device__()[0] == 1:  # a CPU: without a version, one that is read-only refuses
        return torch.from_dlpack(w.__dlpack__())
    return torch.from_dlpack(w)


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
    strategy: str | None = None,
    z_dtypes: list[str] | None = None,
    scales: list[float] | None = None,
) -> None:
    """Subtract ``scale * coef[q] * z_q`` from every parameter, in place, in one launch.

    Args:
        params: tensors of one device, fp32, fp16 or bf16, any strides; also arrays of CuPy, NumPy and others that share
            their memory by DLPack.
        key: int32 [2], of the step whose forward perturbed them; or [steps, 2], of steps made one after the other.
        coef: fp32 [queries], or [steps, queries] with as many keys; on the parameters' device; read there, never on the
            host. The weights are read and written once, with the bits of one call a step.
        sites: id of each parameter.
        layouts: ``matrix`` or ``conv`` of each; by default by shape.
        noise: that of the forward.
        query: first direction of ``coef``.
        stochastic_rounding: of 16-bit parameters; to nearest if False.
        plan: :class:`UpdatePlan` of these parameters, to spare building it; it has the strategy and the dtypes of z.
        strategy: ``triton`` or ``cuda`` (CUDA C++ through CuPy); by default :func:`update_strategy` chooses.
        z_dtypes: what the forward rounded z of each parameter to: ``float32``, or the parameter's own 16-bit dtype (its
            name), as ``z_dtype`` of :func:`ezo_kernels.ops.perturbed_linear`; by default ``float32`` for all.
        scales: factor of each parameter's coefficients, above 0, in the range of fp32: that by which the forward's eps was
            multiplied for it. The product is rounded to fp32 before it meets z. By default 1.

    Raises:
        TypeError: dtypes, of z too, or a parameter that is neither a tensor nor shares its memory.
        NotImplementedError: ``sparse_int8``, ``gaussian_fast`` on a CPU, or a strategy on a CPU.
        ImportError: ``cuda`` without CuPy.
        ValueError: lengths, devices, an unknown layout or strategy, a plan of other tensors.
    """
    params = [shared(w) for w in params]
    if layouts is None:
        layouts = [default_layout(w.shape) for w in params]
    if coef.dtype != torch.float32 or key.dtype != torch.int32:
        raise TypeError(f"update_: coef must be float32 and key int32, got {coef.dtype} and {key.dtype}")
    if coef.dim() not in (1, 2) or not coef.numel() or key.shape != (*coef.shape[:-1], 2):
        raise ValueError(
            f"update_: coef must be [queries] and key [2], or [steps, queries] and [steps, 2], got "
            f"{tuple(coef.shape)}, {tuple(key.shape)}"
        )
    check_index(query, "query", (1 << 24) - coef.shape[-1] + 1)
    if params and not params[0].device == coef.device == key.device:
        raise ValueError(f"update_: a parameter is on {params[0].device}, coef on {coef.device}, key on {key.device}")
    if plan is None:
        plan = UpdatePlan.build(params, sites, layouts, noise, strategy, z_dtypes, scales)
    elif strategy not in (None, plan.strategy):
        raise ValueError(f"update_: the plan was built for strategy {plan.strategy!r}, not {strategy!r}")
    elif not (plan.fits(params) and plan.sites == tuple(sites) and plan.layouts == tuple(layouts)):
        raise ValueError("update_: the plan was built for other tensors; build it again after moving a parameter")
    elif z_dtypes is not None and _rounded(params, z_dtypes) != (plan.rounded or (False,) * len(params)):
        raise ValueError("update_: the plan was built for other dtypes of z")
    elif scales is not None and check_scales(scales, len(params)) != (plan.scales or (1.0,) * len(params)):
        raise ValueError("update_: the plan was built for other scales")
    if not params:
        return
    _update(
        params, key.view(-1, 2), coef.view(-1, coef.shape[-1]), plan.table, list(plan.sites),
        [LAYOUTS.index(name) for name in layouts], list(plan.rounded or (False,) * len(params)),
        list(plan.scales or (1.0,) * len(params)), query, stochastic_rounding,
        noise.name, noise.rounds, noise.p_zero, plan.strategy,
    )  # fmt: skip

"""What every perturbed operator is told about the noise, and the checks they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .noise import Noise, check_index

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_directions(p) -> None:
    """The signs, queries and first query of a pass, or ValueError."""
    if tuple(p.signs) not in ((1, -1), (1,), (-1,), (0,)):
        raise ValueError(f"signs must be (1, -1), (1,), (-1,) or (0,), got {tuple(p.signs)}")
    if isinstance(p.queries, bool) or not isinstance(p.queries, int):
        raise TypeError(f"queries must be an int, got {type(p.queries).__name__}")
    if p.queries < 1:
        raise ValueError(f"queries must be at least 1, got {p.queries}")
    check_index(p.query, "query", (1 << 24) - p.queries + 1)


def scale_of(eps: torch.Tensor) -> float:
    """eps of a pass on the CPU, where looking at it costs nothing."""
    scale = eps.item()
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {scale}")
    return scale


@dataclass(frozen=True)
class Perturbation:
    """One pass: which directions, which signs, how far.

    The groups of a pass are ``queries`` directions by the signs given, stacked group-major: (q0, +), (q0, -), (q1, +), ...

    Args:
        key: int32[2], the folded key of (seed, step); :func:`ezo_kernels.ops.noise.fold_key`.
        eps: float32[1], perturbation scale, on the device; finite and at least 0. An operator on the CPU refuses another; on
            CUDA nothing waits to look at it.
        noise: :class:`Noise`.
        query: first direction, [0, 2^24).
        queries: how many directions.
        signs: ``(1, -1)`` for the pair, or one of ``(1,)``, ``(-1,)``, ``(0,)``.
    """

    key: torch.Tensor
    eps: torch.Tensor
    noise: Noise = field(
        default_factory=lambda: Noise()
    )  # torch.compile takes in neither an instance nor the class here
    query: int = 0
    queries: int = 1
    signs: tuple[int, ...] = (1, -1)

    def __post_init__(self) -> None:
        for name, kind in (("key", torch.Tensor), ("eps", torch.Tensor), ("noise", Noise)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(getattr(self, name)).__name__}")
        if self.key.dtype != torch.int32:
            raise TypeError(f"key must be int32, got {self.key.dtype}")
        if self.eps.dtype != torch.float32:
            raise TypeError(f"eps must be float32, got {self.eps.dtype}")
        if self.key.shape != (2,) or self.eps.shape != (1,):
            raise ValueError(f"key must be [2] and eps [1], got {tuple(self.key.shape)} and {tuple(self.eps.shape)}")
        if self.noise.name == "sparse_int8":
            raise NotImplementedError("sparse_int8 is noise of integer layers: use 'sparse' for float weights")
        check_directions(self)

    @property
    def groups(self) -> int:
        return self.queries * len(self.signs)

    def schema_args(self):
        """The arguments that every operator's schema ends with."""
        n = self.noise
        return self.query, self.queries, list(self.signs), n.name, n.rounds, n.p_zero


#: The end of every perturbed operator's schema, filled by :meth:`Perturbation.schema_args`.
SCHEMA = "int query, int queries, int[] signs, str noise, int rounds, float p_zero"


def check_devices(name: str, x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Refuse arguments that lie elsewhere than ``x``, unless that is a trial's, which has no memory.

    Raises:
        ValueError: naming both devices.
    """
    device = x.device
    for t in others:
        if t is not None and t.device != device and device.type != "meta":
            raise ValueError(f"{name}: one argument is on {device} but another on {t.device}")


class PassError(ValueError):
    """A layer cannot take part in a pass; ``site`` tells its caller which layer."""

    def __init__(self, message: str, site: int | None = None) -> None:
        super().__init__(message)
        self.site = site


class NotStackedError(PassError):
    """The groups of the pass do not lie along the first dimension: the model may still run one group at a time."""


def check_order(x: torch.Tensor, name: str, site: int) -> None:
    """Refuse an input that autograd would have to go back through."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise PassError(
            f"{name}: x requires grad, so a layer trained by backpropagation ran before this zeroth-order one (give every "
            "layer from that one on to the head), or the batch itself requires grad (detach it)",
            site,
        )


def compute_dtype(x: torch.Tensor, weight: torch.Tensor, name: str) -> torch.dtype:
    """The dtype of x after autocast, which is the dtype of the product; checks the pair of dtypes."""
    dtype = x.dtype
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and dtype in FLOATS:
        dtype = torch.get_autocast_dtype(x.device.type)
    if dtype not in FLOATS or weight.dtype not in FLOATS:
        raise TypeError(f"{name} takes float32, float16 or bfloat16, got x {x.dtype} and weight {weight.dtype}")
    if weight.dtype not in (dtype, torch.float32):
        raise TypeError(f"{name}: weight {weight.dtype} goes with x of the same dtype, got x {dtype}")
    return dtype


def check_pass(x: torch.Tensor, tensors, p: Perturbation, rows: int, shared: bool, name: str, site: int) -> int:
    """Rows per group of a pass over ``x`` with ``rows`` in its first dimension; checks devices, groups and autograd."""
    for t in (*tensors, p.key, p.eps):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: x is on {x.device} but a weight, the key or eps is on {t.device}")
    for t in tensors:
        if t is not None and t.dtype not in FLOATS:
            raise TypeError(f"{name}: weight and bias must be float32, float16 or bfloat16, got {t.dtype}")
    check_order(x, name, site)
    if shared or p.groups == 1:
        return rows
    if rows % p.groups:
        raise NotStackedError(
            f"{name}: x {tuple(x.shape)} has {rows} rows in its first dimension, no multiple of the {p.groups} groups of "
            f"this pass ({p.queries} queries, signs {p.signs}); stack the groups along dimension 0, or run them one by one "
            "(mode='sequential')",
            site,
        )
    return rows // p.groups


#: Where a group's rows begin: MKL's bits depend on an address by 64 bytes, and cuBLAS chooses a kernel by up to 256.
_BOUNDARY = {"cpu": 64, "cuda": 256}


def aligned(part: torch.Tensor) -> torch.Tensor:
    """``part`` at a boundary of its storage, densely strided: a library's bits depend on both, and groups must not."""
    if torch.compiler.is_compiling():  # a trace cannot ask where memory lies
        return part.clone()
    dense = part.is_contiguous() or (part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last))
    apart = part.storage_offset() * part.element_size() % _BOUNDARY.get(part.device.type, 256)
    return part if dense and not apart else part.clone()


def group_slices(x: torch.Tensor, groups: int, shared: bool):
    """x of each group, in order; on the CPU only, for it looks at the address of memory that came from elsewhere."""
    parts = [x] if shared else x.chunk(groups)
    parts = [part.clone() for part in parts] if x.data_ptr() % 64 else [aligned(part) for part in parts]
    return parts * groups if shared else parts

"""Noise by name: z = f(seed, step, query, site, row, column, noise), and of nothing else (docs/rng.md).

:func:`materialize` makes z in memory, for inspection and tests; training never does. :class:`Noise` is the name with its
parameters that every other op takes.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass

import numpy as np
import torch

from . import _constants as C
from . import _cpu
from ._layout import default_layout, grid
from ._library import register

#: name -> (columns that one Philox block makes, columns that are made together)
NOISES: dict[str, tuple[int, int]] = {
    "gaussian": (4, 4),
    "gaussian_fast": (4, 4),
    "clt4": (4, 4),
    "uniform": (4, 4),
    "hadamard": (16, 32),
    "rademacher": (128, 128),
    "sparse": (8, 8),
    "sparse_int8": (4, 4),
}
_STREAM = {
    "gaussian": C.STREAM_GAUSSIAN,
    "gaussian_fast": C.STREAM_GAUSSIAN,
    "clt4": C.STREAM_CLT4,
    "uniform": C.STREAM_UNIFORM,
    "hadamard": C.STREAM_HADAMARD,
    "rademacher": C.STREAM_RADEMACHER,
    "sparse": C.STREAM_GAUSSIAN,
    "sparse_int8": C.STREAM_SPARSE_INT8,
}


def check_rounds(rounds) -> int:
    """``rounds`` of Philox, 7 or 10, or TypeError / ValueError: kernels take any other for one of the two."""
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise TypeError(f"rounds must be an int, got {type(rounds).__name__}")
    if rounds not in C.ROUNDS:
        raise ValueError(f"rounds must be 7 or 10, got {rounds}")
    return rounds


@dataclass(frozen=True)
class Noise:
    """A distribution of z: its name and parameters.

    Args:
        name: one of :data:`NOISES`.
        rounds: Philox rounds, 7 or 10.
        p_zero: fraction of zeros of ``sparse`` and ``sparse_int8``, in [0, 1).
        r_max: largest magnitude of ``sparse_int8``, 1 to 127.
    """

    name: str = "gaussian"
    rounds: int = 7
    p_zero: float = 0.0
    r_max: int = 15

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"noise must be a name, got {type(self.name).__name__}")
        if self.name not in NOISES:
            raise ValueError(f"unknown noise {self.name!r}; there are {', '.join(sorted(NOISES))}")
        check_rounds(self.rounds)
        if not 0.0 <= self.p_zero < 1.0 or round(65536 * self.p_zero) > 65535:
            raise ValueError(f"p_zero must be in [0, 1) and at most 65535/65536, got {self.p_zero}")
        if self.p_zero and not self.name.startswith("sparse"):
            raise ValueError(f"p_zero={self.p_zero} has no meaning for noise {self.name!r}; use 'sparse'")
        if isinstance(self.r_max, bool) or not isinstance(self.r_max, int):
            raise TypeError(f"r_max must be an int, got {type(self.r_max).__name__}")
        if not 1 <= self.r_max <= 127:
            raise ValueError(f"r_max must be in 1..127, got {self.r_max}")

    @property
    def segment(self) -> int:
        return NOISES[self.name][1]

    @property
    def stream(self) -> int:
        return _STREAM[self.name]

    @property
    def threshold(self) -> int:
        """T: lanes below it are zeroed."""
        return round(65536 * self.p_zero)

    @property
    def scale(self) -> float:
        """What a kept value of ``sparse`` is multiplied by, as fp32."""
        return C.f32(math.sqrt(65536.0 / (65536 - self.threshold)))

    @property
    def portable(self) -> bool:
        """Whether the bits are the contract's on every backend with a true fma."""
        return self.name != "gaussian_fast"

    @property
    def sixteen_bits(self) -> bool:
        """Whether z is the same in 16 bits: signs are."""
        return self.name == "rademacher"


def rng_version(rounds: int = 7) -> str:
    """The contract's version string, as logs and checkpoints carry it."""
    return f"{C.RNG_VERSION}/philox4x32-{rounds}"


def philox4x32(counter, key, rounds: int = 10) -> tuple[int, int, int, int]:
    """One Philox4x32 block in Python integers (Random123): the oracle for the known answers, and the host's key fold."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * C.PHILOX_M0, c2 * C.PHILOX_M1
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + C.PHILOX_W0) & 0xFFFFFFFF, (k1 + C.PHILOX_W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def fold_key_host(seed: int, step: int) -> tuple[int, int]:
    """The key of (seed, step) in Python integers."""
    words = philox4x32(
        (step & 0xFFFFFFFF, step >> 32 & 0xFFFFFFFF, 0, C.KEY_TAG), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), 10
    )
    return words[0], words[1]


def _int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def key_tensor(seed: int, step: int, device=None) -> torch.Tensor:
    """int32[2] holding the bits of the key of (seed, step)."""
    return torch.tensor([_int32(w) for w in fold_key_host(seed, step)], dtype=torch.int32, device=device)


# ---------------------------------------------------------------------------------------------------------------- CPU


def key_words(key: torch.Tensor):
    """The two words of a key on the CPU, as numpy uint32."""
    return key.numpy().view(np.uint32)


@functools.lru_cache(maxsize=256)
def row_ids(rows: int):
    """0, 1, ... as numpy uint32: made once for the small parameters, where making it costs more than the noise."""
    return np.arange(rows, dtype=np.uint32)


@functools.lru_cache(maxsize=4096)
def _head(site: int, query: int, stream: int):
    """The counter words that a generator is called with, as numpy uint32."""
    return np.uint32(site), np.uint32(query << 8 | stream)


def filler_cpu(key: torch.Tensor, site: int, columns: int, noise: Noise, rows):
    """``make(query)``: z as a numpy array [rows, columns] in padded logical order (int8 for ``sparse_int8``, else fp32).

    ``rows`` are numpy uint32. What does not depend on the query is done here: of a bias it costs more than its noise.
    """
    N = _cpu.noises()

    if not noise.portable:
        raise NotImplementedError(f"noise {noise.name!r} exists on CUDA only: use 'gaussian' or 'clt4' on the CPU")
    k0, k1 = key_words(key)
    size, stream, rounds = (len(rows), columns), noise.stream, noise.rounds
    integer = noise.name == "sparse_int8"
    generate = None if integer else N.GENERATORS["gaussian" if noise.name == "sparse" else noise.name]

    def make(query: int):
        c0, c2 = _head(site, query, stream)
        out = np.empty(size, np.int8 if integer else np.float32)
        if integer:
            N.sparse_int8(out, k0, k1, c0, c2, rows, rounds, noise.threshold, noise.r_max)
            return out
        generate(out, k0, k1, c0, c2, rows, rounds)
        if noise.name == "sparse":
            c2 = _head(site, query, C.STREAM_MASK)[1]
            N.mask_(out, k0, k1, c0, c2, rows, rounds, noise.threshold, np.float32(noise.scale))
        return out

    return make


def fill_cpu(key: torch.Tensor, site: int, query: int, columns: int, noise: Noise, rows):
    """:func:`filler_cpu` of one query."""
    return filler_cpu(key, site, columns, noise, rows)(query)


def z_cpu(shape, key, site: int, query: int, noise: Noise, layout: str) -> torch.Tensor:
    """z of one parameter in its own shape (a view where the layout allows it)."""
    where = grid(shape, layout, noise.segment)
    z = fill_cpu(key, site, query, where.columns, noise, row_ids(where.rows))
    return where.view(torch.from_numpy(z), shape)


def shifter_cpu(
    w: torch.Tensor, key, site: int, noise: Noise, layout: str, z_dtype: str = "float32", first_row: int = 0
):  # fmt: skip
    """``shift(outs, scales, query)``: outs[i] = w + scales[i] * z, z made once and rounded to ``z_dtype``.

    All are fp32 and contiguous, an ``out`` may be ``w``; scales are Python floats. ``w`` is the rows from ``first_row`` on of
    its parameter.
    """
    N = _cpu.noises()

    where = grid(w.shape, layout, noise.segment)
    rows = row_ids(where.rows)
    make = filler_cpu(key, site, where.columns, noise, rows + N.u32(first_row) if first_row else rows)
    source, rounded = where.array(w), None if z_dtype == "float32" else getattr(torch, z_dtype)

    def shift(outs, scales, query: int) -> None:
        z = make(query)
        if rounded is not None:
            z = torch.from_numpy(z).to(rounded).float().numpy()
        for out, scale in zip(outs, scales, strict=True):
            N.add_scaled(source if out is w else where.array(out), source, z, N.f32(scale))

    return shift


def _noise_cpu(out, key, site, query, layout, noise, rounds, p_zero, r_max) -> None:
    out.copy_(z_cpu(out.shape, key, site, query, Noise(noise, rounds, p_zero, r_max), layout))


def _fold_key_cpu(seed, step, key, zeros=None) -> None:
    N = _cpu.noises()

    N.fold_key(seed.numpy().view("uint32"), step.numpy().view("uint32"), key.numpy().view("uint32"))
    if zeros is not None:
        zeros.zero_()


def _noise_cuda(out, key, site, query, layout, noise, rounds, p_zero, r_max) -> None:
    from ._perturb_triton import launch_noise

    launch_noise(out, key, site, query, layout, Noise(noise, rounds, p_zero, r_max))


def _fold_key_cuda(seed, step, key, zeros=None) -> None:
    from ._fold_key_triton import launch_fold_key

    launch_fold_key(seed, step, key, zeros)


_noise = register(
    "noise",
    "(Tensor(a!) out, Tensor key, int site, int query, str layout, str noise, int rounds, float p_zero, int r_max) -> ()",
    cpu=_noise_cpu,
    cuda=_noise_cuda,
)
_fold_key = register(
    "fold_key",
    "(Tensor seed, Tensor step, Tensor(a!) key, Tensor(b!)? zeros=None) -> ()",
    cpu=_fold_key_cpu,
    cuda=_fold_key_cuda,
)


# ------------------------------------------------------------------------------------------------------------- public


def fold_key(seed: torch.Tensor, step: torch.Tensor, key: torch.Tensor, zeros: torch.Tensor | None = None) -> None:
    """Write the key of (seed, step) into ``key``, on its device, without the host.

    Args:
        seed, step: int64[1], read as unsigned 64-bit.
        key: int32[2], overwritten.
        zeros: int32, contiguous, cleared in the same launch: what the step counts in.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices that differ.
    """
    if seed.dtype != torch.int64 or step.dtype != torch.int64 or key.dtype != torch.int32:
        raise TypeError(
            f"fold_key: seed and step must be int64 and key int32, got {seed.dtype}, {step.dtype}, {key.dtype}"
        )
    if seed.numel() != 1 or step.numel() != 1 or key.shape != (2,):
        raise ValueError(
            f"fold_key: seed and step must be [1] and key [2], got {tuple(seed.shape)}, {tuple(step.shape)}, {tuple(key.shape)}"
        )
    if not seed.device == step.device == key.device:
        raise ValueError(f"fold_key: seed is on {seed.device}, step on {step.device} and key on {key.device}")
    _fold_key(seed, step, key, zeros)


def check_index(value, name: str, limit: int) -> int:
    """``value`` as a Python int in [0, limit), or TypeError / ValueError."""
    try:
        value = operator.index(
            None if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool else value
        )
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if not 0 <= value < limit:
        raise ValueError(f"{name} must be in [0, {limit}), got {value}")
    return value


def materialize(
    shape,
    *,
    seed: int,
    step: int,
    site: int,
    query: int = 0,
    noise: str = "gaussian",
    device=None,
    layout: str | None = None,
    **params,
) -> torch.Tensor:
    """z of one parameter, in memory.

    Args:
        shape: shape of the parameter.
        seed: base seed, [0, 2^64).
        step: step counter, [0, 2^64).
        site: id of the parameter, [0, 2^32).
        query: direction, [0, 2^24).
        noise: a name in :data:`NOISES`; ``gaussian_fast`` on CUDA only.
        device: where to make it; the bits do not depend on it.
        layout: ``matrix`` or ``conv``; by default ``conv`` for four or more dimensions (docs/rng.md).
        **params: ``rounds``, ``p_zero``, ``r_max`` as in :class:`Noise`.

    Returns:
        fp32 (int8 for ``sparse_int8``) of ``shape``.

    Raises:
        TypeError: an index that is no integer, an unknown parameter.
        ValueError: a number out of range, an unknown noise or layout.
        NotImplementedError: ``gaussian_fast`` on a CPU.
    """
    spec = Noise(noise, **params)
    shape = torch.Size((shape,) if isinstance(shape, int) else shape)
    if any(n < 0 for n in shape):
        raise ValueError(f"shape must not be negative, got {tuple(shape)}")
    seed, step = check_index(seed, "seed", 1 << 64), check_index(step, "step", 1 << 64)
    site, query = check_index(site, "site", 1 << 32), check_index(query, "query", 1 << 24)
    layout = layout or default_layout(shape)
    grid(shape, layout, spec.segment)
    dtype = torch.int8 if noise == "sparse_int8" else torch.float32
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.numel():
        key = key_tensor(seed, step, out.device)
        _noise(out, key, site, query, layout, spec.name, spec.rounds, spec.p_zero, spec.r_max)
    return out

"""What the integer operators share: the pass, rounding by name, shifts, peaks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from . import _constants as C
from ._perturbation import NotStackedError, check_directions
from .noise import Noise

ROUNDINGS = ("nearest", "pseudo", "stochastic")
STRATEGIES = ("buffer", "twice")
#: Site of the words that round what belongs to no parameter (stream 4): the loss's gradient.
GRADIENT_SITE = (1 << 32) - 1


def check_rounding(rounding: str) -> str:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    return rounding


def sparse_noise(rounds=7, p_zero=0.0, r_max=15) -> Noise:
    """The noise of integer layers, its arguments checked by type as well as by range.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, naming it.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise TypeError(f"rounds must be an int, got {type(rounds).__name__}")
    if isinstance(p_zero, bool) or not isinstance(p_zero, (int, float)):
        raise TypeError(f"p_zero must be a number, got {type(p_zero).__name__}")
    return Noise("sparse_int8", rounds, p_zero, r_max)


@dataclass(frozen=True)
class IntegerPerturbation:
    """One pass over integer layers: w + sign z, clamped to [-127, 127], z from ``sparse_int8``.

    Args:
        key: int32[2], the folded key of (seed, step).
        noise: a :class:`Noise` named ``sparse_int8``.
        query, queries, signs: as in :class:`ezo_kernels.ops.Perturbation`; ``(0,)`` leaves the weights as they are.
    """

    key: torch.Tensor
    noise: Noise = field(default_factory=lambda: Noise("sparse_int8"))  # as of Perturbation
    query: int = 0
    queries: int = 1
    signs: tuple[int, ...] = (1, -1)

    def __post_init__(self) -> None:
        if self.key.dtype != torch.int32 or self.key.shape != (2,):
            raise TypeError(f"key must be int32 [2], got {self.key.dtype} {tuple(self.key.shape)}")
        if self.noise.name != "sparse_int8":
            raise ValueError(f"integer layers take noise 'sparse_int8', got {self.noise.name!r}")
        check_directions(self)

    @property
    def groups(self) -> int:
        return self.queries * len(self.signs)

    def schema_args(self):
        """The arguments that every perturbed integer operator's schema ends with, before its outputs."""
        n = self.noise
        return self.query, self.queries, list(self.signs), n.rounds, n.p_zero, n.r_max


SCHEMA = "int query, int queries, int[] signs, int rounds, float p_zero, int r_max"


def pass_groups(x, p, name: str, site: int) -> int:
    """Groups of the result of a perturbed layer; x has as many, or one that all of them share.

    Raises:
        NotStackedError: x has another number of groups.
    """
    groups = 1 if p is None else p.groups
    if x.groups not in (1, groups) and p is not None and tuple(p.signs) != (0,):
        raise NotStackedError(f"{name}: x has {x.groups} groups and the pass {groups}", site)
    return groups if p is not None else x.groups


def check_terms(terms: int, name: str) -> None:
    """Refuse sums of products that int32 could not hold.

    Raises:
        ValueError: more terms than the limit, which it names.
    """
    if terms > C.MOST_TERMS:
        raise ValueError(
            f"{name}: {terms} products are summed for one output; {C.MOST_TERMS} is the most that int32 holds with a bias "
            "(127 * 128 * terms + 127 * 2^22 < 2^31)"
        )

"""What an integer step makes of its losses: g of each query, the loss that is returned, and the count of steps.

Where one pass has the losses of all groups, the launch that makes them makes g and the sum, too (:class:`Signs`), and the
update counts the step. Else all of it is a launch of its own (:func:`int8_signs`).

| tensor | shape |
|---|---|
| losses | int64 [groups]: [2 queries] of a pass with both signs (+, -, +, -), [queries] of one with one sign, else any |
| g | int32 [queries], in -1, 0, 1; empty without a trunk |
| total | int64 []: the sum of the losses |
| step | int64 [1], one more |

    g of query q, both signs    sign(L(w + z_q) - L(w - z_q)), compared, for a difference may wrap
    g of query q, one sign      sign(queries L(w + z_q) - sum over p of L(w + z_p)), all less the lowest

:func:`ternary_gradient` is the same in torch's operators, for losses of any dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._library import launcher, register
from .int8_tensor import Int8Tensor, counters

#: Groups whose g the last program of a loss makes with the registers that it has.
MOST_GROUPS = 1024


def ternary_gradient(losses: torch.Tensor, antithetic: bool) -> torch.Tensor:
    """g [queries], int32 in -1, 0, 1, of losses [groups], integers or floats; NaN gives 0.

    Pairs are compared, not subtracted, for a difference of integers may wrap. Of one sign a query, the own loss is held against
    the mean over all queries, which is above it where the mean over the others is: times their number, above the lowest, in 64
    bits, where integers of a closure must lie within 2^63 / queries of one another (those of our losses do) and floats are
    exact unless they are of very different sizes, so that ties are ties in any order.
    """
    if antithetic:
        own, other = losses[0::2], losses[1::2]
    else:
        losses = losses.double() if losses.is_floating_point() else losses.long()
        losses = losses - losses.min()
        own, other = losses * losses.numel(), losses.sum()
    return (own > other).to(torch.int32) - (own < other).to(torch.int32)


def signs_cpu(losses, antithetic, g, total) -> None:
    """g, unless it is empty, and the sum of the losses."""
    values = losses.tolist()
    if g.numel():
        if antithetic:
            pairs = zip(values[0::2], values[1::2], strict=True)
        else:
            pairs = [(len(values) * own, sum(values)) for own in values]
        g.copy_(torch.tensor([(own > other) - (own < other) for own, other in pairs], dtype=torch.int32))
    total.fill_((sum(values) + (1 << 63)) % (1 << 64) - (1 << 63))  # wraps, as the GPU's does


def _signs_cpu(losses, antithetic, g, total, step) -> None:
    signs_cpu(losses, antithetic, g, total)
    step += 1


@dataclass(frozen=True)
class Signs:
    """g and the sum of a step's losses, for the launch that makes these losses to write.

    They lie among the zeros of the pass, as the losses do, so that a captured step finds all that it leaves in one place.

    Attributes:
        antithetic: whether groups are both signs of each query, else one.
        g: int32 [queries]. total: int64 [].
    """

    antithetic: bool
    g: torch.Tensor
    total: torch.Tensor

    @classmethod
    def of(cls, like: Int8Tensor, queries: int, antithetic: bool) -> Signs:
        """Of so many queries, at least one, yet to be written; in the memory of ``like``, the last layer's values."""
        return cls(antithetic, counters(like, queries), counters(like, 1, torch.int64).view(()))

    def check(self, groups: int) -> None:
        """Refuse losses of another pass.

        Raises:
            ValueError: not as many groups as g is of, more than :data:`MOST_GROUPS`, or none.
        """
        own = self.g.numel() * (1 + self.antithetic)
        if groups != own or not 0 < groups <= MOST_GROUPS:
            raise ValueError(f"signs of {own} groups, at most {MOST_GROUPS}, do not fit {groups} losses")


_signs = register(
    "int8_signs",
    "(Tensor losses, bool antithetic, Tensor(a!) g, Tensor(b!) total, Tensor(c!) step) -> ()",
    cpu=_signs_cpu,
    cuda=launcher("_int8_signs_triton", "launch_signs"),
)


def int8_signs(
    losses: torch.Tensor, *, queries: int, antithetic: bool, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """g and the sum of the losses; ``step`` counts one more.

    Args:
        losses, step: as in the table above. queries: of the pass, 0 without a trunk. antithetic: both signs of each.

    Returns:
        int32 [queries] and int64 [].

    Raises:
        TypeError: losses or a step that are not int64. ValueError: losses of another number of queries.
    """
    if losses.dtype != torch.int64:
        raise TypeError(f"int8_signs takes int64 losses, got {losses.dtype}")
    if step.dtype != torch.int64 or step.shape != (1,):
        raise TypeError(f"int8_signs: step must be int64 [1], got {step.dtype} {tuple(step.shape)}")
    if queries and losses.numel() != queries * (1 + antithetic):
        raise ValueError(f"{queries} queries have {queries * (1 + antithetic)} losses, got {losses.numel()}")
    g = torch.empty(queries, dtype=torch.int32, device=losses.device)
    total = torch.empty((), dtype=torch.int64, device=losses.device)
    _signs(losses.contiguous(), antithetic, g, total, step)
    return g, total

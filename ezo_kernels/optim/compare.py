"""How far outputs that should be one lie apart."""

from __future__ import annotations

import functools
import math

import torch
from torch.utils import _pytree as pytree


def differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The largest difference, 0 where both are the same infinity or no number; infinite where one of them alone is."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, a - b).abs().nan_to_num(nan=math.inf).max()


def largest(t: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of its finite values."""
    return torch.where(t.isfinite(), t, 0.0).abs().max()


def rows_apart(stacked: list, alone: list) -> bool:
    """Whether the stacked pass gave every group what the group gives alone.

    Compared by the outputs: they may differ by a fiftieth of what the perturbation itself changes, and by rounding.
    """
    flat = [
        [t for t in pytree.tree_leaves(o) if torch.is_tensor(t) and t.is_floating_point()] for o in (*stacked, *alone)
    ]
    together, apart = flat[: len(stacked)], flat[len(stacked) :]
    for a, b in zip(together, apart, strict=True):
        if [t.shape for t in a] != [t.shape for t in b]:
            return False
    # the group furthest from any has the most or the least somewhere: no group is held against each other one
    highest = [functools.reduce(torch.maximum, outputs) for outputs in zip(*apart, strict=True)]
    lowest = [functools.reduce(torch.minimum, outputs) for outputs in zip(*apart, strict=True)]
    for a, b in zip(together, apart, strict=True):
        for s, t, high, low in zip(a, b, highest, lowest, strict=True):
            if not t.numel():
                continue
            moved = torch.maximum(differ(high, t), differ(low, t))
            floor = 64 * torch.finfo(t.dtype).eps * largest(t)
            if bool(differ(s, t) > moved / 50 + floor):
                return False
    return True

"""Checks of numbers that a user gives, at the start and later through ``param_groups``."""

from __future__ import annotations

import math
import numbers

import torch

_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, 2.0**-149


def number(value, name: str, *, least: float, strict: bool = False) -> float:
    """``value`` as a float, at least ``least`` (above it, if ``strict``).

    Raises:
        TypeError: no Python or NumPy number; a tensor, whose value would have to be waited for.
        ValueError: not finite, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if not math.isfinite(value) or value < least or (strict and value == least):
        raise ValueError(f"{name} must be finite and {'above' if strict else 'at least'} {least}, got {value}")
    if abs(value) > _LARGEST or (strict and abs(value) < _SMALLEST):
        raise ValueError(f"{name} must be in the range of fp32, got {value}")
    return float(value)


def check_antithetic(antithetic: bool, queries: int, head_grad: str) -> None:
    """TypeError or ValueError for what goes with no estimate."""
    if not isinstance(antithetic, bool):
        raise TypeError(f"antithetic must be a bool, got {type(antithetic).__name__}")
    if not antithetic and (queries < 2 or head_grad != "mean"):
        raise ValueError(
            f"antithetic=False, one sign a query, needs 2 queries or more and head_grad 'mean', got {queries} and {head_grad!r}"
        )

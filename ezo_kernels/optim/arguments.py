"""Checks of numbers that a user gives, at the start and later through ``param_groups``."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from pathlib import Path

import torch

LARGEST, _SMALLEST = torch.finfo(torch.float32).max, 2.0**-149
#: What a schedule to zero may end at by its own rounding, below it.
_BELOW_ZERO = 1e-12
_NOT_THE_USERS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def warn_user(message: str) -> None:
    """Warn at the line of the user's that led here, past this library's and torch's."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def rate(value, name: str) -> float:
    """A learning rate, at least 0; what a schedule left below it by rounding is 0. Raises as :func:`number`."""
    if isinstance(value, numbers.Real) and -_BELOW_ZERO < value < 0:
        return 0.0
    return number(value, name, least=0.0)


def number(value, name: str, *, least: float, strict: bool = False, held: bool = True) -> float:
    """``value`` as a float, at least ``least`` (above it, if ``strict``), in the range of fp32 if it is ``held`` in it.

    Raises:
        TypeError: no Python or NumPy number; a tensor, whose value would have to be waited for.
        ValueError: not finite, too small, or out of that range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    if not math.isfinite(value) or value < least or (strict and value == least):
        raise ValueError(f"{name} must be finite and {'above' if strict else 'at least'} {least}, got {value}")
    if held and (abs(value) > LARGEST or (strict and abs(value) < _SMALLEST)):
        raise ValueError(f"{name} must be in the range of fp32, got {value}")
    return float(value)


def moved(group: dict, name: str, filled: dict, whose: str = "") -> float | None:
    """The lr or eps of a group, checked, where it is no longer what the device was ``filled`` with; else None."""
    value = group[name]
    if value == filled[name]:
        return None
    what = name + whose
    return rate(value, what) if name == "lr" else number(value, what, least=0.0, strict=True)


def check_antithetic(antithetic: bool, queries: int, head_grad: str) -> None:
    """TypeError or ValueError for what goes with no estimate."""
    if not isinstance(antithetic, bool):
        raise TypeError(f"antithetic must be a bool, got {type(antithetic).__name__}")
    if not antithetic and (queries < 2 or head_grad != "mean"):
        raise ValueError(
            f"antithetic=False, one sign a query, needs 2 queries or more and head_grad 'mean', got {queries} and {head_grad!r}"
        )


class IntegerGroup(dict):
    """A ``param_groups`` entry of steps in integers; says what to use instead to those who ask for a learning rate."""

    def __missing__(self, key):
        rates = ("lr", "initial_lr", "momentum", "betas")
        raise KeyError(
            f"{key}: steps in integers have no learning rate for torch's schedulers; ezo_kernels.optim.IntegerSchedule moves "
            "bits, r_max and p_zero"
            if key in rates
            else key
        )

"""What goes with an estimate of g; its formulas are in :mod:`ezo_kernels.ops.coefficients`."""

from __future__ import annotations


def check_antithetic(antithetic: bool, queries: int, head_grad: str) -> None:
    """TypeError or ValueError for what goes with no estimate."""
    if not isinstance(antithetic, bool):
        raise TypeError(f"antithetic must be a bool, got {type(antithetic).__name__}")
    if not antithetic and (queries < 2 or head_grad != "mean"):
        raise ValueError(
            f"antithetic=False, one sign a query, needs 2 queries or more and head_grad 'mean', got {queries} and {head_grad!r}"
        )

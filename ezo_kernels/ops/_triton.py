"""Triton, where it is installed. Importing this touches no driver.

Without triton (a CPU wheel of torch on its own) the kernels' source still imports: ``jit`` hands the function back and
``constexpr`` the value, and a launch raises through :func:`require`.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    jit, constexpr = triton.jit, tl.constexpr
except ImportError:  # pragma: no cover - exercised by tests/test_import.py in a process that hides triton

    class _Language:
        constexpr = None

    triton, tl = None, _Language()

    def constexpr(value):
        return value

    def jit(fn=None, **_):
        return fn if fn is not None else (lambda g: g)


def require() -> None:
    """Raise unless triton can be imported."""
    if triton is None:
        raise NotImplementedError("the CUDA kernels need triton: pip install triton (torch's CUDA wheels bring it)")

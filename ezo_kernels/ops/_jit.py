"""numba's compiler for the CPU backend: what it makes is kept on disk where there is a place, and works where there is none."""

from __future__ import annotations

import functools
import warnings

from numba import njit


def kept(function=None, **options):
    """``njit`` with a cache on disk, and without one where neither the package's folder nor the user's cache can be written.

    numba refuses to cache there: an installation that is read-only, used by somebody without a home.
    """
    if function is None:
        return functools.partial(kept, **options)
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        _say()
        return njit(**options)(function)


@functools.cache
def _say() -> None:
    warnings.warn(
        "no folder to keep compiled CPU kernels in can be written: each process compiles them anew, for some seconds. "
        "NUMBA_CACHE_DIR names one",
        stacklevel=2,
    )

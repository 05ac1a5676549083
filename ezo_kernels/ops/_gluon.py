"""Gluon, Triton's language of layouts, barriers and warps, where the installed Triton has the names that kernels here use.

Gluon is experimental and its names change from version to version. Two are taken as they are found: ``copy_tile`` is
``async_load``, or before 3.9 ``async_copy_global_to_shared``, which is still there and raises; ``barrier`` was
``thread_barrier`` before 3.7. Where another is missing, the kernels' source still imports: ``jit`` hands the function back, and
:data:`MISSING` says why nothing can be launched. Importing this touches no driver.
"""

from __future__ import annotations

import types

from ._triton import triton

#: What kernels take from each module.
_NAMES = {
    "gl": (
        "allocate_shared_memory", "arange", "full", "load", "permute", "program_id", "reshape", "split", "store",
        "warp_specialize", "zeros", "BlockedLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout",
        "SwizzledSharedLayout",
    ),
    "hopper": ("fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait"),
    "mbarrier": ("MBarrierLayout", "arrive", "expect", "init", "wait"),
    "taken": ("barrier", "copy_tile"),
}  # fmt: skip


def _absent(modules: dict) -> str:
    names = [f"{module}.{name}" for module, of in _NAMES.items() for name in of if not hasattr(modules[module], name)]
    if not names:
        return ""
    version = getattr(triton, "__version__", "")
    return f"triton {version} has another Gluon, without {', '.join(names)}: it is written for 3.6 to 3.9"


def _taken(gl, tma) -> dict:
    """Names that are others in other versions, as many as there are."""
    found = {
        "barrier": getattr(gl, "barrier", None) or getattr(gl, "thread_barrier", None),
        "copy_tile": getattr(tma, "async_load", None) or getattr(tma, "async_copy_global_to_shared", None),
    }
    return {name: function for name, function in found.items() if function is not None}


class _Names:
    """Names that annotations and defaults ask for where there is no Gluon."""

    constexpr = None


try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    taken = types.SimpleNamespace(**_taken(gl, tma))
    barrier, copy_tile = getattr(taken, "barrier", None), getattr(taken, "copy_tile", None)
    #: Why kernels cannot be launched, or nothing.
    MISSING = _absent({"gl": gl, "hopper": hopper, "mbarrier": mbarrier, "taken": taken})
except ImportError as error:
    gluon = TensorDescriptor = barrier = copy_tile = None
    gl = hopper = mbarrier = _Names()
    MISSING = f"there is no Gluon for sm_90: {error}"


def jit(fn=None, **options):
    """``gluon.jit``, or the function itself where there is none."""
    if MISSING:
        return fn if fn is not None else (lambda g: g)
    return gluon.jit(fn, **options)

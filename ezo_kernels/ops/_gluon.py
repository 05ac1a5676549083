"""Gluon, Triton's language of layouts, barriers and warps, where the installed Triton has the names that kernels here use.

Gluon is experimental and its names change from version to version (``tma.async_copy_global_to_shared`` is another in 3.9).
Where one is missing, the kernels' source still imports: ``jit`` hands the function back, and :data:`MISSING` says why nothing
can be launched. Importing this touches no driver.
"""

from __future__ import annotations

from ._triton import triton

#: What kernels take from each module.
_NAMES = {
    "gl": (
        "allocate_shared_memory", "arange", "barrier", "full", "load", "permute", "program_id", "reshape", "split", "store",
        "warp_specialize", "zeros", "BlockedLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout",
        "SwizzledSharedLayout",
    ),
    "hopper": ("fence_async_shared", "warpgroup_mma", "warpgroup_mma_wait"),
    "mbarrier": ("MBarrierLayout", "arrive", "expect", "init", "wait"),
    "tma": ("async_copy_global_to_shared",),
}  # fmt: skip


def _absent(modules: dict) -> str:
    names = [f"{module}.{name}" for module, of in _NAMES.items() for name in of if not hasattr(modules[module], name)]
    if not names:
        return ""
    version = getattr(triton, "__version__", "")
    return f"triton {version} has another Gluon, without {', '.join(names)}: it is written for 3.7"


class _Names:
    """Names that annotations and defaults ask for where there is no Gluon."""

    constexpr = None


try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    #: Why kernels cannot be launched, or nothing.
    MISSING = _absent({"gl": gl, "mbarrier": mbarrier, "tma": tma, "hopper": hopper})
except ImportError as error:
    gluon = TensorDescriptor = None
    gl = hopper = mbarrier = tma = _Names()
    MISSING = f"there is no Gluon for sm_90: {error}"


def jit(fn=None, **options):
    """``gluon.jit``, or the function itself where there is none."""
    if MISSING:
        return fn if fn is not None else (lambda g: g)
    return gluon.jit(fn, **options)

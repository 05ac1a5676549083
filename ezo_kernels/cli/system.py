"""The machine: device, versions, peak memory."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from .._version import __version__

#: distributions whose version can change the bits or the speed of a run
DISTRIBUTIONS = ("torch", "triton", "numpy", "numba", "cupy-cuda12x", "cupy-cuda13x")


def pick_device(name: str) -> torch.device:
    """The device of ``--device``: auto is CUDA where there is one.

    Raises:
        ValueError: cuda was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda: this torch finds no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Version of Python, of this library and of what it stands on; "absent" where there is none."""
    found = {"python": platform.python_version(), "ezo-kernels": __version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    # One line for cupy, whose wheels are named after the CUDA they are for.
    cupy = [found.pop(name) for name in DISTRIBUTIONS if name.startswith("cupy")]
    found["cupy"] = next((version for version in cupy if version != "absent"), "absent")
    found["cuda"] = torch.version.cuda or "absent"
    return found


def peak_memory(device: torch.device) -> tuple[int, str]:
    """The most memory held so far, in bytes, and what that counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated by torch on the GPU"
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0, "not known on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024, "resident, the whole process with its data"

"""NVTX ranges by phase of a step. Off, they cost an attribute lookup and push nothing."""

from __future__ import annotations

import contextlib

PHASES = ("perturbed forward", "loss", "head", "update")


def ranges(enabled: bool):
    """``phase(name)`` -> context manager: an NVTX range in the domain "ezo", or nothing."""
    if not enabled:
        nothing = contextlib.nullcontext()
        return lambda name: nothing
    import nvtx

    return lambda name: nvtx.annotate(name, domain="ezo")

"""Registration of the library's operators in ``torch.ops.ezo``.

Every operator writes into tensors that its caller allocated and returns nothing, so its fake is a no-op and it is opaque to
torch.compile. The CPU key runs the reference; the CUDA key runs the kernel; nothing falls from one to the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("ezo", "DEF")

#: (operator name, dispatch key) -> implementation. Looked up at each call, so that a test can run the CUDA launchers on CPU
#: tensors in Triton's interpreter.
implementations: dict[tuple[str, str], Callable] = {}


def register(name: str, schema: str, *, cpu: Callable, cuda: Callable) -> Callable:
    """Define ``ezo::name`` with ``schema`` (all outputs mutable arguments) and return the callable overload."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    for key, implementation in (("CPU", cpu), ("CUDA", cuda)):
        implementations[name, key] = implementation

        def run(*args, _key=(name, key), **kwargs):
            implementations[_key](*args, **kwargs)

        LIBRARY.impl(name, run, key)
    torch.library.register_fake("ezo::" + name, lambda *args, **kwargs: None, lib=LIBRARY)
    return getattr(torch.ops.ezo, name).default


def launcher(module: str, name: str) -> Callable:
    """A CUDA implementation that is ``name`` of ``.module``, which is imported, and triton with it, at the first launch."""

    def launch(*args) -> None:
        getattr(importlib.import_module(f".{module}", __package__), name)(*args)

    return launch


def transformed() -> bool:
    """Whether calls are being traced, mapped or differentiated forward: an operator of ours with autograd stands aside then."""
    dual = torch.autograd.forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or dual


def bound_by_launches(device: torch.device) -> bool:
    """Whether one call for all groups beats a call a group: on a GPU. On a CPU both have the same bits and cost as much."""
    return device.type == "cuda"

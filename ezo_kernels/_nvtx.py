"""NVTX ranges by phase of a step and by layer. Off, a phase costs one call that returns a shared no-op, and a layer nothing.

| range | around |
|---|---|
| ``rows`` | with ``importance_rows`` the plain forward of the whole batch, and the draw |
| ``forward`` | the model's forward of all groups as one batch; of one group, with its loss, where they run one by one |
| ``loss`` | the losses of all groups of a stacked pass |
| ``head backward`` | the backward of the head |
| ``g`` | g, its clip, the coefficients, and whether the step is finite; of integers in ``loss``, with the losses |
| ``update`` | the trunk's update |
| ``head update`` | the head's optimiser |
| ``replay`` | the launch of a captured step: nothing else of it runs on the host |
| ``trunk NAME``, ``head NAME`` | a layer's forward, by qualified name: modules without children, and those that run as one |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

#: The domain of all ranges, where the nvtx package is installed.
DOMAIN = "ezo"
PHASES = ("rows", "forward", "loss", "head backward", "g", "update", "head update", "replay")
_NOTHING = contextlib.nullcontext()


def _backend():
    """(push, pop): of the nvtx package, else of torch where there is CUDA, else None."""
    try:
        import nvtx
    except ImportError:
        if not torch.cuda.is_available():
            return None
        return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    return (lambda name: nvtx.push_range(name, domain=DOMAIN)), (lambda: nvtx.pop_range(domain=DOMAIN))


class Ranges:
    """``ranges(name)`` -> context manager: an NVTX range, or nothing if it was made with ``enabled=False``."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._backend = _backend() if enabled else None

    def __reduce__(self):
        return Ranges, (self.enabled,)

    def __call__(self, name: str):
        return _NOTHING if self._backend is None else self._range(name)

    @contextlib.contextmanager
    def _range(self, name: str) -> Iterator[None]:
        push, pop = self._backend
        push(name)
        try:
            yield
        finally:
            pop()

    def layers(self, model: nn.Module, in_head) -> contextlib.AbstractContextManager:
        """A range around each layer's forward while inside.

        Args:
            model: whose modules they are.
            in_head: qualified name -> whether it is of the head.
        """
        return _NOTHING if self._backend is None else self._hooked(model, in_head)

    @contextlib.contextmanager
    def _hooked(self, model: nn.Module, in_head) -> Iterator[None]:
        push, pop = self._backend
        hooks = []

        def enter(name: str):
            return lambda module, args: push(name)

        def leave(module, args, output) -> None:
            pop()

        try:
            for name, module in model.named_modules():
                if not module._modules and name:
                    part = "head" if in_head(name) else "trunk"
                    # Before and after hooks of others, and after an error, too: what was pushed is popped.
                    hooks.append(module.register_forward_pre_hook(enter(f"{part} {name}"), prepend=True))
                    hooks.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

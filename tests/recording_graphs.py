"""CUDA graphs on the CPU: an operator at a time, recorded with its tensors and carried out again at each replay.

As with a graph on a GPU, a replay runs no line of Python of the step: it repeats the operators on the very tensors of the
recording, so whatever the host did in between (numbers, addresses, counters) is what it was then. Reading a tensor on the host
while recording raises, as it does while a stream is captured.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators that give the host a value of the device's, or a shape that depends on one.
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list = []
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._hold(argument, value)
        for argument in func._schema.arguments:
            if argument.name in kwargs:
                self._hold(argument, kwargs[argument.name])
        out = func(*args, **kwargs)
        views = any(r.alias_info is not None for r in func._schema.returns)
        results = [] if views else [t for t in pytree.tree_leaves(out) if torch.is_tensor(t)]
        if not views or any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
            self.operators.append((func, args, kwargs, results))
        return out

    def _hold(self, argument, value) -> None:
        """What a tensor was before the recording wrote it: a graph's capture carries nothing out."""
        if argument.alias_info is None or not argument.alias_info.is_write:
            return
        for t in pytree.tree_leaves(value):
            if torch.is_tensor(t):
                self.written.append((t, t.detach().clone()))


class Recording:
    def __init__(self, operators) -> None:
        self.operators = operators

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self.operators:
            out = func(*args, **kwargs)
            fresh = [t for t in pytree.tree_leaves(out) if torch.is_tensor(t)] if results else []
            for mine, new in zip(results, fresh, strict=True):
                mine.detach().copy_(new)


class RecordingGraphs:
    """What :class:`ezo_kernels.optim.capture.CudaGraphs` is, on the CPU."""

    def __init__(self, device=None) -> None:
        self.dropped = 0

    @contextlib.contextmanager
    def stream(self):
        yield

    def record(self, run) -> Recording:
        recorder = _Recorder()
        try:
            with recorder:
                run()
        finally:
            with torch.no_grad():
                for t, before in reversed(recorder.written):
                    t.detach().copy_(before)
        return Recording(recorder.operators)

    def drop(self, graph) -> None:
        self.dropped += 1

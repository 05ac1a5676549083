"""A user's forward that runs to be looked at: what it leaves on the model is put back."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

_HOLDERS = (list, dict, set, deque, OrderedDict, defaultdict)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back what the forward inside, traced or on a sample, leaves on the modules, raised or not.

    A forward that keeps its features would keep the trace's proxies, and one that counts its calls would count this one. Put
    back are attributes, what lists, dicts and sets among them hold, and what was written into buffers. A lazy module stays what
    it has become.
    """
    modules = [m for m in model.modules() if not isinstance(m, LazyModuleMixin)]
    held = [(vars(m), dict(vars(m))) for m in modules]
    contents = [(v, v.copy()) for _, own in held for v in own.values() if type(v) in _HOLDERS]
    buffers = [b for m in modules for b in m._buffers.values() if b is not None and not b.is_inference()]
    written = [(b, b._version, b.clone()) for b in buffers]
    try:
        yield
    finally:
        for now, own in held:
            now.clear()
            now.update(own)
        for holder, own in contents:
            holder.clear()
            (holder.extend if isinstance(holder, (list, deque)) else holder.update)(own)
        with torch.no_grad():
            for buffer, version, old in written:
                if buffer._version != version:
                    buffer.copy_(old)

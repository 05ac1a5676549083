"""A user's forward that runs to be looked at: what it leaves on the model is put back."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

_REGISTERS = ("_parameters", "_modules")
_HOLDERS = (list, dict, set, deque, OrderedDict, defaultdict)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back what the forward inside, traced or on a sample, leaves on the modules, raised or not.

    A forward that keeps its features would keep the trace's proxies, and one that counts its calls would count this one. Put
    back are attributes, what lists, dicts and sets among them hold, and what was written into buffers. Layers and parameters
    that it makes, as some first forwards do, stay: they are the model's from then on; and a lazy module stays what it has
    become.
    """
    modules = [m for m in model.modules() if not isinstance(m, LazyModuleMixin)]
    held = [(vars(m), dict(vars(m))) for m in modules]
    registers = [{table: dict(own[table]) for table in _REGISTERS} for _, own in held]
    contents = [(v, v.copy()) for _, own in held for v in own.values() if type(v) in _HOLDERS]
    buffers = [b for m in modules for b in m._buffers.values() if b is not None and not b.is_inference()]
    written = [(b, b._version, b.clone()) for b in buffers]
    try:
        yield
    finally:
        made = [_registered(own, tables) for (_, own), tables in zip(held, registers, strict=True)]
        for now, own in held:
            now.clear()
            now.update(own)
        for holder, own in contents:
            holder.clear()
            (holder.extend if isinstance(holder, (list, deque)) else holder.update)(own)
        for (now, _), new in zip(held, made, strict=True):
            for table, name, value in new:
                now[table][name] = value
                now.pop(name, None)  # a plain attribute, such as a None that stood for it, would hide it
        with torch.no_grad():
            for buffer, version, old in written:
                if buffer._version != version:
                    buffer.copy_(old)


def _registered(own: dict, before: dict[str, dict]) -> list[tuple[str, str, object]]:
    """Table, name and value of what a module has registered that it had not."""
    return [
        (table, name, value)
        for table in _REGISTERS
        for name, value in own[table].items()
        if value is not None and before[table].get(name) is None and not isinstance(value, torch.fx.Proxy)
    ]

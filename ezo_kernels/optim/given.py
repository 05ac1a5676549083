"""What groups of a first step must have alike beside their weights: the batch, and what a model keeps between forwards.

Two groups that are given different things have different losses, and g would be that difference.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .batches import equal
from .check import SHAPE_ONLY

#: Attributes of a module whose tensors are known otherwise.
_REGISTERS = ("_parameters", "_buffers", "_modules")


class Given:
    """Watches the first two groups of a first step.

    Of the batch, the model's arguments and what a loss is held against, it compares what both leave: a clamp or a relu in place
    leaves the same. What a closure makes anew for each group is held, and not written again. Of a tensor that the first group
    leaves on a module, as an attribute, it looks whether the second one reads it and leaves another: a cache that is filled
    once, features that are kept for somebody, or memory that is overwritten before it is read, are no state.
    """

    def __init__(self, model: nn.Module, batch=None) -> None:
        self._model, self._tensors = model, _watched(batch)
        self._left: list[tuple] = []
        self._state: dict[str, list[tuple]] = {}
        self._group = 0

    @contextlib.contextmanager
    def running(self):
        """One group after the other runs inside; ValueError if the second is given other things than the first."""
        group, self._group = self._group, self._group + 1
        if group == 0:
            hook = self._model.register_forward_pre_hook(self._note, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()
            self._left = [(t, _writes(t), t.detach().clone()) for t in self._tensors]
            self._state = _attributes(self._model)
        elif group == 1:
            with _Reads({id(t): name for name, own in self._state.items() for t, _ in own}) as reads:
                yield
            self._compare(reads.found)
            self._tensors, self._left, self._state = [], [], {}
        else:
            yield

    def _note(self, _, args, kwargs) -> None:
        self._tensors += _watched((args, kwargs))

    @torch.no_grad()
    def _compare(self, read: set[str]) -> None:
        for t, writes, old in self._left:
            written = t.shape != old.shape or writes is None or _writes(t) != writes
            if written and not equal(t, old):
                raise ValueError(
                    f"the forward or the loss writes into its batch, here {tuple(t.shape)}, so each group of a step would be "
                    "given another one: clone it first"
                )
        now = _attributes(self._model)
        moved = [name for name in sorted(read) if not _alike(self._state[name], now.get(name, []))]
        if moved:
            raise ValueError(
                f"the model keeps {', '.join(map(repr, moved))} from one forward to the next, so each group of a step would "
                "begin with what another one left: begin each forward with the same (reset it in step(closure), or give it to "
                "the model as an argument)"
            )


class _Reads(TorchFunctionMode):
    """Collects which tensors are read: the names of those, by id, that are made something of beside themselves."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names, self.found = names, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not self._names or name in SHAPE_ONLY:
            return out
        overwritten, read = _written_and_read(name, args, kwargs)
        if name == "__setitem__" or _tensors(out):
            self.found.update(self._names[id(t)] for t in _tensors(read) if id(t) in self._names and out is not t)
        for t in overwritten:
            if not any(t is own for own in _tensors(read)):
                self._names.pop(id(t), None)
        return out


def _written_and_read(name: str, args: tuple, kwargs: dict) -> tuple[list[torch.Tensor], object]:
    """Tensors of which a call of torch's leaves nothing as it was, and what it reads."""
    if name in ("copy_", "fill_", "zero_"):
        return [args[0]], (args[1:], kwargs)
    if name == "__setitem__":
        whole = args[1] is ... or (isinstance(args[1], slice) and args[1] == slice(None))
        return [args[0]] if whole else [], args[1:]
    return _tensors(kwargs.get("out")), (args, {key: value for key, value in kwargs.items() if key != "out"})


def _attributes(model: nn.Module) -> dict[str, list[tuple]]:
    """Tensors that modules hold beside parameters and buffers, and how often they were written, by name."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _REGISTERS and (own := _watched(value)):
                found[f"{path}.{name}".lstrip(".")] = [(t, _writes(t)) for t in own]
    return found


def _alike(before: list[tuple], after: list[tuple]) -> bool:
    return len(before) == len(after) and all(
        v == w and (a is b or _are_one(a, b)) for (a, v), (b, w) in zip(before, after, strict=True)
    )


def _are_one(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether these are views of the same memory, such as a tensor and all of it, or what ``detach`` gives."""
    if not all(type(t) is torch.Tensor and t.layout == torch.strided and not t.is_meta for t in (a, b)):
        return False
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _watched(tree) -> list[torch.Tensor]:
    """Its tensors that have a shape and can be copied in any mode: those of ragged rows do not."""
    return [t for t in _tensors(tree) if not t.is_nested]


def _writes(t: torch.Tensor) -> int | None:
    """How often a tensor was written, or None where that is not counted."""
    return None if t.is_inference() else t._version

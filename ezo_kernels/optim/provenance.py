"""Whose the tensors of a pass are: every group's, or each one's own. Layers tell by rows, and a first pass by what is here."""

from __future__ import annotations

import sys

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops._perturbation import NotStackedError


class Own(TorchDispatchMode):
    """Tells what is each group's own in a pass that begins with one batch: what perturbed layers made, and what came of it."""

    def __init__(self, batch=()) -> None:
        super().__init__()
        self._own: set[StorageWeakRef] = set()  # of what is gone, too: its address names nothing else while one is held
        self._given: set[StorageWeakRef] = set()  # the batch, and what came of it: nothing else has its rows
        self._add(self._given, batch)

    def holds(self, t: torch.Tensor) -> bool:
        return StorageWeakRef(t.untyped_storage()) in self._own

    def is_of_batch(self, t: torch.Tensor) -> bool:
        return not self.holds(t) and StorageWeakRef(t.untyped_storage()) in self._given

    def mark(self, tree) -> None:
        self._add(self._own, tree)

    @staticmethod
    def _add(to: set, tree) -> None:
        to.update(StorageWeakRef(t.untyped_storage()) for t in pytree.tree_leaves(tree) if torch.is_tensor(t))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        refs = {StorageWeakRef(t.untyped_storage()) for t in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        for kind in (self._own, self._given):
            if refs & kind:
                self._add(kind, out)
                written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
                self._add(kind, [t for a, t in zip(func._schema.arguments, args, strict=False) if a.name in written])
                self._add(kind, [t for name, t in kwargs.items() if name in written])
        return out


class OfEveryRow(TorchDispatchMode):
    """Refuses to take one row's of what every row of all groups is given (embeddings of positions): it is one group's."""

    def __init__(self) -> None:
        super().__init__()
        self._refs: set[StorageWeakRef] = set()

    def mark(self, t: torch.Tensor) -> None:
        self._refs.add(StorageWeakRef(t.untyped_storage()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor, torch.ops.aten.index.Tensor):
            first = args[1] if len(args) > 1 else 0
            whole = func is torch.ops.aten.slice.Tensor and args[2:4] in (
                (),
                (None,),
                (0,),
                (0, sys.maxsize),
                (None, None),
            )
            at_first = first[0] is not None if isinstance(first, (list, tuple)) else first in (0, -args[0].dim())
            if at_first and not whole and StorageWeakRef(args[0].untyped_storage()) in self._refs:
                raise NotStackedError("a row is taken of positions that every row of all groups has: it is one group's")
        return func(*args, **(kwargs or {}))

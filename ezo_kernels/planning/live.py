"""Which storages are alive: their bytes now, the most at one time, and what they were for at that time."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def _draws(func, args, kwargs) -> bool:
    """Whether an operator that may draw does, from a generator that nobody gave it: attention has dropout of 0, too."""
    given = {a.name: a.default_value for a in func._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | kwargs
    off = any(given.get(name, 1) == 0 for name in ("dropout_p", "dropout", "p", "train", "training"))
    return given.get("generator") is None and not off


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator returns while this is entered, until it is freed.

    Works on real tensors and on fake ones alike. Counted is what operators *return*: memory that a kernel takes and gives back
    inside of one call (a convolution's own workspace, the weight that the CPU reference forms) is not seen, nor is what an
    allocator rounds up.

    Args:
        known: tensors whose storages are somebody else's, counted nowhere.

    Attributes:
        now: bytes alive. peak: the most since :meth:`restart`.
        draws: names of the operators that drew from a generator of torch's own.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in known}
        self._live: dict[int, tuple[int, int, object]] = {}  # storage -> serial number, bytes, weak reference
        self._roles: dict[int, str] = {}
        self._made, self._role = 0, None
        self._at_peak: list[tuple[int, int]] = []
        self.now = self.peak = 0
        self.draws: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs or {}):
            self.draws.append(func._schema.name.partition("::")[2])
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
                self._follow(leaf)
        if (
            func is torch.ops.ezo.perturb.default
        ):  # its last argument: the copies of a parameter that no kernel perturbs
            self.mark([args[-1]], "workspace")
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._live:
            return

        def freed(_, key=key, size=size) -> None:
            self.now -= size
            del self._live[key]

        self._made += 1
        self._live[key] = (self._made, size, weakref.ref(storage, freed))
        if self._role is not None:
            self._roles[self._made] = self._role
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            self._at_peak = [(serial, size) for serial, size, _ in self._live.values()]

    def mark(self, tensors: Iterable[torch.Tensor], role: str) -> None:
        """Say what the storages of these tensors are for."""
        for tensor in tensors:
            entry = self._live.get(tensor.untyped_storage()._cdata)
            if entry is not None:
                self._roles[entry[0]] = role

    def mark_alive(self, role: str) -> None:
        """Say it of all that is alive now."""
        for serial, _, _ in self._live.values():
            self._roles[serial] = role

    @contextlib.contextmanager
    def role(self, role: str) -> Iterator[None]:
        """What the storages made inside are for, unless they are marked later."""
        before, self._role = self._role, role
        try:
            yield
        finally:
            self._role = before

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now
        self._at_peak = [(serial, size) for serial, size, _ in self._live.values()]

    def at_peak(self, default: str) -> Counter[str]:
        """Bytes by role of what was alive at the peak; what nobody marked is ``default``."""
        found: Counter[str] = Counter()
        for serial, size in self._at_peak:
            found[self._roles.get(serial, default)] += size
        return found

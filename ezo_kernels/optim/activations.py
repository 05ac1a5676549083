"""What :class:`ezo_kernels.Diagnostics` sees of a forward by hooks: exponents of the layers, sizes of the activations."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from ..nn.int8_layers import _Int8Layer
from .capture import may_be_left_out


@may_be_left_out
class _Nothing:
    """A hook that watches for nobody."""

    def __call__(self, *args) -> None:
        pass


class _Hook(_Nothing):
    """A hook of a model that is watched: a replay may leave it out, and a copy or a pickle of the model is not watched."""

    def __init__(self, run) -> None:
        self.run = run

    def __call__(self, *args) -> None:
        self.run(*args)

    def __reduce__(self):
        return _Nothing, ()


class Activations:
    """The hooks of :class:`ezo_kernels.Diagnostics`."""

    def _arm(self) -> None:
        model = self.optimizer.model
        self._hooks.append(model.register_forward_pre_hook(_Hook(self._enter)))
        self._hooks.append(model.register_forward_hook(_Hook(self._leave)))
        for name, module in model.named_modules():
            if isinstance(module, _Int8Layer):
                self._hooks.append(module.register_forward_hook(_Hook(self._note_exponent(name))))
            elif not self.integer and not any(module.children()):
                self._hooks.append(module.register_forward_hook(_Hook(self._note_size)))

    def _disarm(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _in_a_step(self) -> bool:
        """Whether the forward that runs is one of a step, not of an evaluation between two."""
        return self.optimizer.zo.p is not None if self.zeroth else self.optimizer.model.training

    def _enter(self, module, args) -> None:
        self._kept = {} if self._in_a_step() else None

    def _leave(self, module, args, out) -> None:
        if self._kept is not None:
            self.kept_bytes = max(self.kept_bytes, sum(n for ref, n in self._kept.items() if not ref.expired()))
        self._kept = None

    def _note_size(self, module, args, out) -> None:
        if self._kept is None:
            return
        outputs = _tensors(out)
        if any(t.requires_grad for t in outputs):
            # Weak references: what is freed does not count, and its address names nothing else while one is held.
            for t in outputs:
                self._kept[StorageWeakRef(t.untyped_storage())] = t.nbytes
        else:
            self.passing_bytes = max(self.passing_bytes, sum(t.nbytes for t in (*_tensors(args), *outputs)))

    def _note_exponent(self, name: str):
        def note(module, args, out) -> None:
            # The trial pass that plans the arena has no values; what is captured would be written again by every replay.
            if self._in_a_step() and out.exponent.device.type != "meta" and not _capturing(out.exponent):
                self._exponents[name] = out.exponent.amax()
                self._first_exponents.setdefault(name, self._exponents[name])

        return note


def _capturing(t: torch.Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

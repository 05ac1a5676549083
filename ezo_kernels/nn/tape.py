"""Backpropagation through the integer head, as NITI does it (arXiv 2009.13108): notes of a forward, gone through backwards.

For a linear layer y = x W^T + b with the error e of y (int8, an exponent a group):

    G_W = e^T x    G_b = sum over rows of e    error of x = requantise(e W)

each a product of int8 in int32; errors are rounded to nearest, a shift a group. Layers use the weights of the forward: the
update comes after. A frozen layer passes its error on. A branch that sees no layer of the trunk has one group in the forward,
and as many as the error in the backward. A layer that ended in a relu has no error where its output is 0: what rounds it
sees to that, or if it has another origin (a sum, a loss, a reshape) an operator of its own.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from ..ops import _library
from ..ops._constants import MOST_TERMS
from ..ops.int8_head import HeadGradient
from ..ops.int8_matmul import gemm, requantize
from ..ops.int8_pointwise import int8_add
from ..ops.int8_tensor import Int8Tensor, counters

#: What a note can be of; others are refused when the backward meets them.
KINDS = ("linear", "relu", "reshape", "add")
#: Errors of a bias, rows of all groups, that are kept for the update to add up where launches count; of more their sum is,
#: which is smaller.
MOST_ERRORS = 1 << 16


@dataclass(frozen=True)
class Note:
    kind: str
    y: Int8Tensor
    inputs: tuple[Int8Tensor, ...]
    info: dict


class Tape:
    """What the layers of the head did in one pass.

    Args:
        groups: of the whole step, over which a gradient is summed.

    Attributes:
        gradients: parameter's qualified name -> its gradients of each group, a call each, filled by :meth:`backward`.
    """

    def __init__(self, groups: int = 1) -> None:
        self.groups = groups
        self.notes: list[Note] = []
        self._terms: dict[str, int] = defaultdict(int)
        self._readers: dict[int, int] = defaultdict(int)
        self._relus: set[int] = set()
        self._gated: set[int] = set()
        self.gradients: dict[str, list[HeadGradient]] = defaultdict(list)

    def counters(self) -> int:
        """How often at most a backward of these notes asks for a counter a group, and the loss's error for its exponents."""
        return 1 + sum(note.kind == "linear" for note in self.notes)

    def note(self, kind: str, y: Int8Tensor, inputs: tuple[Int8Tensor, ...], **info) -> None:
        if kind not in KINDS:
            behind = next((n.info["layer"].head_names for n in reversed(self.notes) if n.kind == "linear"), {})
            after = next((f", behind {name.rpartition('.')[0]!r}" for name in behind.values()), "")
            raise NotImplementedError(
                f"the head calls {kind}, which has no integer backward ({', '.join(KINDS)} have){after}: move the cut behind it"
            )
        if info.get("relu"):
            self._relus.add(id(y))
        for x in inputs:
            self._readers[id(x)] += 1
        self.notes.append(Note(kind, y, inputs, info))

    def backward(self, y: Int8Tensor, error: torch.Tensor, exponent: torch.Tensor, used: slice) -> None:
        """Collect the gradients of all layers.

        Args:
            y: the head's output.
            error: int8 of y's shape. exponent: int32 [G].
            used: which groups the head learns from.
        """
        errors = {id(y): Int8Tensor(_groups(error, y.groups, used), exponent[used].contiguous())}
        while self.notes:
            note = self.notes.pop()
            e = errors.pop(id(note.y), None)
            if e is None:
                continue
            if note.info.get("relu") and id(note.y) not in self._gated:
                (e,) = self._relu(note, e, used)
            for x, of_x in zip(note.inputs, getattr(self, "_" + note.kind)(note, e, used), strict=True):
                if of_x is not None and x.tape is not None:
                    errors[id(x)] = int8_add(errors[id(x)], of_x) if id(x) in errors else of_x
        if errors and y.tape is not None:  # beside other paths to a layer its gradient would silently be a part
            shape = next(tuple(e.shape[1:]) for e in errors.values())
            raise NotImplementedError(
                f"the head's backward meets an Int8Tensor [rows, {', '.join(map(str, shape))}] that no layer or function made: "
                "call torch's functions (F.relu, +, torch.reshape) rather than operators of ezo_kernels.ops, and let no hook "
                "of the head return another Int8Tensor"
            )

    def _linear(self, note: Note, e: Int8Tensor, used: slice):
        layer, (x,) = note.info["layer"], note.inputs
        n, k = layer.weight.shape
        values = _groups(x.values, x.groups, used if x.groups > 1 else slice(None))
        of_y, of_x = e.values.view(e.groups, -1, n), values.reshape(min(x.groups, e.groups), -1, k)
        x_exponent = x.exponent[used] if x.groups > 1 else x.exponent
        names = layer.head_names
        for name in names.values():  # a layer may be called more than once
            self._terms[name] += of_y.shape[1] * self.groups
            if self._terms[name] > MOST_TERMS:
                raise ValueError(
                    f"{name}: its gradient sums {self._terms[name]} products over {self.groups} groups, and int32 holds "
                    f"{MOST_TERMS}; use fewer rows or queries"
                )
        if "weight" in names:
            acc = gemm(of_y.transpose(1, 2), of_x.transpose(1, 2), None)
            self.gradients[names["weight"]].append(HeadGradient(acc, e.exponent, x_exponent))
        if "bias" in names:
            grad = HeadGradient(of_y, e.exponent)
            keep = _library.bound_by_launches(of_y.device) and of_y.numel() <= MOST_ERRORS
            self.gradients[names["bias"]].append(grad if keep else grad.summed())
        if x.tape is None:
            return (None,)
        peak = counters(x, e.groups)
        acc = gemm(of_y, layer.weight.t()[None], peak).view(-1, *x.shape[1:])
        gate = None
        if id(x) in self._relus and self._readers[id(x)] == 1:  # of several readers errors are added first
            self._gated.add(id(x))
            gate = values
        return (requantize(acc, peak, e.exponent, layer.weight_exponent, "nearest", gate),)

    @staticmethod
    def _relu(note: Note, e: Int8Tensor, used: slice):
        off = _groups(note.y.values, note.y.groups, used) <= 0
        values = e.values.view(-1, *off.shape).masked_fill(off, 0)  # one mask for all groups if y has one
        return (Int8Tensor(values.flatten(0, 1), e.exponent),)

    @staticmethod
    def _reshape(note: Note, e: Int8Tensor, used: slice):
        return (Int8Tensor(e.values.view(-1, *note.inputs[0].shape[1:]), e.exponent),)

    @staticmethod
    def _add(note: Note, e: Int8Tensor, used: slice):
        return e, e


def _groups(values: torch.Tensor, groups: int, used: slice) -> torch.Tensor:
    """Rows of the groups that are used, of values [groups * B, ...]."""
    if used == slice(None) or groups == 1:
        return values
    return values.reshape(groups, -1, *values.shape[1:])[used].flatten(0, 1)

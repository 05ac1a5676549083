"""One pass of an integer step: the forward in the arena, its groups' losses, the head's gradients; and g of a step."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
import torch.nn.functional as F

from ..nn.tape import Tape
from ..ops.int8_loss import (
    MOST_ROWS,
    MOST_SQUARES,
    check_sum,
    int8_cross_entropy,
    int8_cross_entropy_gradient,
    int8_squared_error,
)
from ..ops.int8_signs import MOST_GROUPS, Signs, int8_signs, ternary_gradient
from ..ops.int8_tensor import Int8Tensor, check_exponent, counters
from ..ops.int8_update import Int8UpdatePlan
from ..ops.noise import fold_key
from .check import unvisited
from .losses import grouped_losses


def one_value(loss, whose: str) -> torch.Tensor:
    """A loss that a user's function returned, as [1].

    Raises:
        ValueError: it is no tensor of one real element.
    """
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.is_complex():
        what = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"{whose} must return a tensor of one element, a real number; got {what}")
    return loss.detach().reshape(1)


class Int8Passes:
    """The passes of :class:`ezo_kernels.ElasticZOInt8`."""

    def _input(self, x, what: str = "x") -> Int8Tensor:
        if isinstance(x, torch.Tensor) and x.dtype == torch.int8:
            x = Int8Tensor(x, torch.zeros(1, dtype=torch.int32, device=x.device))
        if not isinstance(x, Int8Tensor):
            integers = isinstance(x, torch.Tensor) and not x.is_floating_point()
            floats = f"{what}.float()" if integers else what  # quantize takes no integers
            if what == "x":
                otherwise = ", or images with ezo_kernels.data.quantize_images"
            else:
                otherwise = "; if it is class labels, use loss='cross_entropy'" if integers else ""
            raise TypeError(
                f"{what} must be an Int8Tensor or int8, got {getattr(x, 'dtype', type(x).__name__)}: quantise it with "
                f"ezo_kernels.quantize({floats}){otherwise}"
            )
        if x.groups != 1 or not x.dim() or not x.shape[0]:
            raise ValueError(f"{what} must be a batch of one group with at least one row, got {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"{what} is on {x.device} and the model on {self.device}")
        if not x.is_cuda:  # where it costs no wait
            check_exponent(int(x.exponent), f"the exponent of {what}")
        return x

    def _target(self, y):
        if self.loss == "squared_error":
            return self._input(y, "y")
        if isinstance(y, Int8Tensor):
            raise TypeError(f"y must be int64 labels for loss {self.loss!r}, got an Int8Tensor")
        return y

    def _require_visits(self) -> None:
        """Refuse a pass that left out a layer of the trunk: its update would be noise."""
        if not self.zo.traced and len(self.zo.visited) < len(self.trunk):
            raise ValueError(unvisited(self.zo, {s.site: s.names[0] for s in self.zo.manifest}))

    def _check_places(self) -> None:
        """Before anything is written: where the parameters of the updates lie, or ValueError."""
        if self.trunk and (self._update_plan is None or not self._update_plan.fits(self.trunk)):
            self._update_plan = Int8UpdatePlan.build(self.trunk, self._sites, self._layouts)
        for name, w in self._head.items():
            if not w.is_contiguous():
                raise ValueError(f"{name} of the head, of shape {tuple(w.shape)}, is not contiguous")

    @contextlib.contextmanager
    def _running(self, p):
        for layer, strategy in self._strategies.items():  # another optimizer of the same model may want others
            layer.strategy, layer.rounding, layer.weights = strategy, self.activation_rounding, self.weights
        self.zo.tape = Tape(self._groups) if self.head else None
        try:
            with self.zo.running(p) if p is not None else contextlib.nullcontext():
                yield self.zo.tape
        finally:
            if (
                self.zo.tape is not None
            ):  # of a pass that the head does not learn from: notes hold what they are of, in a circle
                self.zo.tape.notes.clear()
            self.zo.tape = None

    def _fold_key(self, zeros: torch.Tensor | None = None) -> None:
        """The key of a step, once, and the zeros of its first pass in the same launch."""
        fold_key(self._seed, self._step, self._key, zeros)

    def _makes_signs(self, p) -> bool:
        """Whether the losses of this pass are integers, and all of a step with a trunk: their launch makes g, too."""
        return p is not None and p.groups == self._groups <= MOST_GROUPS and self.loss != "float_cross_entropy"

    def _run(self, x: Int8Tensor, y, p, loss_fn, first: bool):
        """Losses of the groups of one pass, ``first`` of its step, the head's gradients, and g where the losses are all."""
        plan = self._plan(x, p)
        x = dataclasses.replace(x, memory=self.arena)
        if first:
            zeros = torch.empty(plan.counters, dtype=torch.int32, device=self.device)
            self._fold_key(zeros)
        else:
            zeros = torch.zeros(plan.counters, dtype=torch.int32, device=self.device)
        with self.arena.running(plan, zeros), self._running(p) as tape:
            with self._phase("forward"):
                out = self.model(x)
            groups = 1 if p is None else p.groups
            if not isinstance(out, Int8Tensor):
                raise TypeError(f"the model must return an Int8Tensor, got {type(out).__name__}")
            if out.groups != groups:
                raise ValueError(
                    f"the output has {out.groups} groups and the pass {groups}: it does not depend on the trunk"
                )
            with self._phase("loss"):
                signs = Signs.of(out, self.queries, self.antithetic) if self._makes_signs(p) else None
                losses, error = self._losses_of(out, y, loss_fn, signs)
            used = self._used(p)
            if tape is not None and used is not None:
                with self._phase("head backward"):
                    self._backward(tape, out, y, error, used, p)
            gradients = {} if tape is None else dict(tape.gradients)
            del out, x
        return losses, gradients, signs

    def _losses_of(self, out: Int8Tensor, y, loss_fn, signs: Signs | None):
        passes = self._groups // out.groups  # whose losses are added to these
        if self.loss == "squared_error":
            check_sum(passes * out.values.numel(), MOST_SQUARES, "squared_error: values")
            found = int8_squared_error(out, y, gradient=bool(self.head), signs=signs)
            return found if self.head else (found, None)
        if self.loss == "cross_entropy":
            check_sum(passes * out.shape[0], MOST_ROWS, "cross_entropy: rows")
            return int8_cross_entropy(out, y, fraction_bits=self.fraction_bits, signs=signs), None
        logits, loss_fn = out.dequantize(), loss_fn or F.cross_entropy
        losses = grouped_losses(loss_fn, logits, y, out.groups)
        if losses is None:
            losses = torch.cat([one_value(loss_fn(part, y), "loss_fn") for part in logits.chunk(out.groups)])
            losses = losses if losses.is_floating_point() else losses.long()  # a count, or a bool
        return losses, None

    def _used(self, p) -> slice | None:
        """The groups of this pass that the head learns from."""
        if self.head_grad == "mean" or p is None:
            return slice(None)
        sign = 1 if self.head_grad == "plus" else -1
        if len(p.signs) == 1:
            return slice(None) if p.signs[0] == sign else None
        return slice(0 if sign == 1 else 1, None, 2)

    def _backward(self, tape: Tape, out: Int8Tensor, y, error, used: slice, p) -> None:
        exponent = counters(out, out.groups)  # zeros
        if error is None:
            first = 0 if p is None else p.query * (1 + self.antithetic) + (p.signs[0] == -1)
            error = int8_cross_entropy_gradient(out, y, self._key, query=first, rounds=self.rounds)
        tape.backward(out, error, exponent, used)
        missing = [n for n in self._head if n not in tape.gradients]
        if missing:
            raise ValueError(
                f"the output does not depend on {', '.join(map(repr, missing))} of the head: freeze or use them"
            )

    def _judge(self, signs: Signs | None, closure: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sets g and counts the step: the losses, summed, and whether those of floats are finite.

        With ``signs``, made with the losses, the update counts: till then the call may raise, and nothing have changed.
        """
        losses = self.losses
        if signs is not None:
            self.g = signs.g
            return signs.total, None
        if not losses.is_floating_point() and not closure:  # a closure's may be any integers, whose sum wraps
            queries = self.queries if self.trunk else 0
            g, total = int8_signs(losses, queries=queries, antithetic=self.antithetic, step=self._step)
            self.g = g if self.trunk else self.g
            return total, None
        ok = torch.isfinite(losses).all() if losses.is_floating_point() else None
        if self.trunk:
            g = ternary_gradient(losses, self.antithetic)
            self.g = g if ok is None else g * ok
        self._step += 1 if ok is None else ok
        if ok is not None:
            self.skipped += ~ok
        return losses.sum(), ok

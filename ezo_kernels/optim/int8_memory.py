"""Where the intermediates of an integer step live: plans by trial passes, and the strategy of each layer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import nn

from ..nn.arena import ArenaPlan
from ..ops._perturbation import PassError
from ..ops.int8_signs import Signs
from ..ops.int8_tensor import Int8Tensor, counters

#: Errors of a forward that may come of what has no integer form. A user's own subclass keeps its class and gets a note.
_OWN = (AttributeError, NotImplementedError, TypeError, ValueError)


@contextlib.contextmanager
def named_errors(model: nn.Module) -> Iterator[None]:
    """Errors of a trial forward say which module's forward they come of, and why a value was not there to be read."""
    running: list[tuple[str, nn.Module]] = []

    def enter(name: str):
        def hook(module, inputs) -> None:
            running.append((name, module))

        return hook

    def leave(module, inputs, output) -> None:
        while running and running.pop()[1] is not module:
            pass

    hooks = []
    for name, module in model.named_modules():
        hooks += module.register_forward_pre_hook(enter(name), prepend=True), module.register_forward_hook(leave)
    try:
        yield
    except (RuntimeError, *_OWN) as error:
        if isinstance(error, PassError):
            raise
        name, module = running[-1] if running else ("", model)
        where = f"{name} ({type(module).__name__}): " if name else ""
        if isinstance(error, (RuntimeError, TypeError)) and re.search("meta (tensor|device)", str(error)):
            raise RuntimeError(
                f"{where}a value is read here ({error}). The first step with an input of a new shape runs the model once "
                "without values, on the meta device, to plan its memory: read values outside of steps, or not where "
                "tensor.is_meta"
            ) from error
        if where and type(error) in _OWN:
            raise type(error)(where + str(error)) from error
        if where and isinstance(error, _OWN):
            error.add_note(f"in the forward of {where.removesuffix(': ')}")
        raise
    finally:
        for hook in hooks:
            hook.remove()


class Int8Memory:
    """Memory of :class:`ezo_kernels.ElasticZOInt8`."""

    def memory(self) -> dict[str, int]:
        """Bytes of the intermediates of the largest pass so far: planned, measured, all at once (the paper's tally), live.

        And of the parameters, and of the remainders of the head's. A closure's passes are not planned: they are in torch's
        allocator, and count as 0 here.
        """
        plans = list(self._plans.values())
        if not plans and self._by_closure is None:
            raise ValueError("no step was taken yet")
        largest = max(plans, key=lambda plan: plan.planned_bytes, default=ArenaPlan())
        return {
            "planned_bytes": largest.planned_bytes,
            "measured_bytes": max((plan.measured_bytes for plan in plans), default=0),
            "all_at_once_bytes": largest.all_at_once_bytes,
            "live_bytes": largest.live_bytes,
            "parameter_bytes": sum(p.numel() for p in self.model.parameters()),
            "remainder_bytes": sum(r.numel() for r in self._remainders.values()),
        }

    def _baked(self) -> tuple:
        trunk = self.param_groups[0]
        return trunk["r_max"], trunk["p_zero"]

    def _held(self) -> list[torch.Tensor]:
        held = list(self._remainders.values())
        return held if self.arena.buffer is None else [self.arena.buffer, *held]

    def _tables(self) -> object:
        return self._update_plan, self.arena.buffer

    def _looks(self) -> bool:
        return False

    def _record(self, x: Int8Tensor, p) -> ArenaPlan:
        """The plan of a pass, from a trial on the meta device."""
        trial = Int8Tensor(x.values.to("meta"), x.exponent.to("meta"), self.arena)
        with self.arena.recording() as found, self._running(p) as tape:
            with named_errors(self.model):
                y = self.model(trial)
            if not isinstance(y, Int8Tensor):
                raise TypeError(f"the model must return an Int8Tensor, got {type(y).__name__}")
            if self._makes_signs(p):  # as the loss takes them
                Signs.of(y, self.queries, self.antithetic)
                counters(y, 1)
            counters(y, y.groups, torch.int64)
            for _ in range(0 if tape is None else tape.counters()):
                self.arena.counters(y.groups, torch.int32)
            del y, trial
        return found[0]

    def _plan(self, x: Int8Tensor, p) -> ArenaPlan:
        key = (tuple(x.shape), 1 if p is None else p.groups)
        plan = self._plans.get(key)
        if plan is not None:
            return plan
        strategy = self.strategy
        if strategy == "auto" and self.device.type == "cpu":
            strategy = "twice"  # the CPU keeps what it can of the first time: see docs/numerics.md
        if strategy != "auto":
            self._strategies = dict.fromkeys(self._strategies, strategy)
        plan = self._record(x, p)
        # the first shape decides; what it decided holds for all
        while strategy == "auto" and not self._plans and (owners := plan.at_the_peak()):
            before = dict(self._strategies)
            self._strategies.update(dict.fromkeys(owners, "twice"))
            smaller = self._record(x, p)
            if smaller.planned_bytes >= plan.planned_bytes:
                self._strategies = before
                break
            plan = smaller
        self._plans[key] = plan
        return plan

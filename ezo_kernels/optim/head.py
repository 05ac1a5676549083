"""The head's optimiser, made to leave everything alone on a step that is skipped, without asking the host."""

from __future__ import annotations

import contextlib
import inspect

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..ops import _library
from ..ops.coefficients import in_one_launch
from .arguments import rate


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class GuardedOptimizer:
    """Runs a torch optimizer's step so that it takes effect only where ``ok`` (a bool on the device) is true.

    An optimizer made with ``fused=True`` does that itself, by the flag that torch's GradScaler gives it, and reads its learning
    rates from device scalars that :meth:`fill` keeps: a captured step of it sees them change. Plain SGD needs no more than
    zeroed gradients. Any other optimizer moves its parameters or its state even then, so both are held and put back. What its
    state begins with is its own business (not always zeros: NAdam, Rprop), so the first step, which makes the state, asks the
    host; state that a later one makes is zeroed if that step is skipped.

    Args:
        optimizer: over the head's parameters.
        own: it is the library's own plain SGD, whose step :func:`ezo_kernels.ops.coefficients.coefficients` may take.

    Raises:
        NotImplementedError: an optimizer whose state lives on another device than its parameters (Adam without ``fused`` or
            ``capturable`` on CUDA): it could not be put back without the host. One that needs a closure (LBFGS), or sparse
            gradients (SparseAdam).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, own: bool = False) -> None:
        self.optimizer, self._own = optimizer, own
        self._settled = False
        groups = optimizer.param_groups
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if isinstance(optimizer, torch.optim.SparseAdam) or (closure is not None and closure.default is closure.empty):
            raise NotImplementedError(
                f"{type(optimizer).__name__} cannot train the head: it needs a closure or sparse gradients, and a step has "
                "the dense gradients of one batch"
            )
        counts = isinstance(optimizer, (torch.optim.Adagrad, torch.optim.Adafactor))
        if any(
            p.is_cuda and (counts or "betas" in g or "capturable" in g) and not (g.get("capturable") or g.get("fused"))
            for g in groups
            for p in g["params"]
        ):
            ways = [f"{name}=True" for name in ("fused", "capturable") if name in optimizer.defaults]
            raise NotImplementedError(
                f"{type(optimizer).__name__} keeps its step count on the host: "
                + (f"make it with {' or '.join(ways)}" if ways else "take another head optimizer")
            )
        self._lrs: list[torch.Tensor] = []
        self._filled: list[float] = []
        if self.fused or own and _library.bound_by_launches(groups[0]["params"][0].device):
            self._lrs = [torch.zeros((), dtype=torch.float32, device=g["params"][0].device) for g in groups]
            self._filled = [0.0] * len(groups)

    @property
    def fused(self) -> bool:
        """Whether the optimizer takes learning rates and the flag of a skipped step from the device."""
        groups = self.optimizer.param_groups
        return all(g.get("fused") and g["params"] and not torch.is_tensor(g["lr"]) for g in groups)

    def refusals(self) -> list[str]:
        """Why a step of this optimizer cannot be captured; empty if it can."""
        name, groups = type(self.optimizer).__name__, self.optimizer.param_groups
        found = []
        if any(torch.is_tensor(g["lr"]) for g in groups):
            found.append(f"the head's {name} has a tensor as lr, which load_state_dict replaces: give it a number")
        if not all(g.get("fused") for g in groups):
            found.append(f"the head's {name} would bake its learning rate into the graph: make it with fused=True")
        hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        if any(getattr(self.optimizer, hook, None) for hook in hooks):
            found.append(f"the head's {name} has step hooks, which a replay would not call")
        return found

    def settings(self) -> tuple:
        """All numbers but lr: those that a captured step has baked in."""
        names = [n for n in self.optimizer.defaults if n not in ("lr", "capturable")]
        return tuple(g.get(n) for g in self.optimizer.param_groups for n in names)

    def tensors(self) -> list[torch.Tensor]:
        """The optimizer's state on the device."""
        state = self.optimizer.state
        held = [state.get(p, {}) for g in self.optimizer.param_groups for p in g["params"]]
        return [value for own in held for value in own.values() if torch.is_tensor(value)]

    def fill(self) -> None:
        """Bring the device's learning rates up to date; nothing to do unless one changed."""
        # groups that were added later have none, and a rate that is a tensor is on the device already
        for i, (lr, group) in enumerate(zip(self._lrs, self.optimizer.param_groups, strict=False)):
            if not torch.is_tensor(group["lr"]) and group["lr"] != self._filled[i]:
                lr.fill_(group["lr"])
                self._filled[i] = group["lr"]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but into the tensors that are there: a captured step goes on reading them.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: a state of another optimizer; nothing is changed then.
        """
        optimizer = self.optimizer
        held = {"state": optimizer.state, "param_groups": optimizer.param_groups}
        before = {p: dict(own) for p, own in optimizer.state.items()}
        made = [{k: g[k] for k in ("fused", "foreach", "capturable") if k in g} for g in optimizer.param_groups]
        try:
            optimizer.load_state_dict(state_dict)
            self._require_loaded(held["param_groups"])
        except BaseException:
            # torch's own has put its new ones there by then, and has written no old one
            optimizer.__dict__.update(held)
            raise
        for group, own in zip(optimizer.param_groups, made, strict=True):
            group.update(own)  # how a step is carried out is this run's business, not that of the run that was saved
        for p, own in optimizer.state.items():
            for name, new in own.items():
                old = before.get(p, {}).get(name)
                if torch.is_tensor(old) and old.shape == new.shape and old.dtype == new.dtype:
                    own[name] = old.copy_(new)

    def _require_loaded(self, ours: list[dict]) -> None:
        """Refuse settings, just loaded, that this optimizer cannot take a step with; ``ours`` it had before.

        torch takes those of any other optimizer whose groups are as many and as large.
        """
        whose = type(self.optimizer).__name__
        for group, own in zip(self.optimizer.param_groups, ours, strict=True):
            if missing := sorted(name for name in self.optimizer.defaults if name in own and name not in group):
                raise ValueError(f"the head's state in it is none of {whose}: it lacks {', '.join(missing)}")
            if not torch.is_tensor(group["lr"]):
                rate(group["lr"], "lr of the head")
        if not all(isinstance(own, dict) for own in self.optimizer.state.values()):
            raise ValueError(f"the head's state in it is none of {whose}")

    def _plain_sgd(self) -> bool:
        return type(self.optimizer) is torch.optim.SGD and not any(
            g["momentum"] or g["weight_decay"] for g in self.optimizer.param_groups
        )

    def small_sgd(self, learning: list[torch.nn.Parameter]) -> dict:
        """The arguments by which ``coefficients`` takes the step of these, which have gradients; none if it cannot.

        Then the step counts as this optimizer's own, for torch's schedulers.
        """
        groups, hooks = self.optimizer.param_groups, ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        plain = (
            self._own and self._lrs and len(groups) == 1 and self._plain_sgd() and not torch.is_tensor(groups[0]["lr"])
        )
        if not plain or groups[0]["maximize"] or any(getattr(self.optimizer, hook, None) for hook in hooks):
            return {}
        # what somebody has put around it must be called; torch's schedulers only count
        step = vars(self.optimizer).get("step")
        if step is not None and not getattr(step, "_wrapped_by_lr_sched", False):
            return {}
        if _global_optimizer_pre_hooks or _global_optimizer_post_hooks or not in_one_launch(learning):
            return {}
        if any(p.dtype != p.grad.dtype for p in learning):
            return {}
        self.fill()
        self.optimizer._opt_called = True
        return {"weights": learning, "head_lr": self._lrs[0]}

    @torch.no_grad()
    def step(self, ok: torch.Tensor, skip: torch.Tensor) -> None:
        """One step with the gradients in ``.grad``, where ``ok``; ``skip`` fp32 [] says the opposite in torch's form."""
        parameters = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        if self._lrs and self.fused:
            self._fused_step(ok, skip, parameters)
            return
        if self._plain_sgd():
            zeros = {p.dtype: skip.new_zeros((), dtype=p.dtype) for p in parameters}
            for p in parameters:
                p.grad = torch.where(ok, p.grad, zeros[p.grad.dtype])
            self.optimizer.step()
            return
        state = self.optimizer.state
        if not self._settled and not isinstance(ok, torch._subclasses.FakeTensor):
            if not any(state.get(p) for p in parameters) and not bool(ok):
                return
            self._settled = True
        before = [(p, p.clone()) for p in parameters]
        held = {p: {k: v.clone() for k, v in state[p].items() if torch.is_tensor(v)} for p in parameters if p in state}
        self.optimizer.step()
        for p, old in before:
            p.copy_(torch.where(ok, p, old))
            for name, new in state[p].items():
                if torch.is_tensor(new):
                    old = held.get(p, {}).get(name)
                    new.copy_(torch.where(ok.to(new.device), new, torch.zeros_like(new) if old is None else old))

    def _fused_step(self, ok: torch.Tensor, skip: torch.Tensor, parameters: list[torch.Tensor]) -> None:
        state = self.optimizer.state
        known = {p: set(state.get(p, {})) for p in parameters}
        self.fill()
        with self._device_numbers(skip):
            self.optimizer.step()
        for p in parameters:
            for name, new in state[p].items():
                # A skipped first step leaves a new momentum buffer as it was allocated: uninitialised.
                if name not in known[p] and torch.is_tensor(new):
                    new.copy_(torch.where(ok, new, torch.zeros_like(new)))

    @contextlib.contextmanager
    def _device_numbers(self, skip: torch.Tensor):
        """The optimizer with its learning rates and the flag of a skipped step on the device, for the time of a step."""
        groups, capturing = self.optimizer.param_groups, _capturing()
        held = [(g["lr"], g.get("capturable")) for g in groups]
        self.optimizer.grad_scale, self.optimizer.found_inf = None, skip
        try:
            for group, lr in zip(groups, self._lrs, strict=True):
                group["lr"] = lr
                if capturing and "capturable" in group:  # asked of every capture; fused state is on the device anyway
                    group["capturable"] = True
            yield
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf
            for group, (lr, capturable) in zip(groups, held, strict=True):
                group["lr"] = lr
                if capturable is not None:
                    group["capturable"] = capturable


def make_head_optimizer(
    head: list[torch.nn.Parameter], made, lr: float, *, fused: bool
) -> torch.optim.Optimizer | None:
    """The optimizer of the head: ``made``, or what it makes of the parameters, or SGD; None for an empty head.

    Args:
        head: its parameters.
        made: a torch optimizer, a function of the parameters that returns one, or None.
        lr, fused: of the SGD, if nothing is given.

    Raises:
        TypeError: no optimizer.
        ValueError: one of other parameters, or for an empty head.
    """
    if not head:
        if made is not None:
            raise ValueError("head_optimizer was given but the head has no parameter")
        return None
    if made is None:
        return torch.optim.SGD(head, lr=lr, fused=fused or None)
    if not (isinstance(made, torch.optim.Optimizer) or callable(made)):
        raise TypeError(
            f"head_optimizer must be a torch optimizer or a function that makes one, got {type(made).__name__}"
        )
    optimizer = made if isinstance(made, torch.optim.Optimizer) else made(head)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"head_optimizer must give a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = {id(p) for p in head}
    if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("head_optimizer holds parameters that are not the head's")
    return optimizer

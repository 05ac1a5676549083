"""The head's optimiser, made to leave everything alone on a step that is skipped, without asking the host."""

from __future__ import annotations

import torch


class GuardedOptimizer:
    """Runs a torch optimizer's step so that it takes effect only where ``ok`` (a bool on the device) is true.

    Plain SGD needs no more than zeroed gradients. Any other optimizer moves its parameters or its state even then, so both
    are held and put back; state that the step created is zeroed.

    Args:
        optimizer: over the head's parameters.

    Raises:
        NotImplementedError: an optimizer whose state lives on another device than its parameters (Adam without ``fused`` or
            ``capturable`` on CUDA): it could not be put back without the host.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        groups = optimizer.param_groups
        if any(
            p.is_cuda and "betas" in g and not (g.get("capturable") or g.get("fused"))
            for g in groups
            for p in g["params"]
        ):
            raise NotImplementedError(
                f"{type(optimizer).__name__} keeps its step count on the host: make it with fused=True or capturable=True"
            )

    def _plain_sgd(self) -> bool:
        return type(self.optimizer) is torch.optim.SGD and not any(
            g["momentum"] or g["weight_decay"] for g in self.optimizer.param_groups
        )

    @torch.no_grad()
    def step(self, ok: torch.Tensor) -> None:
        """One step with the gradients in ``.grad``, where ``ok``."""
        parameters = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        if self._plain_sgd():
            for p in parameters:
                p.grad = torch.where(ok, p.grad, torch.zeros_like(p.grad))
            self.optimizer.step()
            return
        state = self.optimizer.state
        before = [(p, p.clone()) for p in parameters]
        held = {p: {k: v.clone() for k, v in state[p].items() if torch.is_tensor(v)} for p in parameters if p in state}
        self.optimizer.step()
        for p, old in before:
            p.copy_(torch.where(ok, p, old))
            for name, new in state[p].items():
                if torch.is_tensor(new):
                    old = held.get(p, {}).get(name)
                    new.copy_(torch.where(ok.to(new.device), new, torch.zeros_like(new) if old is None else old))

"""What ElasticZO is held against: eager in-place MeZO, backpropagation, and a frozen trunk with a trained head.

All take a plain torch model, are torch optimizers, and have ``train_step(x, y, loss_fn)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.cut import in_head, resolve_head
from ..nn.plan import make_plan
from ..ops import materialize
from ..ops.noise import Noise
from .batches import call


class _Baseline:
    model: nn.Module

    def train_step(self, x, y, loss_fn=F.cross_entropy) -> torch.Tensor:
        """One step on a batch; the loss before it, detached."""
        return self.step(lambda: loss_fn(call(self.model, x, {}), y))


class MeZO(_Baseline, torch.optim.Optimizer):
    """MeZO as its authors wrote it: weights += eps z, forward, -= 2 eps z, forward, += eps z, -= lr g z, z drawn four times.

    With a head it is the eager form of ElasticZO: the head's gradient is the mean over both signs.

    Args:
        model: a plain torch model.
        lr, eps, queries, clip, seed: as in :class:`ezo_kernels.ElasticZO`.
        noise: a name of the noise contract, so that z is that of ElasticZO with the same seed; None draws from a
            ``torch.Generator``, as everybody else does.
        head, head_lr: as in :func:`ezo_kernels.convert_` and ElasticZO; 0 is MeZO itself.
        p_zero, rounds: of the noise.
    """

    def __init__(
        self, model, lr=1e-4, eps=1e-3, queries=1, clip=None, seed=0, *, noise="gaussian", head=0, head_lr=0.05,
        p_zero=0.0, rounds=7,
    ) -> None:  # fmt: skip
        named = dict(model.named_parameters(remove_duplicate=False))
        self.model, self.sites = model, make_plan(model, head).sites
        self.trunk = [named[s.names[0]] for s in self.sites]
        own = {id(p) for p in self.trunk}
        self.head = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        super().__init__([{"params": self.trunk, "lr": lr, "eps": eps, "name": "trunk"}], {"lr": lr, "eps": eps})
        if self.head:
            self.add_param_group({"params": self.head, "lr": head_lr, "name": "head"})
        for p in self.trunk:
            p.requires_grad_(False)
        self.queries, self.clip, self.seed, self.steps = queries, clip, seed, 0
        self.noise = None if noise is None else Noise(noise, rounds, p_zero)
        device = self.trunk[0].device if self.trunk else "cpu"
        self._generator = torch.Generator(device)

    def _directions(self, query: int):
        """z of every trunk parameter, one after the other."""
        if self.noise is None:
            # One seed a direction, as MeZO does, so that the same numbers come again in the next sweep.
            self._generator.manual_seed((self.seed * 1_000_003 + self.steps) * 4096 + query)
            for p in self.trunk:
                yield p, torch.randn(p.shape, generator=self._generator, device=p.device, dtype=p.dtype)
            return
        n = self.noise
        extra = {"p_zero": n.p_zero} if n.p_zero else {}
        for p, s in zip(self.trunk, self.sites, strict=True):
            z = materialize(
                p.shape, seed=self.seed, step=self.steps, site=s.site, query=query, noise=n.name, device=p.device,
                layout=s.layout, rounds=n.rounds, **extra,
            )  # fmt: skip
            yield p, z.to(p.dtype)

    @torch.no_grad()
    def _sweep(self, query: int, scale: float) -> None:
        for p, z in self._directions(query):
            p.add_(z, alpha=scale)

    def _loss(self, closure, share: float) -> torch.Tensor:
        with torch.set_grad_enabled(bool(self.head)):
            loss = closure()
            if self.head:
                torch.autograd.backward(loss * share, inputs=self.head)
        return loss.detach()

    def step(self, closure=None) -> torch.Tensor:
        """One step; ``closure()`` returns the loss and is called twice a query."""
        trunk = self.param_groups[0]
        eps, lr = trunk["eps"], trunk["lr"]
        share, losses, gs = 0.5 / self.queries, [], []
        for q in range(self.queries):
            self._sweep(q, eps)
            plus = self._loss(closure, share)
            self._sweep(q, -2 * eps)
            minus = self._loss(closure, share)
            self._sweep(q, eps)
            losses += [plus, minus]
            g = (plus - minus).item() / (2 * eps)
            gs.append(g if self.clip is None else max(-self.clip, min(self.clip, g)))
        for q, g in enumerate(gs):
            self._sweep(q, -lr * g / self.queries)
        with torch.no_grad():
            for p in self.head:
                p.add_(p.grad, alpha=-self.param_groups[1]["lr"])
                p.grad = None
        self.steps += 1
        return torch.stack(losses).mean()


class BackpropSGD(_Baseline, torch.optim.SGD):
    """Every parameter by backpropagation and torch's SGD."""

    def __init__(self, model: nn.Module, lr: float = 0.05, **sgd) -> None:
        self.model = model
        super().__init__(model.parameters(), lr=lr, **sgd)

    def step(self, closure=None) -> torch.Tensor:
        """One step; ``closure()`` returns the loss."""
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        loss.backward()
        super().step()
        return loss.detach()


class FrozenTrunk(BackpropSGD):
    """The head by backpropagation on a trunk that stays as it was initialised.

    What a zeroth-order trunk has to beat: a run that does not has trained nothing but the head.

    Args:
        model: a plain torch model.
        head: as in :func:`ezo_kernels.convert_`.
        lr: of the head's SGD.
    """

    def __init__(self, model: nn.Module, head, lr: float = 0.05, **sgd) -> None:
        chosen = resolve_head(model, head)
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and in_head(name, chosen))
        self.model = model
        torch.optim.SGD.__init__(self, [p for p in model.parameters() if p.requires_grad], lr=lr, **sgd)

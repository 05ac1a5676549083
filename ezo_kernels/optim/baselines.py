"""What ElasticZO is held against: eager in-place MeZO, backpropagation, and a frozen trunk with a trained head.

All take a plain torch model, are torch optimizers, and have ``train_step(x, y, loss_fn)``. The trunk of :class:`MeZO` and of
:class:`FrozenTrunk` has ``requires_grad=False`` from then on, and keeps it: whoever trains the model in another way after them
sets it back to True first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.cut import in_head, resolve_head
from ..nn.plan import make_plan
from ..ops import materialize
from ..ops.noise import Noise, check_index
from .arguments import number, rate, warn_user
from .batches import call
from .passes import Passes


class _Baseline:
    model: nn.Module

    def train_step(self, x, y, loss_fn=F.cross_entropy) -> torch.Tensor:
        """One step on a batch; the loss before it, detached."""
        return self.step(lambda: loss_fn(call(self.model, x, {}), y))

    def _require(self, closure) -> None:
        if closure is None:
            raise ValueError(
                f"{type(self).__name__}.step needs a closure that returns the loss; or call train_step(x, y)"
            )


class MeZO(_Baseline, torch.optim.Optimizer):
    """MeZO as its authors wrote it: weights += eps z, forward, -= 2 eps z, forward, += eps z, -= lr g z, z drawn four times.

    With a head it is the eager form of ElasticZO: the head's gradient is the mean over both signs. As there, a step whose
    losses are not finite is skipped: it counts in ``skipped`` and not in ``steps``. Its weights, and those of a step that
    raised, are back where they were but for the rounding of ``+ eps z - eps z``, which is MeZO's own; what the forward itself
    wrote, such as a batch norm's running statistics, stays.

    Args:
        model: a plain torch model.
        lr, eps, queries, clip, seed: as in :class:`ezo_kernels.ElasticZO`.
        noise: a name of the noise contract, so that z is that of ElasticZO with the same seed; None draws from a
            ``torch.Generator``, as everybody else does.
        head, head_lr: as in :func:`ezo_kernels.convert_` and ElasticZO; 0 is MeZO itself.
        p_zero, rounds: of the noise.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, naming it; nothing to train.
        NotImplementedError: noise that the device cannot make, a model that no conversion takes. The model is left as it was.
    """

    def __init__(
        self, model, lr=1e-4, eps=1e-3, queries=1, clip=None, seed=0, *, noise="gaussian", head=0, head_lr=0.05,
        p_zero=0.0, rounds=7,
    ) -> None:  # fmt: skip
        lr, eps = number(lr, "lr", least=0.0), number(eps, "eps", least=0.0, strict=True)
        head_lr = number(head_lr, "head_lr", least=0.0)
        self.clip = None if clip is None else number(clip, "clip", least=0.0, strict=True, held=False)
        self.queries, self.seed = check_index(queries, "queries", 1 << 12), check_index(seed, "seed", 1 << 64)
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        self.noise = None if noise is None else Noise(noise, rounds, p_zero)
        if noise == "sparse_int8":
            raise NotImplementedError("sparse_int8 is noise of integer layers: use 'sparse' for float weights")
        named = dict(model.named_parameters(remove_duplicate=False))
        self.model, self.sites = model, make_plan(model, head).sites
        self.trunk = [named[s.names[0]] for s in self.sites]
        own = {id(p) for p in self.trunk}
        self.head = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        if not self.trunk and not self.head:
            raise ValueError("the model has no parameter to train: all are frozen")
        self.device = (*self.trunk, *self.head)[0].device
        if self.noise is not None and not self.noise.portable and self.device.type == "cpu":
            raise NotImplementedError(f"noise {noise!r} exists on CUDA only: use 'gaussian' or 'clt4' on the CPU")
        super().__init__([{"params": self.trunk, "lr": lr, "eps": eps, "name": "trunk"}], {"lr": lr, "eps": eps})
        if self.head:
            self.add_param_group({"params": self.head, "lr": head_lr, "name": "head"})
        self.steps, self.skipped = 0, torch.zeros((), dtype=torch.int64, device=self.device)
        self._generator, self._told = torch.Generator(self.device), False
        for p in self.trunk:
            p.requires_grad_(False)

    def state_dict(self) -> dict:
        """torch's, with the steps taken, on which z depends, and the skipped ones."""
        return {**super().state_dict(), "steps": self.steps, "skipped": int(self.skipped)}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from :meth:`state_dict`. A state of before the counts were in it leaves those of here.

        Raises:
            TypeError, ValueError: a count that is none, and what torch refuses; nothing is changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"a state is a dict, got {type(state_dict).__name__}")
        counts = [(n, int(getattr(self, n))) for n in ("steps", "skipped")]
        steps, skipped = (check_index(state_dict.get(n, here), f"{n} of the state", 1 << 63) for n, here in counts)
        super().load_state_dict(state_dict)
        self.steps = steps
        self.skipped.fill_(skipped)

    def _directions(self, query: int):
        """z of every trunk parameter, one after the other."""
        if self.noise is None:
            # One seed a direction, as MeZO does, so that the same numbers come again in the next sweep.
            self._generator.manual_seed(((self.seed * 1_000_003 + self.steps) * 4096 + query) % (1 << 64))
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
            loss = Passes._loss(self, closure())
            if self.head:
                Passes._require_grad([loss])
                torch.autograd.backward(loss * share, inputs=self.head)
        # as ElasticZO has it: no mean is taken of integers, and bools have no difference
        return (loss if loss.is_floating_point() else loss.float()).detach().reshape(())

    def _pair(self, query: int, eps: float, closure, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses at both signs of a direction; the weights are unperturbed again whatever the closure raises."""
        self._sweep(query, eps)
        try:
            plus = self._loss(closure, share)
        except BaseException:
            self._sweep(query, -eps)
            raise
        self._sweep(query, -2 * eps)
        try:
            minus = self._loss(closure, share)
        finally:
            self._sweep(query, eps)
        return plus, minus

    def _rates(self) -> tuple[float, float, float]:
        """lr, eps and the head's lr of this step, which schedulers and users may have changed."""
        trunk, *others = self.param_groups
        head_lr = rate(others[0]["lr"], "lr of the head") if others else 0.0
        return rate(trunk["lr"], "lr"), number(trunk["eps"], "eps", least=0.0, strict=True), head_lr

    def _forget(self) -> None:
        for p in self.head:
            p.grad = None

    def step(self, closure=None) -> torch.Tensor:
        """One step; ``closure()`` returns the loss and is called twice a query."""
        self._require(closure)
        lr, eps, head_lr = self._rates()
        share, losses, gs = 0.5 / self.queries, [], []
        self._forget()  # what somebody else's backward has left is not of this step
        try:
            for q in range(self.queries):
                losses += self._pair(q, eps, closure, share)
                gs.append((losses[-2] - losses[-1]).item() / (2 * eps))
            # a g is finite where both of its losses are: the clip would make a full step of one that is not
            if all(map(math.isfinite, gs)):
                self._update(gs, lr, head_lr)
                self.steps += 1
            else:
                self.skipped += 1
        finally:
            self._forget()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _update(self, gs: list[float], lr: float, head_lr: float) -> None:
        learning = [p for p in self.head if p.grad is not None]
        if len(learning) < len(self.head) and not self._told:
            self._told = True
            unused = {id(p) for p in self.head} - {id(p) for p in learning}
            names = ", ".join(repr(name) for name, p in self.model.named_parameters() if id(p) in unused)
            warn_user(
                f"the head's {names} got no gradient, and will not learn from such a step: does the forward use it?"
            )
        for q, g in enumerate(gs):
            g = g if self.clip is None else max(-self.clip, min(self.clip, g))
            self._sweep(q, -lr * g / self.queries)
        for p in learning:
            p.add_(p.grad, alpha=-head_lr)


class BackpropSGD(_Baseline, torch.optim.SGD):
    """Every parameter by backpropagation and torch's SGD."""

    def __init__(self, model: nn.Module, lr: float = 0.05, **sgd) -> None:
        self.model = model
        super().__init__(model.parameters(), lr=lr, **sgd)

    def step(self, closure=None) -> torch.Tensor:
        """One step; ``closure()`` returns the loss."""
        self._require(closure)
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        loss.backward()
        super().step()
        return loss.detach()


class FrozenTrunk(BackpropSGD):
    """The head by backpropagation on a trunk whose parameters stay as they were initialised.

    What a zeroth-order trunk has to beat: a run that does not has trained nothing but the head. The trunk runs in the mode that
    the model is in, as a trained one does: in training mode its batch norms use the batch's statistics, and their running ones
    follow the data. Put them in eval mode for a trunk that moves in nothing.

    Args:
        model: a plain torch model.
        head: as in :func:`ezo_kernels.convert_`.
        lr: of the head's SGD.

    Raises:
        TypeError, ValueError: a head that is none, or that has nothing to train; what torch's SGD refuses. The model is left as
            it was.
    """

    def __init__(self, model: nn.Module, head, lr: float = 0.05, **sgd) -> None:
        chosen = resolve_head(model, head)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        own = [p for name, p in named.items() if in_head(name, chosen)]
        if not own:
            raise ValueError(f"the head {head!r} has no parameter to train, and a frozen trunk none either")
        self.model = model
        torch.optim.SGD.__init__(self, own, lr=lr, **sgd)
        for name, p in named.items():
            p.requires_grad_(in_head(name, chosen))

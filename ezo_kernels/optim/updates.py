"""What a step does once its losses are there: g, whether it counts, the trunk's update and the head's."""

from __future__ import annotations

import functools
import math

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..nn.grouped import update_batch_norms
from ..ops import UpdatePlan, _library, update_
from ..ops.coefficients import Coefficients, coefficients, in_one_launch
from .arguments import LARGEST, warn_user


def with_hooks(train_step):
    """``train_step`` with the hooks around it that torch calls around ``step``, where it updates."""
    hooked = torch.optim.Optimizer.profile_hook_step(train_step)

    @functools.wraps(train_step)
    def run(self, *args, **kwargs):
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        around = kwargs.get("update", True) and (own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)
        return (hooked if around else train_step)(self, *args, **kwargs)

    return run


class Updates:
    """Takes the step of :class:`ezo_kernels.ElasticZO` whose losses and head gradients have been collected."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the head's gradients, and with them all that ``train_step(update=False)`` has accumulated."""
        super().zero_grad(set_to_none)
        if self._micro and self.zo.p is None:
            self._drop()

    def _collect(self) -> None:
        """Leave losses and gradients to the next call, and note how: the mean of both is over the same micro-batches."""
        self._collected = self._gradients()

    def _gradients(self) -> list[int | None]:
        """How often each gradient of the head was written, None where there is none."""
        return [None if p.grad is None else p.grad._version for p in self.head]

    def _require_collected(self) -> None:
        if self._micro and self._gradients() != self._collected:
            raise ValueError(
                f"the head's gradients of the {self._micro} micro-batches accumulated so far were changed, or left behind by a "
                "copy of the model: between them only zero_grad() of this optimizer may touch gradients, and it forgets all"
            )

    @torch.no_grad()
    def _finish(self) -> torch.Tensor | None:
        """Take the step; the mean of its losses where they are those of one call."""
        if self._weights:
            self._renew_plan()
        bad = None
        if self.nodes is not None:
            with self._phase("nodes"):
                bad = self.nodes.solve(self._key, self.noise, self.queries, self.antithetic)
        with self._phase("g"):
            own, head_is_done = self._coefficients(bad)
        mean = own.mean if self._micro == 1 else None
        self.g, ok = own.g, own.ok
        try:
            # first, for it is code of others, that may raise
            if self.head_optimizer is not None and not head_is_done:
                with self._phase("head update"):
                    self.head_optimizer.step(ok, own.skip)
        except BaseException:
            self._step.sub_(ok.long())
            self.skipped.sub_(1 - ok.long().view(()))
            raise
        if self.trunk:
            with self._phase("update"):
                if self._weights:
                    self._update(own.coef)
                if self.nodes is not None:
                    self.nodes.apply(ok)
        if self.head and torch.is_autocast_enabled(self.device.type):
            torch.clear_autocast_cache()  # casts of the head's weights as they were, where autocast is around many steps
        update_batch_norms(self.zo, ok)
        for buffer, old in self._buffers:
            buffer.copy_(torch.where(ok, buffer, old))
        self._drop()
        return mean

    def _coefficients(self, bad: torch.Tensor | None) -> tuple[Coefficients, bool]:
        """g and the update's coefficients; whether losses, g and the head's gradients are finite: then the step counts.

        ``bad`` fp32 [1] is not 0 where something else is not finite, or None.

        True with them if the head's step has been taken, too.
        """
        learning = [p for p in self.head if p.grad is not None]
        if len(learning) < len(self.head) and not self._told:
            self._told = True
            names = [name for name, p in self._head_names.items() if p.grad is None]
            warn_user(
                f"the head's {', '.join(map(repr, names))} got no gradient, and will not learn from such a step: does the "
                "forward use it, outside of torch.utils.checkpoint(use_reentrant=True)?"
            )
        grads, small = [p.grad for p in learning], {}
        self.losses = self._losses
        if self._micro > 1:
            self.losses = self._losses / self._micro
            for grad in grads:
                grad.div_(self._micro)
        if grads and _library.bound_by_launches(self.device) and in_one_launch(grads):
            small = {"grads": grads, **self.head_optimizer.small_sgd(learning)}
        elif grads:
            bad = self._bad if bad is None else bad
            self._find_bad(grads, bad)
        clip = self.param_groups[0]["clip"]
        own = coefficients(
            self.losses, self._lr, self._eps, queries=self.queries if self.trunk else 0, antithetic=self.antithetic,
            clip=None if clip is None else min(clip, LARGEST), bad=bad, step=self._step, skipped=self.skipped, **small,
        )  # fmt: skip
        return own, "weights" in small

    def _find_bad(self, grads: list[torch.Tensor], bad: torch.Tensor) -> None:
        """Set ``bad`` fp32 [1] to something above 0 if a gradient is not finite."""
        brain = [grad for grad in grads if grad.dtype == torch.bfloat16 and grad.numel()]
        others = [grad for grad in grads if grad.dtype != torch.bfloat16]
        if others:
            # the check of torch's GradScaler: one launch for all of them, where isfinite takes five for each
            torch._amp_foreach_non_finite_check_and_unscale_(others, bad, self._one)
        if brain:  # which that one does not take on CUDA; a NaN is its tensor's largest magnitude
            largest = torch.stack(torch._foreach_norm(brain, math.inf))
            bad.add_(~torch.isfinite(largest).all())

    def _renew_plan(self) -> None:
        if self._plan is None or not self._plan.fits(self._weights):
            manifest = [s for s in self.zo.manifest if s.site in self._sites]
            z_dtypes = [s.z_dtype_for(p) for s, p in zip(manifest, self._weights, strict=True)]
            scales = [self.scales.get(site, 1.0) for site in self._sites]
            self._plan = UpdatePlan.build(
                self._weights, self._sites, self._layouts, self.noise, z_dtypes=z_dtypes, scales=scales
            )

    def _update(self, coef: torch.Tensor) -> None:
        update_(
            self._weights,
            self._key,
            coef,
            sites=self._sites,
            layouts=self._layouts,
            noise=self.noise,
            stochastic_rounding=self.stochastic_rounding,
            plan=self._plan,
        )

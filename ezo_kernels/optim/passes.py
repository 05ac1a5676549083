"""The passes of a step: all groups as one stacked batch, or one by one, and the check of the first."""

from __future__ import annotations

import contextlib
import numbers
import traceback
from dataclasses import replace

import torch
from torch.utils import _pytree as pytree

from ..nn.context import group_pass
from ..nn.convert import plan_of
from ..ops import Perturbation
from ..ops._perturbation import NotStackedError, PassError
from .batches import Unwritten, call, copied, dense, lengths_of, parts_of, rows_of, stack
from .check import checked_forward, eagerly, quiet_fakes, unvisited
from .compare import rows_apart
from .given import Given
from .losses import grouped_losses, loss_for, losses_and_gradient
from .provenance import OfEveryRow, Own

HEAD_GRADS = ("mean", "plus", "minus")


class Passes:
    """Runs the groups of :class:`ezo_kernels.ElasticZO` and collects their losses and the head's gradient."""

    @property
    def _must_check(self) -> bool:
        """Whether this is a first step, of a model whose values can be looked at."""
        return bool(self.trunk) and self._checks.forward_is_new and not self._is_fake

    @property
    def _must_check_rows(self) -> bool:
        """Whether this is the first stacked pass of such a batch, of a model whose values can be looked at."""
        return self._checks.rows_are_new and not self._is_fake

    @property
    def _is_fake(self) -> bool:
        return isinstance(self.trunk[0], torch._subclasses.FakeTensor)

    def _mode(self, mode: str) -> str:
        if mode != "auto" or not self.trunk:
            return "stacked" if mode == "auto" else mode
        plan, modules = plan_of(self.model), dict(self.model.named_modules())
        # A module that reads its own parameters between calls of its children would run them once a group anyway.
        composite = [
            n for n, own in plan.grouped.items() if own and any(f.startswith(n + ".") or not n for f in plan.fused)
        ]
        return "sequential" if any(list(modules[n].children()) for n in composite) else "stacked"

    def _may_run_apart(self, error: Exception) -> bool:
        """Whether the groups may run one by one after ``error`` of a stacked pass: no pass of such a batch has passed yet."""
        if self.requested_mode == "stacked" or isinstance(error, torch.OutOfMemoryError):
            return False
        return self._must_check_rows and self._micro == 0

    def _named(self, error: PassError) -> str:
        """The error with the name of the layer that it is about."""
        names = [s.names[0].rpartition(".")[0] for s in self.zo.manifest if s.site == error.site]
        return f"{names[0]}: {error}" if names and names[0] else str(error)

    @contextlib.contextmanager
    def _checking(self):
        """The first step's check around a real forward."""
        if not self._must_check:
            yield
            return
        listed = {s.site: s.names[0] for s in self.zo.manifest}
        names = {id(p): s.names[0] for p, s in zip(self.trunk, self.zo.manifest, strict=True)}
        with checked_forward(self.model, self.zo, names, listed):
            yield

    def _given(self, y):
        """A context for each group in turn, in which a first step sees that they are given the same; ``y`` is their loss's."""
        return Given(self.model, y).running if self._must_check else contextlib.nullcontext

    def _require_visits(self) -> None:
        """Refuse a step whose pass left out a layer that the first one ran: its update would be noise."""
        zo = self.zo
        if zo.visited is not None and not zo.traced and len(zo.visited) < len(self.trunk):
            raise ValueError(unvisited(zo, {s.site: s.names[0] for s in zo.manifest}))

    def _uses(self, group: int) -> bool:
        """Whether the head learns from this group."""
        if self.head_grad == "mean" or not self.antithetic or not self.trunk:
            return True
        return group % 2 == HEAD_GRADS.index(self.head_grad) - 1

    def _backward(self, losses: list[torch.Tensor]) -> None:
        """Add the mean of these groups' gradients to the head's."""
        used = [loss for g, loss in enumerate(losses) if self._uses(g)]
        self._require_grad(used)
        # what the backward of their mean would begin with, but it need not be made each step
        torch.autograd.backward(used, [self._share(loss, len(used)) for loss in used], inputs=self.head)

    def _share(self, loss: torch.Tensor, groups: int) -> torch.Tensor:
        """1 / groups on the device, of the loss's dtype and shape."""
        key = loss.dtype, groups
        if key not in self._shares:
            self._shares[key] = torch.full((1,), 1 / groups, dtype=loss.dtype, device=loss.device)
        return self._shares[key].view(loss.shape)

    def _shares_of(self, groups: int, device: torch.device) -> torch.Tensor:
        """What each group's loss has in the mean that the head learns from, on the device; 0 for one that it does not use."""
        key = torch.float32, self.head_grad
        if key not in self._shares or self._shares[key].shape != (groups,):
            used = [g for g in range(groups) if self._uses(g)]
            self._shares[key] = torch.zeros(groups, dtype=torch.float32, device=device)  # nothing is copied there
            self._shares[key][used[0] :: 1 if len(used) == groups else 2] = 1 / len(used)
        return self._shares[key]

    def _one_by_one(self, p: Perturbation, run, y=None) -> torch.Tensor:
        """Losses [groups] of ``run()`` as each group, its part of the head's gradient taken at once; ``y`` is what it reads."""
        used = sum(self._uses(g) for g in range(p.groups))
        losses, given = [], self._given(y)
        self._collect_inputs(p.groups)
        for g in range(p.groups):
            checking = self._checking() if g == 0 else contextlib.nullcontext()
            running = self.zo.running(group_pass(p, g))
            with torch.set_grad_enabled(bool(self.head)), given(), checking, running, self._phase("forward"):
                loss = self._loss(run())
            if g or not self._must_check:
                self._require_visits()
            if self.head and self._uses(g):
                with self._phase("head backward"), torch.enable_grad(), self.zo.backward(group_pass(p, g)):
                    self._backward_one(loss / used if used > 1 else loss)
            losses.append(loss.detach().float().reshape(()))
        self.zo.inputs = None
        return torch.stack(losses)

    @staticmethod
    def _require_grad(losses) -> None:
        if torch.is_inference_mode_enabled():
            raise ValueError("a step with a head needs autograd, and this is torch.inference_mode: leave it")
        if not all(loss.requires_grad for loss in losses):
            raise ValueError("the loss does not depend on the head's parameters by autograd: nothing to backpropagate")

    def _backward_one(self, loss: torch.Tensor) -> None:
        self._require_grad([loss])
        torch.autograd.backward(loss, inputs=self.head)

    def _loss(self, loss) -> torch.Tensor:
        """What a closure or a loss function returned, as a tensor of one element."""
        if isinstance(loss, numbers.Real):  # a metric of the host's, which waited for the device
            loss = torch.tensor(float(loss), device=self.device)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"the loss must be a tensor of one element, or a number, got {shape}")
        if loss.is_complex():
            raise TypeError(f"the loss must be real, got {loss.dtype}")
        return loss

    def _undisturbed(self, closure):
        """``closure``, refused if it touches the gradients that the step collects."""

        def run():
            before = [(p.grad, None if p.grad is None else p.grad._version) for p in self.head]
            loss = closure()
            for p, (grad, version) in zip(self.head, before, strict=True):
                if p.grad is not grad or (grad is not None and grad._version != version):
                    raise ValueError(
                        "the closure changed the head's gradients: it must not call backward or zero_grad, only return the "
                        "loss"
                    )
            return loss

        return run if self.head else closure

    def _stacked(self, p: Perturbation, x, y, loss_fn, kwargs) -> torch.Tensor:
        rows, batch = rows_of(x), (x, kwargs)
        self._checks.stacked(batch, p.groups)
        self.zo.lengths = lengths_of(x, kwargs)
        new, alone = self._checks.rows_are_new, None
        stats = {module: list(own) for module, own in self.zo.batch_stats.items()} if self.zo.batch_stats else {}
        shared_rows, done = rows, self._of_one_batch(p, rows, batch, y, loss_fn)
        if new and not self._is_fake and done is not None:
            alone = self._each_alone(p, batch)
        if done is None or not self._agrees(done, p, alone):
            shared_rows, done, self.zo.batch_stats = None, None, stats  # nothing of the first try is held
            done = self._together(p, rows, None, stack(batch, p.groups, rows), y, loss_fn)
            if new and not self._is_fake:
                alone = self._each_alone(p, batch) if alone is None else alone
            if not self._agrees(done, p, alone):
                raise NotStackedError(
                    "the model does not treat the rows of a batch apart (sequence first, or a reduction over the batch?): "
                    "a stacked pass would mix the groups; run them one by one (mode='sequential')"
                )
            self._checks.copy()
        output, losses, gradient, _ = done
        del done, alone
        if new and (self._is_fake or all(bool(torch.isfinite(loss).all()) for loss in losses)):
            self._checks.rows_passed()
        if self.head:
            with self._phase("head backward"), self.zo.backward(p, rows * p.groups, shared_rows):
                if gradient is not None:
                    torch.autograd.backward(output, gradient, inputs=self.head)
                else:
                    self._backward(losses)
        if isinstance(losses, torch.Tensor):
            return losses
        return torch.stack([loss.detach().float().reshape(()) for loss in losses])

    def _of_one_batch(self, p: Perturbation, rows: int, batch, y, loss_fn) -> tuple | None:
        """:meth:`_together` of one batch for all groups; None where a model cannot take that.

        It may write into its batch, join what is every group's with what is each one's own, or take another way than in a
        first pass, in which it was seen what is whose.
        """
        if p.groups == 1 or not self._checks.may_share:
            return None
        new = self._checks.rows_are_new
        own = dense(*batch, rows)
        if new and not self._is_fake:
            own = copied(own)
        unwritten = Unwritten(own, batch) if new else None
        try:
            with quiet_fakes() if self._is_fake else contextlib.nullcontext():
                done = self._together(p, rows, rows, own, y, loss_fn, unwritten)
            if new:
                self._checks.shares(self.zo.asked)
            return done
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._in_loss and not new:
                raise  # the user's own: its forward was as the first one's
            traceback.clear_frames(error.__traceback__)  # they hold what the pass had made
            return None

    def _together(
        self, p: Perturbation, rows: int, shared_rows: int | None, batch, y, loss_fn, unwritten: Unwritten | None = None
    ) -> tuple:
        """All groups at once: the output, the losses and, if they were taken at once, the gradient that the head learns from,
        else each group's part of the output. ``unwritten``, of a first pass of one batch, sees whether it can be shared.
        """
        groups, (x, kwargs), self._in_loss = p.groups, batch, False
        self._collect_inputs(groups)
        with torch.set_grad_enabled(bool(self.head)), self._checking():
            # what is looked at is not compiled: each group by itself would be a kind of its own
            running = self.zo.running(p, rows * groups, shared_rows)
            with self._phase("forward"), running, eagerly(self._must_check_rows):
                output = self._called(x, kwargs) if unwritten is None else self._seen(x, kwargs, unwritten)
            if shared_rows is not None and unwritten is None and not self._checks.as_before(self.zo):
                raise NotStackedError("the forward took another way than in a first pass")
            self._in_loss, self.zo.inputs = True, None
            if not self._must_check:
                self._require_visits()
            with self._phase("loss"):
                losses, gradient = self._grouped(loss_fn, output, y, groups)
                parts = parts_of(output, groups) if losses is None else None
                if losses is None:
                    losses, given = [], self._given(y)
                    for own in parts:
                        with given():
                            losses.append(self._loss(loss_fn(own, y)))
                if self.nodes is not None:
                    self.nodes.note(loss_fn, output, y, groups, losses, self._must_check)
        return output, losses, gradient, parts

    def _collect_inputs(self, groups: int) -> None:
        """Keep what layers are given whose outputs are perturbed, until a pass of ``groups`` groups has run."""
        self.zo.inputs = None if self.nodes is None else self.nodes.begin(groups)

    def _loss_of(self, loss_fn, output, y):
        """``loss_fn`` of one group's output."""
        loss = loss_for(loss_fn, output, y)
        if self.nodes is not None:
            self.nodes.note(loss_fn, output, y, 1, [self._loss(loss)], self._must_check)
        return loss

    def _called(self, x, kwargs):
        """The model's output; in a first pass nothing may take a single row's positions."""
        if not self._checks.rows_are_new:
            return call(self.model, x, kwargs)
        self.zo.common = common = OfEveryRow()
        try:
            with common:
                return call(self.model, x, kwargs)
        finally:
            self.zo.common = None

    def _seen(self, x, kwargs, unwritten: Unwritten):
        """The model's output on one batch for all groups, while what is whose is followed; NotStackedError if that is lost."""
        self.zo.provenance = provenance = Own((x, kwargs))
        try:
            with provenance:
                output = call(self.model, x, kwargs)
        finally:
            self.zo.provenance = None
        tensors = [t for t in pytree.tree_leaves(output) if torch.is_tensor(t)]
        if not unwritten.holds() or not all(map(provenance.holds, tensors)):
            raise NotStackedError("the forward writes into its batch, or gives what is every group's")
        return output

    def _each_alone(self, p: Perturbation, batch) -> list:
        """The outputs of each group alone, which those of a first pass are held against."""
        stats = self.zo.batch_stats
        try:
            with eagerly(True):
                return self._alone(p, *batch)
        finally:
            self.zo.batch_stats = stats

    @staticmethod
    def _agrees(done: tuple, p: Perturbation, alone: list | None) -> bool:
        """Whether a pass of all groups gave each of them what it gives alone, as far as that is known."""
        output, _, _, parts = done
        return alone is None or rows_apart(parts_of(output, p.groups) if parts is None else parts, alone)

    def _grouped(self, loss_fn, output, y, groups: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The losses of all groups at once and, for a head, the gradient of the mean that it learns from; None: one by one."""
        if not self.head:
            return grouped_losses(loss_fn, output, y, groups), None
        if not isinstance(output, torch.Tensor) or not output.requires_grad:
            return None, None  # _backward says what is wrong
        shares = self._shares_of(groups, output.device)
        return losses_and_gradient(loss_fn, output, y, shares) or (None, None)

    @torch.no_grad()
    def _alone(self, p: Perturbation, x, kwargs) -> list:
        outputs = []
        for g in range(p.groups):
            self.zo.batch_stats = {}
            own, others = copied((x, kwargs))  # a forward may write into them
            with self.zo.running(group_pass(p, g)):
                outputs.append(call(self.model, own, others))
        return outputs

    def _require_alike(self, p: Perturbation, x, kwargs) -> None:
        """Refuse a model that gives something else when a group runs again: what it counts, or draws from no generator that
        is known, would be in g. Only a model that runs its groups one by one can be so: others have run alone, too.
        """
        p = replace(p, queries=min(p.queries, 3 - len(p.signs)))  # two groups, to know what a perturbation changes
        stats, inputs = self.zo.batch_stats, self.zo.inputs
        self.zo.inputs = None
        try:
            with eagerly(True):
                first, again = (self._alone(p, x, kwargs) for _ in range(2))
        finally:
            self.zo.batch_stats, self.zo.inputs = stats, inputs
        if not rows_apart(again, first):
            raise ValueError(
                "this model cannot take a zeroth-order step: the same weights and batch give another output when they run "
                "again, and so would the groups of a step (random by a generator of its own, as numpy.random.default_rng, or "
                "by what it counts in its forward?): draw or count before the step"
            )

    def _plain(self, run) -> torch.Tensor:
        """The loss [1] of pure backpropagation; buffers that its forward writes are held, for a step that is skipped."""
        if not self._buffers:
            self._buffers = [(b, b.clone()) for b in self.model.buffers()]
        with torch.enable_grad(), self._phase("forward"):
            loss = self._loss(run())
        with self._phase("head backward"):
            self._backward([loss])
        return loss.detach().float().reshape(1)

"""ElasticZO: the trunk by zeroth order, the head by backpropagation (arXiv 2501.04287), without writing a perturbation.

For each query q, with z_q from the noise contract and losses l of the two groups (q, +) and (q, -):

    g_q = (l+ - l-) / (2 eps),   clipped to [-clip, clip]
    trunk: w <- w - lr / queries * sum_q g_q s z_q         head: its optimiser on the mean of the groups' gradients

where w + eps s z_q and w - eps s z_q are what the groups run with, and s is the scale of the layer, 1 unless ``scales`` has it.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from .._nvtx import Ranges
from ..nn.convert import context_of, head_parameters, is_int8, plan_of, trunk_parameters
from ..nn.cut import in_head
from ..ops import Noise, Perturbation, UpdatePlan
from ..ops._perturbation import NotStackedError, PassError
from ..ops.noise import check_index, fold_key, rng_version
from .arguments import check_antithetic, number, warn_user
from .batches import call, plain, rows_of
from .capture import CapturedStep, graphs_for, refusals, refuse
from .check import Checks, Places, eagerly
from .head import GuardedOptimizer, make_head_optimizer
from .importance import ImportanceRows, check_importance_rows
from .nodes import NodePerturbation, NodeRows, Nodes
from .passes import HEAD_GRADS, Passes
from .scalars import Scalars
from .scales import ScaledEps, resolve_scales
from .state import OptimizerState
from .updates import Updates, with_hooks

MODES = ("auto", "stacked", "sequential")


class ElasticZO(Passes, ImportanceRows, NodeRows, Updates, Scalars, OptimizerState, torch.optim.Optimizer):
    """Trains a model that :func:`ezo_kernels.convert_` converted.

    ``param_groups[0]`` is the trunk (``lr``, ``eps``, ``clip``), the last one ``node_perturbation``'s, if it is used, and the
    others are the head's; all hold Python numbers, and torch's schedulers drive them. Seed, step, eps, lr and coefficients live
    on the device: a step never waits for it, except a first one, of a shape of batch and of train or eval, which checks the
    model (:mod:`ezo_kernels.optim.check`). A step whose losses, g or head gradients are not finite changes nothing and is
    counted in ``skipped``.

    Args:
        model: converted, on its device.
        lr: of the trunk.
        eps: perturbation scale, above 0.
        noise: a name of :data:`ezo_kernels.ops.noise.NOISES`; ``gaussian_fast`` on CUDA only.
        queries: directions a step.
        antithetic: both signs of each direction, two forwards a query. False: its plus sign alone, one forward a query, and
            g is its loss less the mean of the others' over eps (docs/method.md); needs 2 queries. One mask of a dropout then
            serves all queries.
        head_lr: of the head's SGD.
        head_optimizer: instead of it, a function of the head's parameters that returns a torch optimizer, or one.
        clip: largest magnitude of g, or None.
        scales: name of a module or parameter of the trunk -> how far it is perturbed, beside eps; lr times its square is its
            own learning rate (docs/recipes.md, A scale a layer). The longest name counts; 1 where none does.
        seed: base seed, [0, 2^64).
        p_zero: fraction of zeros of ``sparse``.
        rounds: Philox rounds, 7 or 10.
        mode: ``stacked`` runs all groups as one batch in :meth:`train_step`, ``sequential`` one by one (inference memory of
            one batch); ``auto`` stacks where the model allows it. What comes before the first perturbed layer, such as
            frozen layers, runs once for all groups of a stacked pass, unless the model joins its batch with what comes later.
        head_grad: the head learns from the ``mean`` over groups, or from the ``plus`` or ``minus`` ones.
        importance_rows: draw as many rows of a larger batch of :meth:`train_step`, by one plain forward of all of it, for all
            directions and the head (docs/recipes.md, Rows that matter); the loss is plain cross-entropy then. None: all rows.
        node_perturbation: linear layers of the trunk whose outputs are perturbed, row by row, in place of their weights, by
            a plain or any other of torch's mean losses (docs/method.md, Node perturbation); not in a captured step.
        stochastic_rounding: of 16-bit trunk weights in the update.
        nvtx: push NVTX ranges by phase and by layer (docs/profiling.md).
        capture: replay :meth:`train_step` as one CUDA graph (docs/performance.md, section The captured step); the head's SGD
            is then torch's with ``fused=True``, and any other head optimizer must be made so, too.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, naming it; ``capture`` without CUDA.
        NotImplementedError: noise that the device cannot make, a head optimizer that cannot be guarded, or a step that cannot
            be captured, with every reason.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        eps: float = 1e-3,
        noise: str = "gaussian",
        queries: int = 1,
        head_lr: float = 0.05,
        head_optimizer=None,
        clip: float | None = None,
        seed: int = 0,
        *,
        p_zero: float = 0.0,
        rounds: int = 7,
        mode: str = "auto",
        head_grad: str = "mean",
        antithetic: bool = True,
        scales: dict[str, float] | None = None,
        importance_rows: int | None = None,
        node_perturbation: NodePerturbation | None = None,
        stochastic_rounding: bool = True,
        nvtx: bool = False,
        capture: bool = False,
    ) -> None:
        self.zo = context_of(model)
        if is_int8(model):
            raise ValueError("the model is converted to int8: ElasticZOInt8 trains it")
        self.model = model
        lr, eps = number(lr, "lr", least=0.0), number(eps, "eps", least=0.0, strict=True)
        head_lr = number(head_lr, "head_lr", least=0.0)
        if clip is not None:
            clip = number(clip, "clip", least=0.0, strict=True, held=False)
        if mode not in MODES or head_grad not in HEAD_GRADS:
            raise ValueError(
                f"mode must be one of {MODES} and head_grad one of {HEAD_GRADS}, got {mode!r}, {head_grad!r}"
            )
        self.queries = check_index(queries, "queries", 1 << 12)
        if queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        check_antithetic(antithetic, queries, head_grad)
        self.antithetic = antithetic
        if not isinstance(stochastic_rounding, bool):
            raise TypeError(f"stochastic_rounding must be a bool, got {type(stochastic_rounding).__name__}")
        seed = check_index(seed, "seed", 1 << 64)
        self.noise = Noise(noise, rounds, p_zero)
        if noise == "sparse_int8":
            raise NotImplementedError("sparse_int8 is noise of integer layers: use 'sparse' for float weights")
        self.trunk, self.head = trunk_parameters(model), head_parameters(model)
        if not self.trunk and not self.head:
            raise ValueError("the model has no parameter to train: all are frozen")
        self.importance_rows = check_importance_rows(importance_rows, bool(self.trunk))
        devices = {p.device for p in (*self.trunk, *self.head)}
        if len(devices) > 1:
            raise ValueError(f"the model's parameters are on several devices: {sorted(map(str, devices))}")
        self.device = devices.pop()
        if not self.noise.portable and self.device.type == "cpu":
            raise NotImplementedError(f"noise {noise!r} exists on CUDA only: use 'gaussian' or 'clt4' on the CPU")
        self.nodes = None if node_perturbation is None else Nodes(node_perturbation, model, self.device)
        nodes = self.nodes.sites if self.nodes else ()
        by_weight = [(p, s) for p, s in zip(self.trunk, self.zo.manifest, strict=True) if s.site not in nodes]
        self._weights = [p for p, _ in by_weight]
        self.scales = resolve_scales(scales, [s for _, s in by_weight], plan_of(model).fused)
        graphs = graphs_for(self.device) if capture else None
        head = make_head_optimizer(self.head, head_optimizer, head_lr, fused=capture)
        trunk = {"params": self._weights, "lr": lr, "eps": eps, "clip": clip, "name": "trunk"}
        torch.optim.Optimizer.__init__(self, [trunk], {"lr": lr, "eps": eps, "clip": clip, "name": "trunk"})
        self.head_optimizer = None if head is None else GuardedOptimizer(head, own=head_optimizer is None)
        if head is not None:
            self.param_groups += head.param_groups  # the same dicts: a scheduler that moves one moves the head's own
        if self.nodes:
            self.param_groups.append(self.nodes.group)
        self.mode = self._mode(mode)
        self.requested_mode, self.head_grad = mode, head_grad
        self.stochastic_rounding = stochastic_rounding
        self._captured = None if graphs is None else CapturedStep(graphs)
        if capture:
            refuse(refusals(self) + ["node_perturbation solves a system, which no graph holds yet"] * bool(self.nodes))
        self._phase = Ranges(nvtx)
        self._plan: UpdatePlan | None = None
        self._sites = tuple(s.site for _, s in by_weight)
        self._layouts = tuple(s.layout for _, s in by_weight)
        self._checks, self._told = Checks(model), False
        heads = {id(p) for p in self.head}
        self._head_names = {n: p for n, p in model.named_parameters() if id(p) in heads}
        all_names = dict(model.named_parameters(remove_duplicate=False))
        self._places = Places(
            model, {n: all_names[n] for site in self.zo.manifest for n in site.names}, self._head_names
        )
        self._losses: torch.Tensor | None = None
        self._micro = 0
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._shares: dict[tuple[torch.dtype, int], torch.Tensor] = {}

        def scalar(value, dtype, shape=(1,)):
            return torch.full(shape, value, dtype=dtype, device=self.device)

        self._seed = scalar(seed - (1 << 64) if seed >= 1 << 63 else seed, torch.int64)
        self._step = scalar(0, torch.int64)
        self._key, self._one = scalar(0, torch.int32, (2,)), scalar(1.0, torch.float32)
        self._bad = scalar(0.0, torch.float32)
        self._eps, self._lr = scalar(eps, torch.float32), scalar(lr, torch.float32)
        self._filled = {"eps": eps, "lr": lr}
        self._scaled_eps = ScaledEps(self.scales, eps, self.device)
        self.skipped = scalar(0, torch.int64, ())
        self.g = scalar(0.0, torch.float32, (self.queries,))
        self.losses = scalar(0.0, torch.float32, (self._groups,))

    # ------------------------------------------------------------------------------------------------------ set-up

    @property
    def step_count(self) -> torch.Tensor:
        """int64[1] on the device: steps taken, skipped ones not counted."""
        return self._step

    @property
    def _groups(self) -> int:
        return self.queries * (1 + self.antithetic) if self.trunk else 1

    @property
    def workspace_bytes(self) -> int:
        """Bytes of perturbed copies that are alive at once in a pass: those of parameters that no fused layer reads.

        A copy a group in a stacked pass, one copy in a sequential one. (The CPU reference also forms the weight of the layer
        that runs, which is memory of the backend, not of the method.)
        """
        groups = self._groups if self.mode == "stacked" else 1
        sizes = zip(self.trunk, self.zo.manifest, strict=True)
        return groups * sum(p.numel() * p.element_size() for p, s in sizes if s.kind == "workspace")

    @property
    def rng_version(self) -> str:
        """The noise contract's version, as logs and checkpoints carry it."""
        return rng_version(self.noise.rounds)

    def _in_head(self, name: str) -> bool:
        return in_head(name, plan_of(self.model).head)

    def _baked(self) -> tuple:
        head = () if self.head_optimizer is None else self.head_optimizer.settings()
        fixed = (self.mode, self.head_grad, self.antithetic, self.importance_rows, self.stochastic_rounding)
        return (self.param_groups[0]["clip"], *fixed, *head)

    def _held(self) -> list[torch.Tensor]:
        return [] if self.head_optimizer is None else self.head_optimizer.tensors()

    def _tables(self) -> object:
        return self._plan

    def _looks(self) -> bool:
        return self._must_check_draws or (self.mode == "stacked" and bool(self.trunk) and self._must_check_rows)

    def _require_model(self) -> None:
        super()._require_model()
        for name, p in self._head_names.items():
            if not p.requires_grad:
                raise ValueError(f"{name!r} of the head was frozen (requires_grad_(False)): make a new ElasticZO")
        if self.trunk and self.trunk[0].device != self.device:
            raise ValueError(f"the model moved from {self.device} to {self.trunk[0].device}: make a new ElasticZO")

    def _begin(self) -> Perturbation | None:
        """Device scalars and the key of this step; the pass of all its groups."""
        self._require_model()
        self._fill_scalars()
        if not self.trunk:
            return None
        fold_key(self._seed, self._step, self._key)
        self.zo.micro, self.zo.one_mask, self.zo.own = self._micro, not self.antithetic, self._scaled_eps.of_site
        self.zo.nodes = frozenset()
        if self.nodes is not None:
            self.zo.own, self.zo.nodes = self.zo.own | self.nodes.own, self.nodes.weights
            self.zo.node_forward = self.nodes.forward
        return Perturbation(self._key, self._eps, self.noise, 0, self.queries, (1, -1) if self.antithetic else (1,))

    # --------------------------------------------------------------------------------------------------------- steps

    @with_hooks
    def train_step(self, x, y, loss_fn=F.cross_entropy, *, update: bool = True, **model_kwargs) -> torch.Tensor:
        """One step on a batch: all groups as one stacked pass (or one by one, by ``mode``).

        Args:
            x: [B, ...], or a tuple of arguments or a dict of them; tensors whose first dimension is B are all groups'.
            y: what ``loss_fn`` takes beside the output.
            loss_fn: ``loss_fn(output, y)`` -> scalar, called once a group on that group's rows.
            update: False accumulates: the same z, losses and gradients averaged with those of the next calls, and nothing
                changes until a call with True.
            **model_kwargs: passed to the model, as x.

        Returns:
            The mean loss over groups, a detached scalar on the device.

        Raises:
            ValueError: an empty batch, a model that cannot take such a step (in a first step, and one with a batch of
                another shape or after train() or eval(); it says why).
            NotImplementedError: with ``capture=True``, a call that cannot be captured, with every reason.
            A call that raises changes nothing and drops what was accumulated.
        """
        x = plain(x)
        rows_of(x)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of the output and y, got {type(loss_fn).__name__}")
        if self.nodes is not None:
            self._require_nodes_can(loss_fn, update)
        if self._captured is None:
            return self._eager(x, y, loss_fn, model_kwargs, update)
        if not update:
            refuse(["update=False accumulates over calls, and a graph is one whole step"])
        self._require_model()  # a replay looks at nothing
        return self._captured.step(self, loss_fn, x, y, loss_fn, model_kwargs)

    def _eager(self, x, y, loss_fn, model_kwargs: dict, update: bool = True) -> torch.Tensor:
        def losses(p):
            why = ""
            if p is None:
                return self._plain(lambda: loss_fn(call(self.model, x, model_kwargs), y))
            own_x, own_y, own_loss, kwargs = self._draw(x, y, loss_fn, model_kwargs)
            if self.nodes is not None:
                self._require_row_by_row(own_x, kwargs)
            if self.mode == "stacked":
                try:
                    return self._stacked(p, own_x, own_y, own_loss, kwargs)
                except Exception as error:
                    if not self._may_run_apart(error):
                        raise
                    # its words alone: the error itself would keep all that the pass had made
                    why = self._named(error) if isinstance(error, PassError) else f"a stacked pass failed: {error}"
                    why += "; doing so" if isinstance(error, NotStackedError) else "; running the groups one by one"
                self.zo.batch_stats = {}
                for parameter in self.head:
                    parameter.grad = None
            try:
                own = self._one_by_one(
                    p, lambda: self._loss_of(own_loss, call(self.model, own_x, kwargs), own_y), own_y
                )
            except Exception as error:
                if why:
                    error.add_note(why)
                raise
            if self._must_check:
                self._require_alike(p, own_x, kwargs)
            if why:
                warn_user(f"{why} from now on")
                self.mode = "sequential"
            return own

        return self._take(losses, update)

    def step(self, closure=None) -> torch.Tensor:
        """One step by torch's contract: ``closure()`` runs the model and returns the loss; it never calls backward.

        It is called once a group, each time with the weights of that group. With an empty head the loss need not be
        differentiable.

        Returns:
            The mean loss over groups, a detached scalar on the device.
        """
        if closure is None:
            raise ValueError("ElasticZO.step needs a closure that returns the loss; or call train_step(x, y)")
        if self.importance_rows is not None:
            raise ValueError("step(closure) does not see the batch, of which importance_rows draws: train_step(x, y)")
        if self.nodes is not None:
            raise ValueError(
                "step(closure) does not see the loss of each row, as node_perturbation does: train_step(x, y)"
            )
        if self._captured is not None:
            refuse(["step(closure) takes its batch from the host at each call: train_step(x, y)"])

        def losses(p):
            run = self._undisturbed(closure)
            return self._plain(run) if p is None else self._one_by_one(p, run)

        return self._take(losses, True)

    def _take(self, run, update: bool) -> torch.Tensor:
        if self._losses is None:
            self._drop()
        try:
            self._checks.begin()
            self._require_collected()
            with eagerly(self._must_check), self._phase.layers(self.model, self._in_head):
                losses = run(self._begin())
            self._checks.forward_passed()
            self._opt_called = True  # torch's schedulers ask whether the optimizer stepped before them
            self._losses = losses if self._losses is None else self._losses + losses
            self._micro += 1
            mean = self._finish() if update else self._collect()
        except BaseException as error:
            buffers = self._buffers
            self._drop()
            # of a capture that failed nothing has run, and while it lasts nothing can
            with torch.no_grad(), contextlib.suppress(RuntimeError):
                for buffer, old in buffers:
                    buffer.copy_(old)
                self._bad.zero_()
            if isinstance(error, PassError):
                raise ValueError(self._named(error)) from error
            raise
        return losses.mean() if mean is None else mean

    def _drop(self) -> None:
        """Forget gradients and losses that were not applied."""
        self._losses, self._micro, self._buffers, self.zo.inputs = None, 0, [], None
        if self.nodes is not None:
            self.nodes.drop()
        self.zo.batch_stats = {}
        for p in self.head:
            p.grad = None

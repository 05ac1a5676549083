"""ElasticZO-INT8: training in integers only (arXiv 2501.04287; the head as NITI, arXiv 2009.13108).

For each query q, with integer losses L of the two groups (q, +) and (q, -), whose weights are clamp(w +- z_q):

    g_q = sign(L+ - L-)
    trunk: w <- clamp(w - round(sum_q g_q z_q / 2^shift))         head: NITI's update with gradients summed over the groups

Nothing between the int8 input and the int8 weights is a floating-point number, so a run is the same bit for bit on every device
(docs/numerics.md, section Integers).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from .._nvtx import Ranges
from ..nn.arena import ArenaPlan
from ..nn.context import group_pass
from ..nn.convert import context_of, head_parameters, is_int8, plan_of, trunk_parameters
from ..nn.cut import in_head
from ..nn.int8_layers import _Int8Layer, parameter_faults
from ..ops._constants import INT8_VERSION, MOST_FRACTION_BITS
from ..ops._int8_slab import check_way
from ..ops._perturbation import PassError
from ..ops.int8_head import HeadGradient, int8_head_step_
from ..ops.int8_loss import FRACTION_BITS, nats
from ..ops.int8_pass import GRADIENT_SITE, IntegerPerturbation, check_rounding, sparse_noise
from ..ops.int8_tensor import Int8Tensor
from ..ops.int8_update import Int8UpdatePlan, check_bits, int8_update_, update_shift
from ..ops.noise import Noise, check_index, rng_version
from .arguments import IntegerGroup, check_antithetic
from .capture import CapturedStep, graphs_for, refusals, refuse
from .check import Places
from .int8_memory import Int8Memory
from .int8_passes import Int8Passes, one_value
from .int8_state import Int8State
from .passes import HEAD_GRADS
from .updates import with_hooks

LOSSES = ("cross_entropy", "float_cross_entropy", "squared_error")
MODES = ("stacked", "sequential")
STRATEGIES = ("auto", "buffer", "twice")


class ElasticZOInt8(Int8Passes, Int8Memory, Int8State, torch.optim.Optimizer):
    """Trains a model that ``convert_(model, head=..., precision="int8")`` converted.

    ``param_groups[0]`` is the trunk (``bits``, ``r_max``, ``p_zero``), ``param_groups[1]`` the head (``bits``); all are Python
    numbers, which may be changed between steps (:class:`ezo_kernels.optim.IntegerSchedule`). A step never waits for the device.
    The first with an input of a new shape runs the model once more, without values on the meta device, to plan its memory. A
    step whose loss is not finite, which a float loss may be, changes nothing and is counted in ``skipped``.

    Args:
        model: converted, on its device.
        r_max: z is uniform in [-r_max, r_max]; 1 to 127.
        p_zero: fraction of zeros of z.
        bits: width of the trunk's update, -8 to 7: z is shifted right by (bits of r_max) - ``bits``. The learning rate of the
            trunk, in powers of two; by stochastic rounding, what is left of less than one unit moves a weight now and then.
        head_bits: width of the head's update, -8 to 7: NITI's learning rate.
        head_remainder: keep what the head's int8 weights cannot hold of their updates, a byte each, for the next step. The
            forward sees int8 weights as before; NITI has no such thing, and rounds each update to whole units.
        queries: directions a step.
        antithetic: both signs of each direction, two forwards a query. False: its plus sign alone, one forward a query, and
            g_q is the sign of L_q less the mean over all queries; needs 2 queries.
        seed: base seed, [0, 2^64).
        loss: ``cross_entropy`` in integers (the paper's INT8*), ``float_cross_entropy`` of the dequantised logits for the sign
            of g (its INT8), or ``squared_error`` against an Int8Tensor.
        fraction_bits: of the integer cross-entropy, 0 (the paper's rule) to 8.
        head_grad: the head learns from the groups ``mean``, ``plus`` or ``minus``.
        rounding, head_rounding: of the updates: ``stochastic``, ``pseudo`` or ``nearest``.
        activation_rounding: ``nearest`` or ``pseudo``.
        mode: ``stacked`` runs all groups as one batch, ``sequential`` one by one.
        strategy: ``buffer`` keeps int32 accumulators in the arena, ``twice`` multiplies twice instead; ``auto`` takes the
            second for the layers whose accumulators would make the arena larger, and on a CPU for all, where it costs little.
        weights: on a GPU, where perturbed weights are made: ``fused``, in the tile that multiplies; ``slab``, in a workspace of
            32 MB at most, or of a convolution's weights; ``auto``, by shape. No bit depends on it.
        rounds: Philox rounds, 7 or 10.
        nvtx: push NVTX ranges by phase and by layer (docs/profiling.md).
        capture: replay :meth:`train_step` as one CUDA graph; see :class:`ezo_kernels.ElasticZO`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, naming it; a model that is not converted so;
            ``capture`` without CUDA.
        NotImplementedError: a step that cannot be captured, with every reason.
    """

    def __init__(
        self,
        model: nn.Module,
        r_max: int = 3,
        p_zero: float = 0.9,
        bits: int = 1,
        head_bits: int = 1,
        queries: int = 1,
        seed: int = 0,
        *,
        antithetic: bool = True,
        loss: str = "cross_entropy",
        fraction_bits: int = FRACTION_BITS,
        head_grad: str = "mean",
        rounding: str = "stochastic",
        head_rounding: str = "stochastic",
        head_remainder: bool = False,
        activation_rounding: str = "nearest",
        mode: str = "stacked",
        strategy: str = "auto",
        weights: str = "auto",
        rounds: int = 7,
        nvtx: bool = False,
        capture: bool = False,
    ) -> None:
        self.zo = context_of(model)
        if not is_int8(model):
            raise ValueError("the model is converted for floats: convert_(model, head=..., precision='int8')")
        self.model, self.arena = model, model.__dict__["_ezo_arena"]
        for name, value, allowed in (
            ("loss", loss, LOSSES), ("head_grad", head_grad, HEAD_GRADS), ("mode", mode, MODES),
            ("strategy", strategy, STRATEGIES), ("activation_rounding", activation_rounding, ("nearest", "pseudo")),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        self.loss, self.head_grad, self.mode, self.strategy = loss, head_grad, mode, strategy
        self.weights = check_way(weights)
        for name, value in (("queries", queries), ("seed", seed), ("fraction_bits", fraction_bits)):
            if isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got bool")
        if not isinstance(head_remainder, bool):
            raise TypeError(f"head_remainder must be a bool, got {type(head_remainder).__name__}")
        self.fraction_bits = check_index(fraction_bits, "fraction_bits", MOST_FRACTION_BITS + 1)
        self.rounding, self.head_rounding = check_rounding(rounding), check_rounding(head_rounding)
        self.queries = check_index(queries, "queries", 1 << 12)
        if queries < 1:
            raise ValueError(f"queries must be at least 1, got {queries}")
        check_antithetic(antithetic, queries, head_grad)
        self.antithetic = antithetic
        seed = check_index(seed, "seed", 1 << 64)
        self.rounds = rounds
        self.trunk, self.head = trunk_parameters(model), head_parameters(model)
        if not self.trunk and not self.head:
            raise ValueError("the model has no parameter to train: all are frozen")
        devices = {p.device for p in (*self.trunk, *self.head)}
        if len(devices) > 1:
            raise ValueError(f"the model's parameters are on several devices: {sorted(map(str, devices))}")
        self.device = devices.pop()
        self._captured = CapturedStep(graphs_for(self.device)) if capture else None
        if capture:
            refuse(refusals(self))
        trunk = {"params": self.trunk, "bits": bits, "r_max": r_max, "p_zero": p_zero, "name": "trunk"}
        head = {"params": self.head, "bits": head_bits, "r_max": None, "p_zero": None, "name": "head"}
        for group in (trunk, head):
            check_bits(group["bits"], "bits" if group is trunk else "head_bits")
        sparse_noise(rounds, p_zero, r_max)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, _Int8Layer)}
        faults = []
        for name, layer in layers.items():
            for leaf in layer._parameters:
                faults += parameter_faults(
                    f"{name}.{leaf}".lstrip("."), layer._parameters[leaf], layer._buffers.get(leaf + "_exponent")
                )
        if faults:
            raise ValueError("; ".join(faults))
        torch.optim.Optimizer.__init__(self, [IntegerGroup(trunk), IntegerGroup(head)], {})
        self.activation_rounding = activation_rounding
        self._strategies = dict.fromkeys(layers.values(), "buffer")
        for (
            layer
        ) in layers.values():  # a forward outside of a step rounds as the steps do, those before the first one too
            layer.rounding = activation_rounding
        self._plans: dict[tuple, ArenaPlan] = {}
        plan = plan_of(model)
        names = [n for n, _ in model.named_parameters() if in_head(n, plan.head) and n not in plan.frozen]
        self._head = dict(zip(names, self.head, strict=True))
        kept = self._head if head_remainder else {}
        self._remainders = {n: torch.zeros(w.shape, dtype=w.dtype, device=w.device) for n, w in kept.items()}
        self._phase = Ranges(nvtx)
        self._update_plan: Int8UpdatePlan | None = None
        self._sites = tuple(s.site for s in self.zo.manifest)
        self._layouts = tuple(s.layout for s in self.zo.manifest)
        all_names = dict(model.named_parameters(remove_duplicate=False))
        self._places = Places(model, {n: all_names[n] for site in self.zo.manifest for n in site.names}, self._head)

        def scalar(value, dtype, shape=(1,)):
            return torch.full(shape, value, dtype=dtype, device=self.device)

        self._seed = scalar(seed - (1 << 64) if seed >= 1 << 63 else seed, torch.int64)
        self._step = scalar(0, torch.int64)
        self._key = scalar(0, torch.int32, (2,))
        self._shift, self._head_bits = scalar(0, torch.int32), scalar(0, torch.int32)
        self._filled: dict = {}
        self.skipped = scalar(0, torch.int64, ())
        self.g = scalar(0, torch.int32, (self.queries,))
        self.losses = scalar(0, torch.int64, (self._groups,))
        self._rows, self._by_closure = 1, None

    # ------------------------------------------------------------------------------------------------------ set-up

    @property
    def step_count(self) -> torch.Tensor:
        """int64[1] on the device: steps taken."""
        return self._step

    @property
    def _groups(self) -> int:
        return self.queries * (1 + self.antithetic) if self.trunk else 1

    @property
    def rng_version(self) -> str:
        """The noise contract's version."""
        return rng_version(self.rounds)

    @property
    def numerics_version(self) -> str:
        """The version of the integer arithmetic; runs of another are other runs."""
        return INT8_VERSION

    @property
    def group_losses(self) -> torch.Tensor:
        """Losses of the last step's groups, means over the rows, fp64 [groups] on the device: for people.

        In nats; of ``squared_error`` in squares of 2^(s - 8), s the exponent of the target; or as ``loss_fn`` or the closure
        gave them.
        """
        if self._by_closure or self.loss == "float_cross_entropy" or self.losses.is_floating_point():
            return self.losses.double()
        if self.loss == "cross_entropy":
            return nats(self.losses, self._rows, self.fraction_bits)
        return self.losses.double() / self._rows

    @property
    def mean_loss(self) -> torch.Tensor:
        """Mean of :attr:`group_losses`."""
        return self.group_losses.mean()

    def _fill_scalars(self) -> Noise:
        trunk, head = self.param_groups
        noise = sparse_noise(self.rounds, trunk["p_zero"], trunk["r_max"])
        values = {
            "_shift": update_shift(check_bits(trunk["bits"], "bits"), noise.r_max),
            "_head_bits": check_bits(head["bits"], "head_bits"),
        }
        for name, value in values.items():
            if self._filled.get(name) != value:
                getattr(self, name).fill_(value)
                self._filled[name] = value
        self._filled["noise"] = noise
        return noise

    # --------------------------------------------------------------------------------------------------------- steps

    @with_hooks
    @torch.no_grad()
    def train_step(self, x, y, loss_fn=None) -> torch.Tensor:
        """One step on a batch.

        Args:
            x: :class:`ezo_kernels.Int8Tensor` [B, ...] of one group, or int8 (an exponent of 0).
            y: int64 [B] labels; for ``squared_error`` an Int8Tensor of the model's output shape.
            loss_fn: for a float loss only: ``loss_fn(logits, y)`` of a group's dequantised logits; cross-entropy by default. It
                decides the sign of g alone: the head learns by the integer cross-entropy.

        Returns:
            int64 on the device: the losses of all groups, summed (:attr:`mean_loss` is for people). Float losses are summed as
            floats.

        Raises:
            TypeError: a float tensor. ValueError: an empty batch, a layer that the forward does not call, int32's limit.
            A call that raises changes nothing.
        """
        if loss_fn is not None and self.loss != "float_cross_entropy":
            raise ValueError(f"loss_fn goes with loss='float_cross_entropy'; this one is {self.loss!r}, in integers")
        x, y = self._input(x), self._target(y)
        if self._captured is None:
            return self._eager(x.values, x.exponent, y, loss_fn)
        target = (y.values, y.exponent) if isinstance(y, Int8Tensor) else y
        self._require_model()  # a replay looks at nothing
        loss = self._captured.step(self, loss_fn, x.values, x.exponent, target, loss_fn)
        self._rows = x.shape[0]
        return loss

    @torch.no_grad()
    def _eager(self, values, exponent, y, loss_fn) -> torch.Tensor:
        x, y = Int8Tensor(values, exponent), Int8Tensor(*y) if isinstance(y, tuple) else y

        def run(p, first):
            return self._run(x, y, p, loss_fn, first)

        return self._take(run, x.shape[0])

    @torch.no_grad()
    def step(self, closure=None) -> torch.Tensor:
        """One step of pure zeroth order by torch's contract: ``closure()`` runs the model and returns a loss of one element.

        It is called once a group with the weights of that group; only the sign of the difference counts, so the loss may be an
        integer or a float. Float losses that are not finite make a step that changes nothing.
        """
        if closure is None:
            raise ValueError("ElasticZOInt8.step needs a closure that returns the loss; or call train_step(x, y)")
        if self._captured is not None:
            refuse(["step(closure) takes its batch from the host at each call: train_step(x, y)"])
        if self.head:
            raise ValueError(
                "step(closure) cannot see the labels that the head's integer backward needs: train_step(x, y)"
            )

        def run(p, first):
            if first:
                self._fold_key()
            with self._running(p), self._phase("forward"):
                loss = closure()
            return one_value(loss, "the closure"), {}, None

        return self._take(run, 1, sequential=True)

    def _take(self, run, rows: int, sequential: bool = False) -> torch.Tensor:
        self._require_model()
        noise = self._fill_scalars()
        passes: list = [None]
        if self.trunk:
            p = IntegerPerturbation(self._key, noise, 0, self.queries, (1, -1) if self.antithetic else (1,))
            one_by_one = sequential or self.mode == "sequential"
            passes = [group_pass(p, g) for g in range(p.groups)] if one_by_one else [p]
        gradients = defaultdict(list)
        losses = []
        try:
            self.zo.visited = set()
            with self._phase.layers(self.model, lambda name: in_head(name, plan_of(self.model).head)):
                for p in passes:
                    own, grads, signs = run(p, p is passes[0])
                    self._require_visits()
                    losses.append(own)
                    for name, parts in grads.items():
                        gradients[name] += parts
        except PassError as error:
            names = [s.names[0].rpartition(".")[0] for s in self.zo.manifest if s.site == error.site]
            raise ValueError(f"{names[0]}: {error}" if names and names[0] else str(error)) from error
        finally:
            self.zo.visited = None
        self._check_places()
        self.losses = losses[0] if len(losses) == 1 else torch.cat(losses)
        self._rows, self._by_closure, self._opt_called = rows, sequential, True
        with self._phase("g"):
            total, ok = self._judge(signs, closure=sequential)
        if self.trunk:
            with self._phase("update"):
                self._update(noise, None if signs is None else self._step)
        if gradients:
            with self._phase("head update"):
                self._update_head(gradients, ok)
        return total

    def _update(self, noise: Noise, step: torch.Tensor | None) -> None:
        int8_update_(
            self.trunk, self._key, self.g, self._shift, sites=self._sites, layouts=self._layouts, noise=noise,
            rounding=self.rounding, plan=self._update_plan, step=step,
        )  # fmt: skip

    def _update_head(self, gradients: dict, ok: torch.Tensor | None) -> None:
        learning = [(i, name) for i, name in enumerate(self._head) if gradients.get(name)]
        # parts of several passes are joined, one parameter's at a time
        at_once = all(len(gradients[name]) == 1 for _, name in learning)
        for own in [learning] if at_once else [[one] for one in learning]:
            int8_head_step_(
                [self._head[name] for _, name in own], [HeadGradient.joined(gradients[name]) for _, name in own],
                self._head_bits, key=self._key, sites=[GRADIENT_SITE - 1 - i for i, _ in own],
                rounding=self.head_rounding, rounds=self.rounds, ok=ok,
                remainders=[self._remainders[name] for _, name in own] if self._remainders else [],
            )  # fmt: skip

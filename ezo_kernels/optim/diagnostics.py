"""Says what goes wrong while a model trains, in numbers, and what to try; silent when all is well.

It changes nothing: a run that is watched is the same bit for bit as one that is not. A step is never waited for: losses and g
are copied into a buffer on the device, and only every ``every`` steps is it read, all at once. The first order of a step,

    trunk, floats:    loss(w - lr / queries * sum_q g_q z_q) - loss(w)  ~  -lr * mean_q g_q^2        (z_q . gradient ~ g_q)
    trunk, integers:  each query moves w by -sign(L+ - L-) z_q / 2^n    ~  -|L+ - L-| / 2^(n + 1)

is what g *promises*; held against the loss that was seen it tells noise from progress (docs/method.md).
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops.int8_update import update_shift
from ..ops.noise import check_index
from .activations import Activations
from .elastic_zo import ElasticZO
from .elastic_zo_int8 import ElasticZOInt8
from .findings import Finding, TrainingWarning

#: Windows (of ``every`` steps) without a better mean loss that make a plateau: 4 of 500 steps are more than an epoch of MNIST.
PATIENCE = 4
#: A mean loss is better if it is lower by this fraction: less than half of the 2.3% of LeNet-5's slowest healthy epoch.
BETTER = 0.01
#: The fall of the loss that g promised over those windows, as a fraction of the loss: below it the trunk's rate is too small
#: for its steps to be seen, whatever g is (the end of a cosine schedule, a trunk that has converged).
PROMISED = 0.1
#: A best loss of so many times the one before, and above that of the first window, has diverged, whatever g promises: dead
#: units promise nothing. (A loss near zero may double by chance.)
DIVERGED = 2.0
#: A loss of so many times the first step's, at which a perturbation no longer shows, has blown up within the first window.
BLOWN_UP = 10.0
#: |L+ - L-| over the loss: above it the two points are too far apart for a difference to be a slope (healthy: under 0.01).
EPS_LARGE = 0.25
#: |L+ - L-| over the loss: below 32 units of fp32's last bit less than five bits of g are more than rounding.
EPS_SMALL = 2.0**-18
#: Steps not finite. One in a hundred costs one per cent of the work and is what fp16 does now and then; more has a cause.
NOT_FINITE = 0.01
#: Weights of one tensor at +-127. Uniform weights stretched to the range have 0.8% there; a weight at a rail hears of one side
#: of its perturbation only, so g is wrong about it.
AT_RAILS = 0.02
#: Fewer weights than this at the rails are no share: a small bias always has its largest entry there or near.
LEAST_AT_RAILS = 4
#: Bits that an activation's exponent has moved: after 5, what filled the range of 127 at first is 4 units, two bits.
DRIFT = 5
#: Share of the memory that activations take: above a half, twice the batch or the queries do not fit.
MEMORY = 0.5


@dataclass(frozen=True)
class _Window:
    """Means over the steps between two readings."""

    loss: float
    promised: float  # the fall of the loss, summed over the steps
    difference: float  # |L+ - L-|


class Diagnostics(Activations):
    """Watches a training run beside its optimizer: call :meth:`observe` after each step.

    The step path has no host synchronisation: a few small copies on the device. Every ``every`` steps all is read in one
    transfer. In the first step and in the last one before a reading, forward hooks note exponents and sizes of the activations;
    the replay of a captured step runs no hook, so there both are as they were last noted.

    Args:
        optimizer: :class:`ezo_kernels.ElasticZO` or :class:`ezo_kernels.ElasticZOInt8`; a baseline of
            :mod:`ezo_kernels.optim.baselines` is watched for its losses and memory only. A run with ``node_perturbation``,
            whose g has the noise of outputs as well and promises nothing, is told of losses that rise, not of a plateau.
        every: steps between two readings, at least 1.
        memory_bytes: what activations may fill; default: the memory of the device.
        warn: emit each new finding as a :class:`TrainingWarning`, besides returning it.

    Attributes:
        active: kind -> the finding that stands. It is reported once, and again only after a reading without it.

    Raises:
        TypeError: an optimizer without a ``model``. ValueError: ``every`` or ``memory_bytes`` below 1.
    """

    def __init__(self, optimizer, every: int = 500, memory_bytes: int | None = None, *, warn: bool = True) -> None:
        if not isinstance(getattr(optimizer, "model", None), nn.Module):
            raise TypeError(f"optimizer must be one of this library's, got {type(optimizer).__name__}")
        for name, value in (("every", every), ("memory_bytes", memory_bytes)):
            if value is not None and check_index(value, name, 1 << 62) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.optimizer, self.every, self.warn = optimizer, every, warn
        self.integer = isinstance(optimizer, ElasticZOInt8)
        self.zeroth = bool(self.integer or isinstance(optimizer, ElasticZO)) and bool(optimizer.trunk)
        self.device = next(optimizer.model.parameters()).device
        self.memory_bytes = _device_memory(self.device) if memory_bytes is None else memory_bytes
        self.steps = 0
        self.active: dict[str, Finding] = {}
        self._windows: list[_Window] = []  # the best one, and those after which nothing may have been better
        self._first_loss: float | None = None
        self._start = 0.0
        self._rows: torch.Tensor | None = None  # [every, 1 + groups + queries]: the loss, the groups' losses, g
        self._scales: list[float] = []  # of the same steps: lr, or nats a unit of the loss over 2^(n + 1)
        self._skipped = self._counter()
        self._first_exponents: dict[str, torch.Tensor] = {}
        self._exponents: dict[str, torch.Tensor] = {}
        self._kept: dict[StorageWeakRef, int] | None = None  # of the pass that runs: what autograd keeps, in bytes
        self.kept_bytes = self.passing_bytes = 0
        self._hooks: list = []
        self._arm()

    # ---------------------------------------------------------------------------------------------- on the step path

    @torch.no_grad()
    def observe(self, loss: torch.Tensor | None = None) -> list[Finding]:
        """A step was taken. Call it after each one that updates.

        Args:
            loss: its loss, one element on the device; default: the mean over the groups, as the optimizer has it. A baseline
                has none, so it is needed there.

        Returns:
            What is newly found: always empty between readings, and when all is well.

        Raises:
            TypeError: an integer loss (what ``ElasticZOInt8.train_step`` returns: leave it out), or none where it is needed.
            ValueError: a loss of more than one element.
        """
        if loss is None and not hasattr(self.optimizer, "losses"):
            raise TypeError(f"{type(self.optimizer).__name__} keeps no losses: observe(loss) needs the step's")
        if loss is not None and not (isinstance(loss, torch.Tensor) and loss.is_floating_point()):
            what = loss.dtype if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise TypeError(f"loss must be a floating-point tensor, got {what}: leave it out for an integer optimizer")
        if loss is not None and loss.numel() != 1:
            raise ValueError(f"loss must have one element, got {tuple(loss.shape)}")
        parts = [self._losses().mean() if loss is None else loss.detach()]
        if self.zeroth:
            parts += [self._losses(), self.optimizer.g]
        row = torch.cat([part.reshape(-1).double() for part in parts])
        if self._rows is None:
            self._rows = row.new_empty(self.every, len(row))
        self._rows[self.steps % self.every].copy_(row)
        self._scales.append(self._scale())
        self.steps += 1
        self._disarm()
        found = []
        try:
            if self.steps % self.every == 0:
                found = self._read()
        finally:  # after a reading that raised, too, as one of warnings that are errors
            if self.steps % self.every == 0:
                self._scales.clear()
            if (self.steps + 1) % self.every == 0:
                self._arm()
        return found

    def close(self) -> None:
        """Take the hooks off the model; to be called if the run ends between two readings."""
        self._disarm()

    def _counter(self) -> torch.Tensor:
        """Steps that the optimizer skipped so far: a copy, [1] on the device."""
        skipped = getattr(self.optimizer, "skipped", None)
        return torch.zeros(1, dtype=torch.int64, device=self.device) if skipped is None else skipped.clone().reshape(1)

    def _losses(self) -> torch.Tensor:
        """The groups' losses of the last step, fp64 [groups], means over the rows."""
        return self.optimizer.group_losses if self.integer else self.optimizer.losses.double()

    def _scale(self) -> float:
        if not self.zeroth:
            return 0.0
        trunk = self.optimizer.param_groups[0]
        if not self.integer:
            return trunk["lr"] if self.optimizer.nodes is None else 0.0
        # a pair's difference is twice what a step along z is worth, one sign's is once
        return 2.0 ** -(update_shift(trunk["bits"], trunk["r_max"]) + self.optimizer.antithetic)

    # ------------------------------------------------------------------------------------------------------- reading

    def _read(self) -> list[Finding]:
        """The one place that waits for the device."""
        named = [(n, p) for n, p in self.optimizer.model.named_parameters() if p.dtype == torch.int8]
        rails = [(p.abs() == 127).sum() for _, p in named]
        counter = self._counter()
        moved = [self._exponents[n] - self._first_exponents[n] for n in self._exponents]
        parts = [self._rows, counter - self._skipped, *rails, *moved]
        flat = torch.cat([t.reshape(-1).double() for t in parts]).cpu()
        self._skipped = counter
        rows, rest = flat[: self._rows.numel()].view(self._rows.shape), flat[self._rows.numel() :].tolist()
        found = {}
        for finding in (
            self._plateau(rows),
            self._not_finite(rows, int(rest[0])),
            self._saturated([(n, int(k), p.numel()) for (n, p), k in zip(named, rest[1:], strict=False)]),
            self._drifting(dict(zip(self._exponents, map(int, rest[1 + len(rails) :]), strict=True))),
            self._memory(),
        ):
            if finding is not None:
                found[finding.kind] = finding
        new = [finding for kind, finding in found.items() if kind not in self.active]
        # What still stands keeps the words in which it was reported.
        self.active = {kind: self.active.get(kind, finding) for kind, finding in found.items()}
        if self.warn:
            for finding in new:
                warnings.warn(str(finding), TrainingWarning, stacklevel=3)
        return new

    def _finding(self, kind: str, seen: str, advice: str, **numbers: float) -> Finding:
        return Finding(kind, self.steps, seen, advice, numbers)

    def _plateau(self, rows: torch.Tensor) -> Finding | None:
        if not self.zeroth:
            return None
        paired = getattr(self.optimizer, "antithetic", True)
        groups = self.optimizer.queries * (2 if paired else 1)
        good = torch.isfinite(rows).all(1)
        if not good.any():
            return None
        scales = torch.tensor(self._scales, dtype=torch.float64)[good]
        rows = rows[good]
        losses = rows[:, 1 : 1 + groups]
        differences = (losses[:, 0::2] - losses[:, 1::2] if paired else losses - losses.mean(1, keepdim=True)).abs()
        fall = differences.sum(1) if self.integer else rows[:, 1 + groups :].square().mean(1)
        self._windows.append(_Window(rows[:, 0].mean().item(), (scales * fall).sum().item(), differences.mean().item()))
        if self._first_loss is None:
            self._first_loss, self._start = self._windows[0].loss, rows[0, 0].item()
        if len(self._windows) <= PATIENCE:
            return None
        recent, before = self._windows[-PATIENCE:], self._windows[:-PATIENCE]
        loss, best = min(w.loss for w in recent), min(w.loss for w in before)
        promised = sum(w.promised for w in recent)
        level = abs(loss)
        self._windows = [min(before, key=lambda w: w.loss), *recent]
        diverged = loss - best > (DIVERGED - 1) * abs(best) and loss > self._first_loss
        difference = sum(w.difference for w in recent) / PATIENCE
        # within the first window, whose mean says nothing of it then; a first batch may be an easy one, but g is alive there
        if loss - self._start > (BLOWN_UP - 1) * abs(self._start) and difference < EPS_SMALL * level:
            diverged, best = True, min(best, self._start)
        # a perturbation that does not show promises nothing, or what rounding makes of it
        dead = not self.integer and self.optimizer.nodes is None and difference < EPS_SMALL * level
        if best - loss >= BETTER * abs(best) or (promised < PROMISED * level and not (diverged or dead)):
            return None
        span = PATIENCE * self.every
        seen = f"the loss has {'risen' if diverged else 'not fallen'} for {span} steps: {loss:.4g} at best, {best:.4g} before"
        if promised >= PROMISED * level:
            seen += f". g promised a fall of {promised:.3g} in these steps, so most of it is noise"
        tries = []
        relative = difference / level if level else math.inf
        whose = "the two signs" if paired else "the queries"
        outputs = (
            not self.integer and self.optimizer.nodes is not None
        )  # then the differences are of two kinds of noise
        if relative > EPS_LARGE and not outputs:
            tries.append(
                f"a smaller {'r_max' if self.integer else 'eps'}: the losses of {whose} differ by {relative:.0%}"
            )
        elif relative < EPS_SMALL and (relative or not diverged) and not self.integer and not outputs:
            tries.append(f"a larger eps: the losses of {whose} differ by {relative:.1g} of the loss, fp32's rounding")
        tries.append(f"more queries (now {self.optimizer.queries}), a larger batch or {self._smaller_steps()}")
        tries.append("a cut that gives more layers to backpropagation")
        numbers = {"loss": loss, "best_before": best, "promised": promised, "difference": difference}
        return self._finding("plateau", seen, "; ".join(tries), steps=span, **numbers)

    def _smaller_steps(self) -> str:
        if self.integer:
            return "a larger p_zero"
        rates = f"now {self.optimizer.param_groups[0]['lr']:.3g}"
        if self.optimizer.nodes is not None:
            rates += f", of perturbed outputs {self.optimizer.param_groups[-1]['lr']:.3g}"
        return f"a smaller lr ({rates})"

    def _not_finite(self, rows: torch.Tensor, skipped: int) -> Finding | None:
        losses = int((~torch.isfinite(rows).all(1)).sum())
        count = max(losses, skipped)
        if count < 2 or count <= NOT_FINITE * self.every:
            return None
        seen = f"{count} of the last {self.every} steps were not finite ({100 * count / self.every:.3g}%)"
        if losses < count:
            seen += f"; in {count - losses} of them only the gradients of the head"
        advice = (
            "look at loss_fn or the closure: int8 logits are finite, so it is what makes a number that is not"
            if self.integer
            else "a smaller learning rate of the head or a clip of its gradient, a smaller eps; bf16 or fp32 instead of fp16"
        )
        return self._finding("not_finite", seen, advice, count=count, losses=losses, steps=self.every)

    def _saturated(self, counts: list[tuple[str, int, int]]) -> Finding | None:
        worst = max(
            ((k / n, name, k, n) for name, k, n in counts if k >= LEAST_AT_RAILS and k > AT_RAILS * n), default=None
        )
        if worst is None:
            return None
        share, name, k, n = worst
        in_head = name in self.optimizer._head
        seen = f"{k} of the {n} weights of {name!r} are at +-127 ({share:.1%}): they cannot grow"
        seen += "" if in_head else ", and see one side of z only"
        advice = (
            "smaller head_bits" if in_head else "a larger p_zero or fewer bits"
        ) + ", or a schedule that gets there sooner"
        return self._finding("saturated_weights", seen, advice, share=share, count=k, of=n)

    def _drifting(self, moved: dict[str, int]) -> Finding | None:
        name = max(moved, key=lambda n: abs(moved[n]), default=None)
        if name is None or abs(moved[name]) < DRIFT:
            return None
        bits = moved[name]
        what = f"{2 ** abs(bits)} times {'larger' if bits > 0 else 'smaller'}"
        seen = (
            f"the exponent of the output of {name!r} has moved by {bits:+d} since the first step: its values are {what}"
        )
        return self._finding(
            "exponent_drift",
            seen,
            "smaller head_bits, a larger p_zero, or a schedule that gets there sooner",
            bits=bits,
        )

    def _memory(self) -> Finding | None:
        opt = self.optimizer
        parameters = sum(p.nbytes for p in opt.model.parameters())
        total = opt.memory()["planned_bytes"] if self.integer else self.kept_bytes + self.passing_bytes
        if self.memory_bytes is None or total <= parameters or total <= MEMORY * self.memory_bytes:
            return None
        seen = (
            f"activations take at least {_mib(total)}, {total / self.memory_bytes:.0%} of {_mib(self.memory_bytes)}; the "
            f"parameters take {_mib(parameters)}"
        )
        tries = []
        if self.zeroth and opt.mode == "stacked":
            tries.append(f"mode='sequential', which runs the {opt._groups} groups one by one")
        if self.kept_bytes > self.passing_bytes:
            seen += f"; {_mib(self.kept_bytes)} of it are kept for backpropagation"
            tries.append("a cut nearer to the output, or torch.utils.checkpoint around the layers of the head")
        tries.append("a smaller batch")
        return self._finding(
            "activation_memory", seen, "; ".join(tries), bytes=total, kept_bytes=self.kept_bytes,
            parameter_bytes=parameters, memory_bytes=self.memory_bytes,
        )  # fmt: skip


def _mib(size: float) -> str:
    return f"{size / 2**20:.3g} MiB"


def _device_memory(device: torch.device) -> int | None:
    """Bytes of the device, or None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    with contextlib.suppress(AttributeError, ValueError, OSError):  # sysconf is POSIX's
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None

"""Where to cut: bytes, seconds and predicted gain of every cut, and the one to take."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..nn.convert import convert_
from ..nn.cut import all_cuts
from ..ops.noise import check_index
from ..optim import ElasticZO
from ..optim.batches import rows_of
from .fake import fake_batch, fake_mode, fake_model
from .memory import MODES, OPTIMIZERS, MemoryPlan, batch_of, check_model, memory_plan, new_optimizer, shown
from .signal import Products, check_targets, draw_for, measure, micro_batches, segments
from .table import size, table

#: Share of the best allowed cut's gain that is enough: of the cuts that reach it, the one of fewest bytes is taken. Set by
#: hand before any sweep over cuts was run: a gain is an estimate at one state from few rows, and a tenth is no more than its
#: error. No accuracy, of a validation or of a test split, has entered it.
ENOUGH = 0.9
#: Steps timed a cut after one that is not; their median counts.
TIMED_STEPS = 3


@dataclass(frozen=True)
class LayerSignal:
    """One weight layer, with the norms and other small parameters that move across the cut with it.

    G, G_B and T as in :mod:`ezo_kernels.planning.signal`; ``snr`` is that of the zeroth-order gradient of this layer when the
    trunk ends behind it, queries G / (parameters * G_B of the trunk); ``lr`` the best of this layer alone,
    queries G / (G_B T).
    """

    name: str
    parameters: int
    G: float
    G_B: float
    T: float
    snr: float
    lr: float


@dataclass(frozen=True)
class CutRow:
    """One cut of a :class:`CutChoice`: its bytes, seconds and predicted gain.

    Attributes:
        layers: weight layers in the head. head: what :func:`ezo_kernels.convert_` takes.
        mode: ``stacked`` or ``sequential``.
        bytes: planned, at the peak of a step. seconds: measured, a step; None where the memory budget rules the cut out.
        gain: predicted fall of the loss a step.
        allowed: whether both budgets allow it.
    """

    layers: int
    head: tuple[str, ...] | str
    mode: str
    bytes: int
    seconds: float | None
    gain: float
    allowed: bool


@dataclass(frozen=True)
class CutChoice:
    """What :func:`choose_cut` chose, and why; ``str`` is two tables.

    Attributes:
        layers, head: of the cut that was chosen. rows: every cut that can be trained.
        signals: every weight layer, in the order of a forward.
        plan: all bytes. memory_budget: bytes. time_budget: seconds a step.
    """

    layers: int
    head: tuple[str, ...] | str
    rows: tuple[CutRow, ...]
    signals: tuple[LayerSignal, ...]
    plan: MemoryPlan
    memory_budget: int | None
    time_budget: float | None

    @property
    def mode(self) -> str:
        """``stacked`` or ``sequential``, of the cut that was chosen: what :class:`ezo_kernels.ElasticZO` is to be given."""
        return next(row.mode for row in self.rows if row.layers == self.layers)

    def __str__(self) -> str:
        best = max(row.gain for row in self.rows if row.allowed)
        lines = []
        for row in self.rows:
            seconds = "-" if row.seconds is None else f"{1e3 * row.seconds:.2f}"
            note = "chosen" if row.layers == self.layers else "" if row.allowed else "over budget"
            share = f"{row.gain / best:.3f}" if best > 0 else "-"
            lines.append(
                [str(row.layers), shown(row.head), row.mode, size(row.bytes), seconds, f"{row.gain:.3g}", share, note]
            )
        header = ["layers", "head", "mode", "memory", "ms a step", "gain a step", "of the best", ""]
        layers = [
            [s.name or "(model)", f"{s.parameters:,}", *(f"{v:.3g}" for v in (s.G, s.G_B, s.T, s.snr, s.lr))]
            for s in self.signals
        ]
        of_layers = table(["layer", "parameters", "G", "G_B", "T", "snr", "best lr"], layers)
        chosen = f"head {shown(self.head)}, mode {self.mode}"
        why = f"{chosen}: the fewest bytes of the cuts with {ENOUGH:.0%} of the best allowed gain"
        refused = [f"no cut at {shown(head)}: {reason}" for head, reason in self.plan.refused]
        return "\n".join([why, table(header, lines), *refused, "", of_layers])

    def to_dict(self) -> dict:
        """Everything as JSON takes it."""
        return {
            "layers": self.layers,
            "mode": self.mode,
            "head": self.head if isinstance(self.head, str) else list(self.head),
            "rows": [asdict(row) for row in self.rows],
            "signals": [asdict(s) for s in self.signals],
            "plan": self.plan.to_dict(),
            "memory_budget": self.memory_budget,
            "time_budget": self.time_budget,
            "enough": ENOUGH,
        }

    def plot(self, path: str | Path | None = None):
        """Gain, memory and time against the cut, as a matplotlib Figure; written to ``path`` if one is given.

        Raises:
            ModuleNotFoundError: no matplotlib (the extra ``plot``).
        """
        from .figures import choice_figure

        return choice_figure(self, path)


def seconds_of(step: Callable[[], None]) -> float:
    """Median wall-clock seconds of a call of ``step``, after one that is not timed; a GPU is waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    step()
    times = []
    for _ in range(TIMED_STEPS):
        wait()
        start = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _budget(value, name: str):
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return value


def gains(products: list[Products], queries: int) -> list[float]:
    """Predicted fall of the loss in a step, by the number of weight layers in the head.

    The trunk's gain as one set of weights with one learning rate by zeroth order, plus the head's by backpropagation, each at
    its best; how the two disturb each other is left out.
    """
    total = []
    for n in range(len(products) + 1):
        trunk, head = products[: len(products) - n], products[len(products) - n :]
        gain = functools.reduce(Products.__add__, trunk).moments().gain_zeroth_order(queries) if trunk else 0.0
        gain += functools.reduce(Products.__add__, head).moments().gain_backprop() if head else 0.0
        total.append(gain)
    return total


def _signals(model: nn.Module, cuts, products: list[Products], queries: int) -> tuple[LayerSignal, ...]:
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    found, trunk = [], None
    for (name, own), of_layer in zip(segments(model, cuts), products, strict=True):
        trunk = of_layer if trunk is None else trunk + of_layer
        m, count = of_layer.moments(), sum(sizes[n] for n in own)
        noise, factor = count * trunk.moments().G_B, m.G_B * m.T
        snr = queries * m.G / noise if noise > 0 else 0.0
        found.append(LayerSignal(name, count, m.G, m.G_B, m.T, snr, queries * m.G / factor if factor > 0 else 0.0))
    return tuple(found)


def _stepper(model: nn.Module, x, y, loss_fn, row: CutRow, optimizer: str, queries: int, seed: int):
    """A function that takes one step of this cut, on a copy of the model."""
    twin = convert_(copy.deepcopy(model), head=row.head)
    head = [p for p in twin.parameters() if p.requires_grad]
    opt = ElasticZO(
        twin, queries=queries, mode=row.mode, seed=seed, head_optimizer=new_optimizer(optimizer, head) if head else None
    )

    def step() -> None:
        opt.train_step(x, y, loss_fn)

    return step


def pick(rows: list[CutRow]) -> CutRow:
    """Of the allowed cuts with ENOUGH of the best gain, that of fewest bytes; of equals, the smaller head."""
    allowed = [row for row in rows if row.allowed]
    best = max(row.gain for row in allowed)
    return min((row for row in allowed if row.gain >= ENOUGH * best), key=lambda row: (row.bytes, row.layers))


def choose_cut(
    model: nn.Module,
    sample,
    *,
    memory_budget: int | None = None,
    time_budget: float | None = None,
    signal_sample=None,
    loss_fn=F.cross_entropy,
    draw_target=None,
    mode: str = "auto",
    optimizer: str = "sgd",
    queries: int = 1,
    seed: int = 0,
    time_step: Callable[[Callable[[], None]], float] = seconds_of,
) -> CutChoice:
    """Choose the head of :func:`ezo_kernels.convert_`, before training.

    Three things of every cut: bytes (:func:`ezo_kernels.memory_plan`), seconds of a step (measured on a copy), and the fall of
    the loss that a step is predicted to bring (:mod:`ezo_kernels.planning.signal`, from a few micro-batches of training rows).
    Of the cuts that both budgets allow and that reach ENOUGH of the best gain among them, the one of fewest bytes is taken. The
    gain is of the state the model is in and an order of magnitude, not a law (docs/cut.md).

    The model is left as it is, every bit of it. A gradient of the whole model is taken for micro-batches, so a machine that
    cannot hold one with its copy cannot run this; :func:`ezo_kernels.memory_plan` can. All but the times is deterministic.

    Args:
        model: a plain torch model on its device, in the mode it trains in.
        sample: one batch, the pair (x, y), as large as those of the training (at least two rows); training data, never test
            data.
        memory_budget: bytes at the peak of a step. time_budget: seconds a step.
        signal_sample: training rows that gains are estimated from, a pair like ``sample`` with at least as many rows;
            ``sample`` itself if None. A batch of 32 says little; 16 of them are what ``ezo cut`` takes (docs/cut.md). Each
            pass holds one micro-batch, a sixteenth of them.
        loss_fn: ``loss_fn(output, y)`` -> scalar, a mean over rows.
        draw_target: for a loss other than F.cross_entropy, F.mse_loss and their modules as torch makes them:
            see :func:`ezo_kernels.planning.signal.measure`.
        mode: ``stacked``, ``sequential``, or ``auto``: stacked where the model and the memory budget allow it.
        optimizer: of the head, ``sgd`` or ``adam``, for bytes and seconds.
        queries: directions a step.
        seed: of what is drawn, [0, 2^64).
        time_step: seconds of a call of the function it is given, a step.

    Raises:
        TypeError: an argument of another type.
        ValueError: a budget that no cut can meet, with the smallest that can; a sample without y or of one row (of fewer
            than four, with batch norm); a signal_sample without y or of fewer rows; a y of another length than its x; labels
            that are no class of the model; rows whose loss is not finite; what :func:`ezo_kernels.memory_plan` refuses.
    """
    memory_budget, time_budget = _budget(memory_budget, "memory_budget"), _budget(time_budget, "time_budget")
    seed = check_index(seed, "seed", 1 << 64)
    if mode not in ("auto", *MODES) or optimizer not in OPTIMIZERS:
        raise ValueError(
            f"mode must be one of {('auto', *MODES)} and optimizer one of {OPTIMIZERS}, got {mode!r}, {optimizer!r}"
        )
    check_model(model)
    x, y = batch_of(sample)
    if y is None:
        raise ValueError("a choice needs targets: give the sample as the pair (x, y)")
    draw_for(loss_fn, draw_target)
    micro_batches(model, x)
    rows_x, rows_y = x, y
    if signal_sample is not None:
        try:
            rows_x, rows_y = batch_of(signal_sample)
        except (TypeError, ValueError) as error:
            raise type(error)(f"signal_sample: {error}") from error
        if rows_y is None:
            raise ValueError("gains need targets: give signal_sample as the pair (x, y)")
        if rows_of(rows_x) < rows_of(x):
            raise ValueError(f"signal_sample has {rows_of(rows_x)} rows, fewer than the {rows_of(x)} of the sample")
    check_targets(rows_x, rows_y, loss_fn, "the sample" if signal_sample is None else "signal_sample")
    with torch.random.fork_rng():  # random layers of a timed head draw from torch's global state
        return _choose(
            model, sample, memory_budget, time_budget, (rows_x, rows_y), loss_fn, draw_target, mode, optimizer, queries,
            seed, time_step,
        )  # fmt: skip


def _choose(
    model, sample, memory_budget, time_budget, rows, loss_fn, draw_target, mode, optimizer, queries, seed, time_step
) -> CutChoice:
    """:func:`choose_cut` of checked arguments."""
    x, y = sample
    plan = memory_plan(model, sample, loss_fn=loss_fn, queries=queries)
    planned = {}
    for cut in plan.cuts:
        modes = [m for m in (MODES if mode == "auto" else (mode,)) if (m, optimizer) in cut.bytes]
        if modes:
            ways = [(cut.bytes[m, optimizer].total, m) for m in modes]
            # The first one that fits; of a cut that fits in no way, the one that is nearest to it.
            fit = (way for way in ways if memory_budget is None or way[0] <= memory_budget)
            total, how = next(fit, min(ways))
            planned[cut.layers] = (cut.head, how, total)
    if not planned:
        raise ValueError(f"no cut of this model runs with mode={mode!r}: use 'auto' or 'sequential'")
    least = min(total for _, _, total in planned.values())
    if memory_budget is not None and least > memory_budget:
        raise ValueError(
            f"no cut fits memory_budget={memory_budget:,} bytes: the smallest that one does is {least:,} ({size(least)})"
        )
    fake = fake_mode()
    with fake:
        cuts = all_cuts(fake_model(model, fake), fake_batch(x, fake))
    products = measure(model, *rows, loss_fn, cuts, draw_target=draw_target, batch=rows_of(x), seed=seed)
    gain = gains(products, queries)
    found = []
    for n, (head, how, total) in planned.items():
        fits = memory_budget is None or total <= memory_budget
        row = CutRow(n, head, how, total, None, gain[n], fits)
        if fits:
            seconds = float(time_step(_stepper(model, x, y, loss_fn, row, optimizer, queries, seed)))
            in_time = time_budget is None or seconds <= time_budget
            row = CutRow(n, head, how, total, seconds, gain[n], in_time)
        found.append(row)
    if not any(row.allowed for row in found):
        least = min(row.seconds for row in found if row.seconds is not None)
        also = "" if memory_budget is None else f" and memory_budget={memory_budget:,} bytes"
        raise ValueError(
            f"no cut meets time_budget={time_budget} seconds a step{also}: the smallest that one does is {least!r}"
        )
    chosen = pick(found)
    signals = _signals(model, cuts, products, queries)
    return CutChoice(chosen.layers, chosen.head, tuple(found), signals, plan, memory_budget, time_budget)


@dataclass(frozen=True)
class Regret:
    """Accuracy lost against the best allowed cut, in the unit of the accuracies.

    Attributes:
        best: layers in the head of the best cut.
        chosen: regret of the choice. last_one: of always the last layer, None where it is not allowed. random: expected, of a
            cut drawn evenly from the allowed ones.
    """

    best: int
    chosen: float
    last_one: float | None
    random: float


def regret(accuracies: dict[int, float], chosen: int, *, allowed=None) -> Regret:
    """What a choice lost, beside two choices that need no thought.

    Args:
        accuracies: measured, by the number of weight layers in the head.
        chosen: :attr:`CutChoice.layers`.
        allowed: the cuts that the budgets of the choice allowed; all of ``accuracies`` if None.

    Raises:
        ValueError: a cut that was not measured, a choice that was not allowed, an accuracy that is not finite.
    """
    cuts = sorted(accuracies if allowed is None else set(allowed))
    missing = [n for n in cuts if n not in accuracies]
    if missing or not cuts:
        raise ValueError(f"no accuracy was measured for the cuts {missing}, only for {sorted(accuracies)}")
    if chosen not in cuts:
        raise ValueError(f"the cut {chosen} is not among the allowed ones, {cuts}")
    if not all(math.isfinite(accuracies[n]) for n in cuts):
        raise ValueError(f"accuracies must be finite, got {accuracies}")
    best = max(cuts, key=lambda n: accuracies[n])
    top = accuracies[best]
    last = top - accuracies[1] if 1 in cuts else None
    return Regret(best, top - accuracies[chosen], last, top - statistics.fmean(accuracies[n] for n in cuts))

"""What a trial does with its recipe: train and test, count a step's bytes, time its phases, or choose a cut."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from ...data import Dataset, rotated
from ...planning import choose_cut, int8_step_bytes, plan_int8_step
from ...planning.live import LiveBytes
from ...planning.memory import plan_step
from ...planning.tally import paper_bytes
from ..cut import first_batch, signal_rows
from ..methods import make_optimizer
from ..recipe import Recipe
from ..run import Run, build_model, data_for, inputs, loss_fn, loss_of, owned
from . import regression
from .epsilon import balanced_eps
from .probes import GradientTrace, PhaseTimer, SignCounter, allocated_peak
from .trial import Trial

#: steps before phases are timed, and at most so many that are
WARM_STEPS, TIMED_STEPS = 3, 50


def forwards(recipe: Recipe, batch: int) -> int:
    """Rows that go forward through the whole of the network in a step: the price that arms are compared at."""
    zeroth_order = recipe.method in ("elastic", "mezo") and recipe.head != "all"
    return batch * (recipe.queries * (1 + recipe.antithetic) if zeroth_order else 1)


def step_bytes(recipe: Recipe, data: Dataset, device: torch.device) -> int:
    """The most that lives at one time of what a step allocates, with the parameters, in bytes.

    The storages that torch makes in the second step; of integers the arena is one of them. The batch itself does not count.
    """
    model = build_model(recipe, device)
    optimizer = make_optimizer(recipe, model)
    x = owned(inputs(data.x_train[: recipe.batch], data.name, recipe.precision), device)
    y = torch.from_numpy(data.y_train[: recipe.batch]).to(device)
    if recipe.integer:
        return int8_step_bytes(optimizer, x, y).total
    loss_fn = loss_of(recipe)
    optimizer.train_step(x, y, loss_fn=loss_fn)  # the first one checks the model, with passes of its own
    own = list(model.parameters())
    with LiveBytes([x, y, *own]) as live:
        optimizer.train_step(x, y, loss_fn=loss_fn)
    return live.peak + sum(p.numel() * p.element_size() for p in own)


def allocated_bytes(recipe: Recipe, data: Dataset, device: torch.device) -> int:
    """What torch's allocator gave out at the peak of the second step, with the parameters and, of integers, the arena."""
    model = build_model(recipe, device)
    optimizer = make_optimizer(recipe, model)
    x, y = first_batch(recipe, data, device)
    options = {} if recipe.integer else {"loss_fn": loss_of(recipe)}
    optimizer.train_step(x, y, **options)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    if recipe.integer:
        held += optimizer.arena.buffer.numel() + optimizer.memory()["remainder_bytes"]
    return held + allocated_peak(lambda: optimizer.train_step(x, y, **options), device)


def started(trial: Trial, data: Dataset, device: torch.device) -> dict[str, torch.Tensor]:
    """The weights of a finished run of ``trial.start`` on the images as they are."""
    run = Run(trial.start, data, device)
    run.train(trial.max_steps)
    return run.model.state_dict()


def train(
    trial: Trial, data: Dataset, device: torch.device, after_step: Callable[[], None], test: bool = True
) -> tuple[dict, dict]:
    """Train, with every rate of ``head_lrs`` if there are any; the best on the validation split is tested, once, or not at all.

    With a ``start``, ``start_validation_error`` is that of its weights, before anything adapted to the turned images.
    """
    recipe, extra = trial.recipe, {}
    start = None if trial.start is None else started(trial, data, device)
    if trial.rotate is not None:
        data = rotated(data, trial.rotate)
    data = data_for(recipe, data)
    if trial.eps_rule:
        extra = balanced_eps(recipe, data, device)
        recipe = replace(recipe, eps=extra["eps"])
    make = functools.partial(make_optimizer, int8=SignCounter) if "signs" in trial.probes else make_optimizer
    best, tried, trace = None, [], GradientTrace() if "g" in trial.probes else None
    for rate in trial.head_lrs or (recipe.head_lr,):
        run = Run(replace(recipe, head_lr=rate), data, device, make)
        if start is not None:
            run.model.load_state_dict(start)
            extra["start_validation_error"] = 1 - run.validate()

        def stepped(run: Run) -> None:
            if trace is not None:
                trace(run)
            after_step()

        began = time.perf_counter()
        run.train(trial.max_steps, after_step=stepped)
        seconds = time.perf_counter() - began
        valid = run.validate()
        tried.append({"head_lr": rate, "validation_error": 1 - valid})
        if best is None or valid > best[1]:
            best = (run, valid, seconds)
    run, valid, seconds = best
    curve = [{name: row[name] for name in ("step", "loss", "validation_accuracy")} for row in run.history]
    result = {
        "validation_error": 1 - valid,
        # The one time that the test images are read: nothing is chosen after it.
        **({"test_error": 1 - run.test()} if test else {}),
        "steps": run.step,
        "skipped_steps": run.skipped,
        "forward_rows": run.step * forwards(recipe, recipe.batch),
        "step_bytes": step_bytes(run.recipe, data, device),
        "curve": curve,
        **extra,
    }
    if trial.head_lrs:
        result |= {"tried": tried, "head_lr": run.recipe.head_lr}
    if trace is not None:
        result |= trace.statistics(recipe.eps)
    if "signs" in trial.probes:
        result |= {f"sign_agreement_{bits}": share for bits, share in run.optimizer.agreement.items()}
    timings = {"seconds": seconds}
    if run.step_ms is not None:
        timings["step_ms"] = run.step_ms
    return result, timings


def count_bytes(trial: Trial, data: Dataset, device: torch.device, after_step: Callable[[], None]) -> tuple[dict, dict]:
    """Bytes of a step: measured, planned without one, and by the paper's equations."""
    recipe, model = trial.recipe, build_model(trial.recipe, torch.device("cpu"))
    x, y = first_batch(recipe, data, torch.device("cpu"))
    if recipe.integer:
        mode = "stacked" if recipe.mode == "auto" else recipe.mode
        plan = plan_int8_step(
            model,
            x,
            y,
            head=recipe.head_argument,
            mode=mode,
            queries=recipe.queries,
            head_remainder=recipe.head_remainder,
        )
    else:
        head = None if recipe.method == "bp" else recipe.head_argument
        frozen = recipe.method == "frozen"
        plan = plan_step(model, x, y, loss_fn, head=head, mode=recipe.mode, queries=recipe.queries, frozen=frozen)
    measured = step_bytes(recipe, data, device)
    result = {"step_bytes": measured, "planned_bytes": plan.total, "planned_over_measured": plan.total / measured}
    result["allocated_bytes"] = allocated_bytes(recipe, data, device)
    if recipe.method != "frozen":  # the paper has no equation of a trunk that nobody trains
        floats = x.dequantize() if recipe.integer else x
        result["paper_bytes"] = paper_bytes(model, floats, recipe.head_argument, integer=recipe.integer)
    after_step()
    return result, {}


def choose(trial: Trial, data: Dataset, device: torch.device, after_step: Callable[[], None]) -> tuple[dict, dict]:
    """The cut that :func:`ezo_kernels.choose_cut` takes, from the initial weights and the first training images."""
    recipe = trial.recipe
    sample, more = first_batch(recipe, data, device), signal_rows(recipe, data, device)
    choice = choose_cut(
        build_model(recipe, device),
        sample,
        signal_sample=more,
        mode=recipe.mode,
        queries=recipe.queries,
        seed=recipe.seed,
    )
    rows = [{"layers": r.layers, "bytes": r.bytes, "gain": r.gain} for r in choice.rows]
    after_step()
    # Times do not enter it: there is no time budget.
    result = {"chosen_layers": choice.layers, "signal_rows": len(more[0]), "cuts": rows}
    return result, {"step_ms_of_cuts": [1000 * r.seconds for r in choice.rows]}


def phases(trial: Trial, data: Dataset, device: torch.device, after_step: Callable[[], None]) -> tuple[dict, dict]:
    """Share of a step by phase, in seconds that add up to the step: what no range names is ``other``."""
    recipe = trial.recipe
    run = Run(recipe, data, device)
    timer, total, steps = PhaseTimer(device), 0.0, 0
    most = WARM_STEPS + min(trial.max_steps or TIMED_STEPS, TIMED_STEPS)
    traced = recipe.method == "elastic"
    for x, y in run.batches:
        if steps == WARM_STEPS:
            if traced:
                run.optimizer._phase = timer
            timer.seconds, total = {}, 0.0
        began = timer.now()
        if traced:
            run.optimizer.train_step(x, y, **({} if recipe.integer else {"loss_fn": loss_of(recipe)}))
        else:
            # Backpropagation has no ranges: its loss is called between the forward and the rest.
            marks = []

            def timed(logits, y, marks=marks):
                marks.append(timer.now())
                value = loss_fn(logits, y)
                marks.append(timer.now())
                return value

            run.optimizer.train_step(x, y, loss_fn=timed)
            timer.add("forward", marks[0] - began)
            timer.add("loss", marks[1] - marks[0])
            timer.add("backward and update", timer.now() - marks[1])
        total += timer.now() - began
        steps += 1
        after_step()
        if steps == most:
            break
    if steps <= WARM_STEPS:
        raise ValueError(f"{steps} steps an epoch: more than {WARM_STEPS} are needed to time any; take a smaller batch")
    timer.add("other", max(0.0, total - sum(timer.seconds.values())))
    share = {f"share_{name.replace(' ', '_')}": value / total for name, value in timer.seconds.items()}
    return {"timed_steps": steps - WARM_STEPS}, {"step_ms": 1000 * total / (steps - WARM_STEPS), **share}


RUN = {
    "train": train, "validate": functools.partial(train, test=False), "bytes": count_bytes, "phases": phases,
    "choice": choose, "regression": regression.train,
}  # fmt: skip

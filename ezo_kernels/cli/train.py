"""``ezo train``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from ..data import Dataset, DownloadError, load
from ..ops._constants import INT8_VERSION
from ..ops._strategy import strategy_hash
from ..optim import Diagnostics
from . import checkpoint as ckpt
from . import outputs, system
from .methods import make_optimizer, noise_version
from .recipe import CLOUD_DATA, Recipe
from .replay import check_loggable, start_log, write_log
from .run import Run, data_for, load_data

#: where Ctrl-C leaves the run if no --checkpoint was given
INTERRUPTED = Path("ezo-interrupted.pt")


def say(line: str) -> None:
    print(f"ezo: {line}", file=sys.stderr, flush=True)


def get_data(recipe: Recipe, data_dir: Path | None, offline: bool) -> tuple[Dataset, Recipe]:
    """The data of a recipe, fetched if need be; the digits, said aloud, if it cannot be had.

    Files that the user named are never replaced by others: what is wrong with them is an error.
    """
    if data_dir is not None or recipe.data in ("digits", *CLOUD_DATA):
        return load_data(recipe.data, data_dir, recipe.points), recipe
    try:
        return load(recipe.data, download=not offline, say=say), recipe
    except (DownloadError, FileNotFoundError) as error:
        say(f"WARNING: {error}")
        say(
            f"WARNING: training on scikit-learn's digits instead of {recipe.data}: the results are NOT of {recipe.data}"
        )
        return load("digits"), replace(recipe, data="digits")


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM append to, so that a step is never cut in two; a second one ends the process."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return

    def note(number, frame):
        if received:
            signal.signal(number, signal.SIG_DFL)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """The bar on a terminal, a line an epoch there and elsewhere, nothing with --quiet."""

    #: seconds between two readings of the loss
    PERIOD_S = 1.0

    def __init__(self, run: Run, quiet: bool, last: int) -> None:
        from tqdm import tqdm

        self.quiet = quiet
        self.bar = tqdm(
            total=last,
            initial=run.step,
            unit="step",
            disable=quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.1,
        )
        self.next_text = 0.0

    def after_step(self, run: Run) -> None:
        self.bar.update()
        now = time.monotonic()
        # Reading the loss waits for the device: once in a while, and only where somebody watches.
        if self.bar.disable or now < self.next_text:
            return
        self.next_text = now + self.PERIOD_S
        done = (run.step - 1) % len(run.batches) + 1
        loss = run.losses[max(0, done - 50) : done].nanmean().item()
        valid = f"{100 * run.history[-1]['validation_accuracy']:.2f}%" if run.history else "-"
        memory = system.peak_memory(run.device)[0] / 2**20
        self.bar.set_postfix_str(f"loss {loss:.4f}, validation {valid}, {memory:.0f} MiB", refresh=False)

    def after_epoch(self, run: Run) -> None:
        if self.quiet:
            return
        row = run.history[-1]
        self.bar.write(
            f"epoch {row['epoch']:g}/{run.recipe.epochs}  loss {row['loss']:.4f}  "
            f"validation {100 * row['validation_accuracy']:.2f}%  {row['seconds']:.1f} s",
            file=sys.stdout,
        )
        sys.stdout.flush()


def record(run: Run, asked: str, validation: float, test: float | None, history: list[dict], seconds: float) -> dict:
    """The JSON of a run."""
    peak, peak_is = system.peak_memory(run.device)
    recipe = run.recipe
    return {
        "model": recipe.model,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "data": run.data.name,
        "data_asked": asked,
        "data_source": run.data.source,
        "genuine": run.data.genuine,
        "method": recipe.method,
        "head": recipe.head,
        "precision": recipe.precision,
        "epochs": recipe.epochs,
        "steps": run.step,
        "steps_of_recipe": run.steps,
        "validation_accuracy": validation,
        "test_accuracy": test,
        "step_ms": run.step_ms,
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "peak_memory_is": peak_is,
        "skipped_steps": run.skipped,
        "seed": recipe.seed,
        "rng_version": noise_version(recipe),
        "strategy_hash": None if recipe.integer else strategy_hash(),
        "numerics_version": INT8_VERSION if recipe.integer else None,
        "device": run.device.type,
        "device_name": system.device_name(run.device),
        "recipe": recipe.as_dict(),
        "versions": system.versions(),
        "history": history,
    }


def train(args: argparse.Namespace) -> int:
    """Train; the exit code is 0, or 128 + the signal that ended it."""
    began = time.perf_counter()
    outputs.check_writable("--json", args.json)
    outputs.check_writable("--checkpoint", args.checkpoint)
    outputs.check_plot(args.plot)
    outputs.check_writable("--seed-log", args.seed_log)
    written = {"json": args.json, "plot": args.plot, "seed_log": args.seed_log}
    outputs.check_apart(data_dir=args.data_dir, checkpoint=args.checkpoint, **written)
    outputs.check_apart(resume=args.resume, **written)  # whose checkpoint may be written again, and by nothing else
    if args.max_steps is not None and args.max_steps < 1:
        raise ValueError(f"--max-steps is {args.max_steps}: at least 1 is needed")
    if args.threads < 1:
        raise ValueError(f"--threads is {args.threads}: at least 1 is needed")
    torch.set_num_threads(args.threads)
    given = {field.name: getattr(args, field.name) for field in fields(Recipe) if hasattr(args, field.name)}
    resumed = ckpt.read(args.resume) if args.resume else None
    recipe = ckpt.merge(given, resumed, args.resume)
    recipe.check_given(given)
    if args.seed_log:
        check_loggable(recipe)
    if resumed:
        ckpt.check_rng(noise_version(recipe), resumed, args.resume)
    device = system.pick_device(args.device)
    asked = recipe.data
    data, recipe = get_data(recipe, args.data_dir, args.offline)
    run = Run(recipe, data_for(recipe, data), device, functools.partial(make_optimizer, capture=args.capture))
    if resumed:
        if resumed["genuine"] != data.genuine:
            raise ValueError(f"{args.resume}: a checkpoint of other data: genuine was {resumed['genuine']}")
        ckpt.load_model(run.model, resumed, args.resume)
        run.load_state(resumed)

    log = start_log(run, args.seed_log, bool(resumed))

    def save(path: Path | None) -> None:
        if log is not None:
            write_log(log, run, args.seed_log)
        if path is None:
            return
        ckpt.save(
            path,
            recipe=recipe.as_dict(),
            rng_version=noise_version(recipe),
            genuine=data.genuine,
            **run.state(),
        )

    last = min(args.max_steps or run.steps, run.steps)
    progress = Progress(run, args.quiet, last)

    watch, findings = Diagnostics(run.optimizer, warn=False), []

    def after_step(run: Run) -> None:
        if log is not None:
            log.observe()
        progress.after_step(run)
        for finding in watch.observe(run.losses[(run.step - 1) % len(run.batches)]):
            progress.bar.write(f"ezo: WARNING: {finding}", file=sys.stderr)
            findings.append(asdict(finding))

    def after_epoch(run: Run) -> None:
        progress.after_epoch(run)
        save(args.checkpoint)

    with interruptible() as received:
        finished = run.train(args.max_steps, lambda: bool(received), after_step, after_epoch)
        watch.close()
        progress.bar.close()
        if not finished:
            path = args.checkpoint or INTERRUPTED
            save(path)
            say(f"stopped after step {run.step} of {run.steps}; go on with: ezo train --resume {path}")
            return 128 + received[0]
        save(args.checkpoint)
    history = list(run.history)
    if not history or history[-1]["step"] != run.step:
        history.append(run.row())
    # The one time that the test images are read: nothing is chosen after it.
    test = run.test()
    result = record(run, asked, history[-1]["validation_accuracy"], test, history, 0.0)
    result["findings"] = findings
    result["seconds"] = time.perf_counter() - began
    if args.json:
        outputs.write_json(args.json, result)
    if args.plot:
        outputs.write_plot(args.plot, result)
    step = f"{run.step_ms:.2f} ms a step, " if run.step_ms else ""
    skipped = f" ({run.skipped} skipped: their loss was not finite)" if run.skipped else ""
    unlike = " (NOT the genuine MNIST files)" if not data.genuine and data.name not in CLOUD_DATA else ""
    print(
        f"{data.name}{unlike}: test accuracy {100 * test:.2f}%, "
        f"validation {100 * result['validation_accuracy']:.2f}% after {run.step} steps{skipped}; "
        f"{step}{result['peak_memory_bytes'] / 2**20:.0f} MiB, {result['seconds']:.0f} s"
    )
    return 0

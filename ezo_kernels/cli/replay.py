"""``ezo replay``: a trained model again, from the seed log of its training."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from .._files import replacing
from ..optim import SeedLog
from . import outputs, system
from .methods import make_optimizer
from .recipe import Recipe
from .run import Run, accuracy, build_model, data_for, inputs, load_data


def check_loggable(recipe: Recipe) -> None:
    """ValueError where the steps of a recipe are not made of seeds and a few numbers."""
    if recipe.method != "elastic" or recipe.head == "all":
        raise ValueError(f"--seed-log is of method elastic with a trunk, not {recipe.method} with head {recipe.head}")


def start_log(run: Run, path: Path | None, resumed: bool) -> SeedLog | None:
    """The log that a run writes to ``path``: a new one, or of a resumed run the one that is there."""
    if path is None:
        return None
    if not resumed:
        return SeedLog(run.optimizer)
    log = SeedLog.load(path)
    log.resume(run.optimizer)
    return log


def write_log(log: SeedLog, run: Run, path: Path) -> None:
    """The log with the recipe beside it, by which :func:`replay` builds the model."""
    log.save(path, {"recipe": run.recipe.as_dict()})


def replay(args: argparse.Namespace) -> int:
    """Build the model as the recipe begins it, carry out the log's steps, and take its accuracy."""
    outputs.check_writable("--json", args.json)
    outputs.check_writable("--weights", args.weights)
    outputs.check_apart(data_dir=args.data_dir, log=args.log, json=args.json, weights=args.weights)
    log = SeedLog.load(args.log)
    if not isinstance(log.note.get("recipe"), dict):
        raise ValueError(
            f"{args.log}: a log that no `ezo train --seed-log` wrote: SeedLog.replay_ takes your own model"
        )
    recipe = Recipe.from_dict(log.note["recipe"])
    device = system.pick_device(args.device)
    data = data_for(recipe, load_data(recipe.data, args.data_dir, recipe.points))
    model = build_model(recipe, device)
    make_optimizer(recipe, model)  # which converts it as the run's was
    began = time.perf_counter()
    log.replay_(model)
    seconds = time.perf_counter() - began
    x = inputs(data.x_test, data.name, recipe.precision).to(device)
    value = accuracy(model, x, torch.from_numpy(data.y_test).to(device))
    size = args.log.stat().st_size
    print(
        f"{recipe.model} on {data.name}: {len(log)} steps from {size:,} bytes in {seconds:.1f} s, bit for bit; "
        f"test accuracy {100 * value:.2f}%"
    )
    if args.weights:
        with replacing(args.weights) as temporary:
            torch.save(model.state_dict(), temporary)
    if args.json:
        result = {
            "model": recipe.model, "data": data.name, "genuine": data.genuine, "steps": len(log), "log_bytes": size,
            "seconds": seconds, "test_accuracy": value,
        }  # fmt: skip
        outputs.write_json(args.json, result)
    return 0

"""``ezo cut``: which layers to give to backpropagation, inside a budget of bytes and of time."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from ..data import Dataset
from ..planning import choose_cut
from ..planning.signal import MICRO_BATCHES, draw_classes
from . import outputs, system
from .recipe import Recipe
from .run import build_model, data_for, inputs, load_data, loss_fn, owned

SPLITS = ("train", "valid", "test")
#: Batches of training images that ``ezo cut`` and the experiment ``partition`` estimate gains from, so that each micro-batch is
#: one. Raised from 1 after the sweeps of LeNet-5 and the MLP, before PointNet's (docs/cut.md).
SIGNAL_BATCHES = MICRO_BATCHES


def first_batch(recipe: Recipe, data: Dataset, device: torch.device):
    """The first training images as the recipe's model takes them, in a batch, with their labels.

    Raises:
        ValueError: fewer images than that.
    """
    if recipe.batch > len(data.x_train):
        raise ValueError(
            f"a batch of {recipe.batch} out of {len(data.x_train)} training images of {data.name}: too few"
        )
    # Before they become clouds: the others are not needed.
    few = {f"{kind}_{split}": getattr(data, f"{kind}_{split}")[: recipe.batch] for kind in "xy" for split in SPLITS}
    data = data_for(recipe, replace(data, **few))
    x = inputs(data.x_train, data.name, recipe.precision)
    return owned(x, device), torch.from_numpy(data.y_train).to(device)


def signal_rows(recipe: Recipe, data: Dataset, device: torch.device):
    """The first SIGNAL_BATCHES batches as :func:`first_batch` has one; fewer rows of a data set that has not as many."""
    rows = min(SIGNAL_BATCHES * recipe.batch, len(data.x_train))
    return first_batch(replace(recipe, batch=rows), data, device)


def cut(args: argparse.Namespace) -> int:
    """``ezo cut``: the chosen head of a model with its initial weights, from the first batches of the training images."""
    outputs.check_writable("--json", args.json)
    outputs.check_plot(args.plot)
    outputs.check_apart(data_dir=args.data_dir, json=args.json, plot=args.plot)
    if args.batch < 2:
        raise ValueError(f"--batch must be at least 2, got {args.batch}")
    if args.precision == "int8":
        raise ValueError(
            "--precision int8: a cut is chosen by gradients, which integers do not have: choose it in floats, and give its "
            "head to ezo train --precision int8; ezo_kernels.planning.plan_int8_step has the bytes of a step in integers"
        )
    torch.set_num_threads(1)
    device = system.pick_device(args.device)
    recipe = Recipe(
        model=args.model, hidden=args.hidden, data=args.data, precision=args.precision, seed=args.seed, batch=args.batch
    )  # fmt: skip
    if args.hidden != Recipe.hidden:
        recipe.check_given(("hidden",))
    data = load_data(recipe.data, args.data_dir, recipe.points)
    x, y = first_batch(recipe, data, device)
    rows = signal_rows(recipe, data, device)
    choice = choose_cut(
        build_model(recipe, device),
        (x, y),
        signal_sample=rows,
        loss_fn=loss_fn,
        draw_target=draw_classes,
        memory_budget=args.memory,
        time_budget=args.time,
        queries=args.queries,
        seed=args.seed,
    )
    print(choice)
    if args.json:
        own = {"model": recipe.model, "precision": recipe.precision, "data": data.name, "batch": len(x)}
        own["signal_rows"] = len(rows[0])
        outputs.write_json(args.json, {**choice.to_dict(), **own})
    if args.plot:
        choice.plot(args.plot)
    return 0

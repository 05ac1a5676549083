"""``ezo cut``: which layers to give to backpropagation, inside a budget of bytes and of time."""

from __future__ import annotations

import argparse

import torch

from ..data import load
from ..planning import choose_cut
from . import outputs, system
from .recipe import Recipe
from .run import build_model, inputs


def cut(args: argparse.Namespace) -> int:
    """``ezo cut``: the chosen head of a model with its initial weights, from the first batch of the training images."""
    outputs.check_writable("--json", args.json)
    outputs.check_plot(args.plot)
    if args.batch < 2:
        raise ValueError(f"--batch must be at least 2, got {args.batch}")
    torch.set_num_threads(1)
    device = system.pick_device(args.device)
    recipe = Recipe(model=args.model, hidden=args.hidden, data=args.data, seed=args.seed)
    data = load(recipe.data, args.data_dir)
    x = inputs(data.x_train[: args.batch], data.name, recipe.precision).to(device)
    y = torch.from_numpy(data.y_train[: args.batch]).to(device, torch.int64)
    choice = choose_cut(
        build_model(recipe, device),
        (x, y),
        memory_budget=args.memory,
        time_budget=args.time,
        queries=args.queries,
        seed=args.seed,
    )
    print(choice)
    if args.json:
        outputs.write_json(args.json, {**choice.to_dict(), "model": recipe.model, "data": data.name, "batch": len(x)})
    if args.plot:
        choice.plot(args.plot)
    return 0

"""``ezo eval``, ``ezo info`` and ``ezo data``."""

from __future__ import annotations

import argparse
import sys

import torch

from ..data import download
from ..nn import convert_
from . import checkpoint as ckpt
from . import outputs, system
from .recipe import Recipe
from .run import DTYPES, accuracy, build_model, data_for, inputs, load_data


def evaluate(args: argparse.Namespace) -> int:
    """``ezo eval``: accuracy of a checkpoint on the validation or the test images."""
    outputs.check_writable("--json", args.json)
    outputs.check_apart(data_dir=args.data_dir, checkpoint=args.checkpoint, json=args.json)
    contents = ckpt.read(args.checkpoint)
    recipe: Recipe = contents["recipe"]
    device = system.pick_device(args.device)
    model = build_model(recipe, device)
    if recipe.integer:
        convert_(model, head=recipe.head_argument, precision="int8")
    ckpt.load_model(model, contents, args.checkpoint)
    data = data_for(recipe, load_data(recipe.data, args.data_dir, recipe.points))
    short = {"validation": "valid", "test": "test"}[args.split]
    x = inputs(getattr(data, f"x_{short}"), data.name, recipe.precision).to(device)
    value = accuracy(model, x, torch.from_numpy(getattr(data, f"y_{short}")).to(device))
    print(f"{recipe.model} on {data.name}, {len(x)} {args.split} images: accuracy {100 * value:.2f}%")
    if args.json:
        result = {
            "model": recipe.model,
            "data": data.name,
            "genuine": data.genuine,
            "split": args.split,
            "images": len(x),
            f"{args.split}_accuracy": value,
            "steps": contents["step"],
            "rng_version": contents["rng_version"],
        }
        outputs.write_json(args.json, result)
    return 0


#: shape of one image or cloud, by model
SHAPES = {"lenet5": (1, 28, 28), "mlp": (1, 28, 28), "pointnet": (3, 128)}


def info(args: argparse.Namespace) -> int:
    """``ezo info``: what runs here, and how each layer of a model would be trained, by which strategy, and why."""
    from ..nn import summary
    from ..ops._strategy import strategy_hash
    from ..ops.noise import rng_version

    given = [name for name in ("batch", "noise", "arch", "strategy") if getattr(args, name) is not None]
    if given and args.precision == "int8":
        raise ValueError(f"{', '.join('--' + name for name in given)}: no meaning with --precision int8")
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    if args.arch is not None and args.arch < 0:
        raise ValueError(f"--arch must be at least 0, got {args.arch}")
    device = system.pick_device(args.device)
    precision = "fp32" if args.precision == "float" else args.precision
    recipe = Recipe(model=args.model, hidden=args.hidden, head=args.head or "", precision=precision)
    if args.hidden != Recipe.hidden:
        recipe.check_given(("hidden",))
    model, of = build_model(recipe, device), f"{args.model}, head {recipe.head}"
    if recipe.integer:
        table = summary(convert_(model, head=recipe.head_argument, precision="int8"))
    else:
        convert_(model, head=recipe.head_argument, strategy=args.strategy or "auto")
        batch = args.batch or recipe.batch
        sample = torch.zeros(batch, *SHAPES[args.model], dtype=DTYPES[precision], device=device)
        noise = args.noise or recipe.noise
        table = summary(model, sample, noise=noise, arch=args.arch)
        on = "this device" if args.arch is None else f"sm_{args.arch}" if args.arch else "a CPU"
        of += f", batches of {batch}, {noise}, strategies of {on}"
    for name, version in system.versions().items():
        print(f"{name:12} {version}")
    print(f"{'noise':12} {rng_version(7)}")
    print(f"{'strategies':12} {strategy_hash()}")
    print(f"{'device':12} {device.type}: {system.device_name(device)}")
    print(f"\n{of}:")
    print(table)
    return 0


def data(args: argparse.Namespace) -> int:
    """``ezo data``: a data set into the cache."""
    folder = download(args.name, lambda line: print(f"ezo: {line}", file=sys.stderr, flush=True))
    print(f"{args.name}: genuine, in {folder}")
    return 0

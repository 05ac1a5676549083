"""Has the trunk learnt anything? ElasticZO against a frozen trunk with the same head, tuned over five learning rates.

    python -m bench.frozen_trunk --data mnist --data-dir DIR --out bench/results/frozen_trunk_mnist.json

Both arms have the same initialisation, preprocessing, batches, schedule and number of steps. Learning rates are chosen on the
validation split, the frozen trunk's for each seed on its own; the test set is read once, at the end of each run. A run that
is in the file already is not run again, and one that was stopped goes on from its last epoch, with the same bits: after each
it leaves FILE.HEAD.SEED.pt beside FILE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import ezo_kernels as ezo
from ezo_kernels.cli.experiments.recipes import FROZEN_LRS
from ezo_kernels.data import Batches, load, standardize

_COMMON = {"eps": 1e-3, "clip": 5.0, "noise": "gaussian"}
#: One forward a query, and layers perturbed in proportion to their weights (docs/recipes.md, A scale a layer).
_MANY = {**_COMMON, "antithetic": False}
#: data -> head -> recipe, chosen on the validation split (docs/recipes.md).
RECIPES = {
    "mnist": {
        ("fc3",): {"lr": 1e-4, "queries": 1, "head_lr": 0.05, **_COMMON},
        ("fc2", "fc3"): {"lr": 8e-4, "queries": 8, "head_lr": 0.1, **_COMMON},
    },
    "fashion_mnist": {
        ("fc3",): {
            **_MANY,
            "lr": 2e-3,
            "queries": 16,
            "head_lr": 0.1,
            "scales": {"conv1": 2.0, "fc1": 0.3, "fc2": 0.6},
        },
        ("fc2", "fc3"): {**_MANY, "lr": 3e-3, "queries": 64, "head_lr": 0.1, "scales": {"conv1": 2.0, "fc1": 0.4}},
    },
}

#: Passes over the training images, of both arms: data -> head, 10 where it is not named.
EPOCHS = {"fashion_mnist": {("fc2", "fc3"): 20}}


def _errors(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of wrong labels."""
    with torch.no_grad():
        wrong = sum((model(a).argmax(1) != b).sum() for a, b in zip(x.split(1000), y.split(1000), strict=True))
    return wrong.item() / len(x)


def _lenet(seed: int) -> nn.Module:
    return ezo.models.LeNet5(generator=torch.Generator().manual_seed(seed))


def _below(model: nn.Module, head: list[str], x: torch.Tensor) -> torch.Tensor:
    """What the frozen trunk hands to the head: made once, since it never changes."""
    captured = {}
    hook = getattr(model, head[0]).register_forward_pre_hook(lambda _, args: captured.update(x=args[0]))
    parts = []
    with torch.no_grad():
        for chunk in x.split(1000):
            model(chunk)
            parts.append(captured["x"])
    hook.remove()
    return torch.cat(parts)


def frozen(splits: dict, head: list[str], seed: int, epochs: int, batch: int) -> dict:
    """The frozen trunk at the best of ``FROZEN_LRS``."""
    best = None
    for lr in FROZEN_LRS:
        model = _lenet(seed)
        features = {k: _below(model, head, x) for k, (x, _) in splits.items()}
        layers = [getattr(model, name) for name in head]
        net = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        batches = Batches(features["train"], splits["train"][1], batch, seed)
        schedule = CosineAnnealingLR(optimizer, epochs * len(batches))
        for _ in range(epochs):
            for x, y in batches:
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                schedule.step()
        valid = _errors(net, features["valid"], splits["valid"][1])
        if best is None or valid < best["validation_error"]:
            best = {"lr": lr, "validation_error": valid, "net": net, "features": features}
    best["test_error"] = _errors(best.pop("net"), best.pop("features")["test"], splits["test"][1])
    return best


def elastic(
    splits: dict, head: list[str] | int, seed: int, epochs: int, batch: int, recipe: dict, kept: Path | None = None
) -> dict:
    """ElasticZO with ``recipe``; goes on from ``kept``, written after each epoch, if that is of the same run."""
    model = ezo.convert_(_lenet(seed), head=head)
    opt = ezo.ElasticZO(model, seed=seed, **recipe)
    batches = Batches(*splits["train"], batch, seed)
    schedule = CosineAnnealingLR(opt, epochs * len(batches))
    whose, seconds, curve = {"recipe": recipe, "seed": seed, "epochs": epochs, "batch": batch}, 0.0, []
    if kept is not None and kept.exists():
        held = torch.load(kept, weights_only=True)
        if held["of"] == whose:
            model.load_state_dict(held["model"])
            opt.load_state_dict(held["optimizer"])
            schedule.load_state_dict(held["schedule"])
            seconds, curve = held["seconds"], held["curve"]
            batches.next_epoch = len(curve)
    while len(curve) < epochs:
        start = time.perf_counter()
        for x, y in batches:
            opt.train_step(x, y)
            schedule.step()
        curve.append(_errors(model, *splits["valid"]))
        seconds += time.perf_counter() - start
        if kept is not None:
            states = {"model": model, "optimizer": opt, "schedule": schedule}
            held = {name: one.state_dict() for name, one in states.items()}
            torch.save({"of": whose, "seconds": seconds, "curve": curve, **held}, kept.with_suffix(".tmp"))
            os.replace(kept.with_suffix(".tmp"), kept)
    return {
        "recipe": recipe,
        "steps": opt.step_count.item(),
        "skipped": opt.skipped.item(),
        "seconds": seconds,
        "validation_curve": curve,
        "validation_error": curve[-1],
        "test_error": _errors(model, *splits["test"]),
        "rng_version": opt.rng_version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=sorted(RECIPES), required=True)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=None, help="of every run, instead of its own")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--heads", nargs="+", default=["fc3", "fc2,fc3"], help="each a list of layers, by commas")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = load(args.data, args.data_dir)
    if not data.genuine:
        raise SystemExit(f"{args.data} from {data.source} is not the genuine set: no evidence is made of it")
    splits = {
        k: (standardize(getattr(data, f"x_{k}"), args.data), torch.from_numpy(getattr(data, f"y_{k}")))
        for k in ("train", "valid", "test")
    }
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    done = {(tuple(r["head"]), r["seed"], r["epochs"]) for r in runs}
    for seed in args.seeds:
        for head in (name.split(",") for name in args.heads):
            epochs = args.epochs or EPOCHS.get(args.data, {}).get(tuple(head), 10)
            if (tuple(head), seed, epochs) in done:
                continue
            run = {"data": args.data, "head": head, "seed": seed, "epochs": epochs, "batch": args.batch}
            kept = args.out.with_suffix(f".{'+'.join(head)}.{seed}.pt")
            run["elastic"] = elastic(splits, head, seed, epochs, args.batch, RECIPES[args.data][tuple(head)], kept)
            run["frozen"] = frozen(splits, head, seed, epochs, args.batch)
            run["ratio"] = run["elastic"]["test_error"] / run["frozen"]["test_error"]
            runs.append(run)
            environment = {"torch": torch.__version__, "device": "cpu", "ezo_kernels": ezo.__version__}
            temporary = args.out.with_suffix(".tmp")
            temporary.write_text(json.dumps({"environment": environment, "runs": runs}, indent=1) + "\n")
            os.replace(temporary, args.out)
            kept.unlink()
            # The validation split alone is shown while recipes are chosen; the test errors are in the file.
            ours, theirs = run["elastic"]["validation_error"], run["frozen"]["validation_error"]
            print(
                f"{args.data} head={'+'.join(head)} seed={seed}: validation error {ours:.4f} against {theirs:.4f} frozen "
                f"(lr {run['frozen']['lr']}): ratio {ours / theirs:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

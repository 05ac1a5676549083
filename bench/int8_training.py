"""ElasticZO-INT8 on genuine data, beside its fp32 twin, backpropagation and the tuned frozen trunk.

    python -m bench.int8_training --data mnist --data-dir DIR --out bench/results/int8_mnist.json

One file a data set; a run that is in it is not run again. Recipes were chosen on the validation split (docs/recipes.md), which
is all that is printed; the test set is read once, at the end of a run. An integer run also counts, at every fourth
step of all of it, whether the integer loss of each kind has the sign of the float loss of the same int8 logits; ties count as
disagreement.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import ezo_kernels as ezo
from bench.frozen_trunk import _errors, _lenet, elastic, frozen
from ezo_kernels.cli.experiments.probes import SignCounter
from ezo_kernels.data import Batches, load, quantize_images, standardize
from ezo_kernels.optim import IntegerSchedule
from ezo_kernels.optim.baselines import BackpropSGD

#: Passes over the training images of an arm.
EPOCHS = {
    "pure": {"mnist": 125, "fashion_mnist": 60},
    "fc3": {"mnist": 10, "fashion_mnist": 10},
    "fc2,fc3": {"mnist": 10, "fashion_mnist": 60},
    "dense": {"mnist": 10, "fashion_mnist": 10},
}
#: of backpropagation: more only overfit
BP_EPOCHS = 10
#: Arms without a head; ``dense`` perturbs half of all weights at each step, which is where the paper's rule for the sign holds.
HEADLESS = ("pure", "dense")
#: data -> arm -> options of ElasticZOInt8, and its schedule by fraction of the run.
#: Steps of one unit, at first many, then few: p_zero is the learning rate.
_PURE = {
    "mnist": (
        {"r_max": 15, "p_zero": 0.9, "bits": 0},
        {
            0.006: {"r_max": 127, "p_zero": 0.997},
            0.1: {"r_max": 63},
            0.4: {"p_zero": 0.9985},
            0.6: {"p_zero": 0.9993},
            0.8: {"r_max": 127, "p_zero": 0.9997},
        },
    ),
    "fashion_mnist": (
        {"r_max": 15, "p_zero": 0.9, "bits": 0},
        {
            0.01: {"r_max": 63, "p_zero": 0.99},
            0.3: {"r_max": 127, "p_zero": 0.996},
            0.65: {"p_zero": 0.9985},
            0.87: {"p_zero": 0.9994},
        },
    ),
}
_HEAD = (
    {"r_max": 15, "p_zero": 0.95, "bits": 0, "head_bits": 2, "head_remainder": True},
    {
        0.1: {"r_max": 31, "p_zero": 0.97},
        0.2: {"head_bits": 1},
        0.3: {"p_zero": 0.98},
        0.4: {"head_bits": 0},
        0.6: {"r_max": 63, "p_zero": 0.99, "head_bits": -1},
        0.8: {"r_max": 127, "p_zero": 0.9975, "head_bits": -2},
        0.92: {"p_zero": 0.9993, "head_bits": -3},
    },
)
_DENSE = ({"r_max": 15, "p_zero": 0.5, "bits": -2}, {0.3: {"bits": -3}, 0.7: {"bits": -4}})
INT8 = {name: {"pure": pure, "fc3": _HEAD, "fc2,fc3": _HEAD, "dense": _DENSE} for name, pure in _PURE.items()}
#: data -> arm -> options of ElasticZO.
FP32 = {
    name: {
        "pure": {"lr": 1e-4, "eps": 1e-3, "clip": 5.0},
        "fc3": {"lr": 1e-4, "eps": 1e-3, "clip": 5.0, "head_lr": 0.05},
        "fc2,fc3": {"lr": 1e-4, "eps": 1e-3, "clip": 5.0, "head_lr": 0.05},
    }
    for name in ("mnist", "fashion_mnist")
}


def head_of(arm: str):
    return 0 if arm in HEADLESS else arm.split(",")


def int8_errors(model, x, y) -> float:
    """Share of wrong labels, by batches of 1000 with an exponent each."""
    return sum(
        int((model(a).values.argmax(1) != b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True)
    ) / len(y)


def run_int8(images: dict, data: str, arm: str, seed: int, epochs: int, batch: int) -> dict:
    options, milestones = INT8[data][arm]
    model = ezo.convert_(_lenet(seed), head=head_of(arm), precision="int8")
    opt = SignCounter(model, seed=seed, **options)
    batches = Batches(*images["train"], batch, seed)
    total = epochs * len(batches)
    schedule = IntegerSchedule(opt, {int(at * total): changes for at, changes in milestones.items()})
    start, curve = time.perf_counter(), []
    for _ in range(epochs):
        for x, y in batches:
            opt.train_step(x, y)
            schedule.step()
        curve.append(int8_errors(model, *images["valid"]))
    return {
        "recipe": options, "schedule": {str(k): v for k, v in milestones.items()}, "steps": int(opt.step_count),
        "seconds": time.perf_counter() - start, "validation_curve": curve, "validation_error": curve[-1],
        "test_error": int8_errors(model, *images["test"]), "rng_version": opt.rng_version,
        "numerics_version": opt.numerics_version, "memory": opt.memory(), "pairs": opt.pairs,
        "agreement": {str(bits): share for bits, share in opt.agreement.items()},
    }  # fmt: skip


def run_bp(splits: dict, seed: int, epochs: int, batch: int, lr: float = 0.05) -> dict:
    """All of the network by backpropagation and SGD, with a cosine."""
    model = _lenet(seed)
    opt = BackpropSGD(model, lr=lr)
    batches = Batches(*splits["train"], batch, seed)
    schedule = CosineAnnealingLR(opt, epochs * len(batches))
    start = time.perf_counter()
    for _ in range(epochs):
        for x, y in batches:
            opt.train_step(x, y)
            schedule.step()
    return {
        "recipe": {"lr": lr}, "steps": epochs * len(batches), "seconds": time.perf_counter() - start,
        "validation_error": _errors(model, *splits["valid"]), "test_error": _errors(model, *splits["test"]),
    }  # fmt: skip


def _said(run: dict) -> str:
    """The recipe of an integer run as text: a run of another one is another run."""
    return json.dumps([run["recipe"], run["schedule"]], sort_keys=True) if run["kind"] == "int8" else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=sorted(FP32), required=True)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(EPOCHS))
    parser.add_argument("--kinds", nargs="+", default=["int8", "fp32", "frozen", "bp"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=None, help="of every run, instead of its own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load(args.data, args.data_dir)
    if not data.genuine:
        raise SystemExit(f"{args.data} from {data.source} is not the genuine set: no evidence is made of it")
    labels = {k: torch.from_numpy(getattr(data, f"y_{k}")) for k in ("train", "valid", "test")}
    splits = {k: (standardize(getattr(data, f"x_{k}"), args.data), y) for k, y in labels.items()}
    images = {k: (quantize_images(getattr(data, f"x_{k}"), args.data), y) for k, y in labels.items()}
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    done = {(r["kind"], r["arm"], r["seed"], r["epochs"], r["batch"], _said(r)) for r in runs}
    for seed in args.seeds:
        for arm in args.arms:
            for kind in args.kinds:
                epochs = args.epochs or (BP_EPOCHS if kind == "bp" else EPOCHS[arm][args.data])
                # without a head there is nothing to freeze the rest for, and backpropagation has no arms
                if (kind == "frozen" and arm in HEADLESS) or (kind == "bp" and arm != "fc2,fc3"):
                    continue
                if arm == "dense" and kind != "int8":
                    continue
                options, schedule = INT8[args.data][arm] if kind == "int8" else (None, {})
                recipe = _said({"kind": kind, "recipe": options, "schedule": {str(k): v for k, v in schedule.items()}})
                if (kind, arm, seed, epochs, args.batch, recipe) in done:
                    continue
                if kind == "int8":
                    result = run_int8(images, args.data, arm, seed, epochs, args.batch)
                elif kind == "fp32":
                    result = elastic(splits, head_of(arm), seed, epochs, args.batch, FP32[args.data][arm])
                elif kind == "bp":
                    result = run_bp(splits, seed, epochs, args.batch)
                else:
                    result = frozen(splits, head_of(arm), seed, epochs, args.batch)
                runs.append(
                    {
                        "data": args.data,
                        "kind": kind,
                        "arm": arm,
                        "seed": seed,
                        "epochs": epochs,
                        "batch": args.batch,
                        **result,
                    }
                )
                environment = {"torch": torch.__version__, "device": "cpu", "ezo_kernels": ezo.__version__}
                temporary = args.out.with_suffix(".tmp")
                temporary.write_text(json.dumps({"environment": environment, "runs": runs}, indent=1) + "\n")
                os.replace(temporary, args.out)
                # The validation split alone is shown while recipes are chosen; the test errors are in the file.
                print(
                    f"{args.data} {kind} {arm} seed {seed}, {epochs} epochs: validation {result['validation_error']:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

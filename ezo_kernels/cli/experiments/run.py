"""``ezo experiment``: runs what is not in the file yet, then makes the table and the plot."""

from __future__ import annotations

import argparse
import hashlib
import sys

import torch
from tqdm import tqdm

from ...data import Dataset, load
from .. import system
from . import plot, tasks
from .catalogue import EXPERIMENTS, QUICK_SEEDS, Experiment, Scope
from .store import Store
from .summary import summarise, text
from .trial import Finished, Trial


def fingerprint(data: Dataset) -> str:
    """sha256 over all images and labels: the same name with other files is other data."""
    digest = hashlib.sha256(data.name.encode())
    for split in ("train", "valid", "test"):
        for kind in ("x", "y"):
            array = getattr(data, f"{kind}_{split}")
            digest.update(f"{split}{kind}{array.shape}{array.dtype}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def steps_of(trial: Trial, train_rows: int) -> int:
    """Steps that the progress bar counts."""
    if trial.task == "bytes":
        return 1
    whole = trial.recipe.epochs * (train_rows // trial.recipe.batch)
    if trial.task == "phases":
        return min(tasks.WARM_STEPS + min(trial.max_steps or tasks.TIMED_STEPS, tasks.TIMED_STEPS), whole)
    return min(trial.max_steps or whole, whole) * max(1, len(trial.head_lrs))


def carry_out(
    experiment: Experiment, trials: list[Trial], data: dict[str, Dataset], store: Store, device: torch.device
) -> list[Finished]:
    """Run the trials that the store does not have, file each, and make the table of all of them.

    A trial that was cut off starts again from nothing, so a restarted experiment gives what an undisturbed one gives.
    """
    missing = {t.key: t for t in trials if t.key not in store.trials}
    watched = sys.stderr.isatty()
    steps = sum(steps_of(t, len(data[t.recipe.data].x_train)) for t in missing.values())
    if len(missing) < len({t.key for t in trials}):
        print(f"{store.path}: {len({t.key for t in trials}) - len(missing)} trials are there, {len(missing)} to run")
    with tqdm(total=steps, unit="step", disable=not watched, dynamic_ncols=True, smoothing=0.05) as bar:
        for i, (key, trial) in enumerate(missing.items(), 1):
            label = f"{trial.arm}{'' if trial.x is None else f' at {trial.x:g}'}, seed {trial.recipe.seed}"
            bar.set_postfix_str(label)
            result, timings = tasks.RUN[trial.task](trial, data[trial.recipe.data], device, bar.update)
            store.add(
                key,
                {
                    "arm": trial.arm,
                    "x": trial.x,
                    "specification": trial.specification(),
                    "genuine": data[trial.recipe.data].genuine,
                    "result": result,
                    "timings": timings,
                    "environment": {
                        "device": device.type,
                        "device_name": system.device_name(device),
                        **system.versions(),
                    },
                },
            )
            # The validation split alone is shown on the way: what it shows may still change a recipe.
            if "validation_error" in result:
                label += f": validation error {100 * result['validation_error']:.2f}%"
            bar.write(f"{i}/{len(missing)} {trial.recipe.data}, {label}", file=sys.stdout)
    # From the file's own values, so that what was just run and what was read are alike to the last digit.
    done = [Finished(t, store.trials[t.key]["result"], store.trials[t.key]["timings"]) for t in trials]
    store.table = experiment.refine(summarise(done))
    store.write()
    return done


def experiment(args: argparse.Namespace) -> int:
    """``ezo experiment``."""
    chosen = EXPERIMENTS[args.name]
    names = list(dict.fromkeys(args.data or ["digits" if args.quick else "mnist"]))
    seeds = list(dict.fromkeys(args.seeds or (QUICK_SEEDS if args.quick else (0, 1, 2))))
    epochs = args.epochs if args.epochs is not None else 1 if args.quick else 10
    if args.threads < 1:
        raise ValueError(f"--threads is {args.threads}: at least 1 is needed")
    torch.set_num_threads(args.threads)
    store = Store(args.out, chosen.name, args.quick)
    device = system.pick_device(args.device)
    data = {name: load(name, args.data_dir) for name in names}
    trials = []
    # Seeds outermost: an experiment that is stopped has every arm about as often as the others.
    for seed in seeds:
        for name, own in data.items():
            scope = Scope(name, fingerprint(own), len(own.x_train), seed, epochs, args.quick)
            trials += chosen.trials(scope)
    carry_out(chosen, trials, data, store, device)
    short = " (QUICK: cut short, no evidence)" if args.quick else ""
    print(f"\n{chosen.name}: {chosen.summary}{short}\n")
    print(text(store.table, chosen.columns))
    if plot.available():
        picture = store.path.with_suffix(".png")
        plot.write(picture, store.table, chosen.plotted, chosen.name + short, chosen.x_label)
        print(f"\n{store.path}, {picture}")
    else:
        print(f"\n{store.path}; no plot: matplotlib is missing (pip install 'ezo-kernels[plot]')")
    return 0

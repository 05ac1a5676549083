"""``ezo experiment``: runs what is not in the file yet, then makes the table and the plot."""

from __future__ import annotations

import argparse
import hashlib
import sys

import torch
from tqdm import tqdm

from ...data import Dataset
from .. import outputs, system
from ..recipe import CLOUD_DATA
from ..run import load_data
from . import plot, regression, tasks
from .catalogue import EXPERIMENTS
from .recipes import clouds
from .scope import QUICK_SEEDS, Experiment, Scope
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
    if trial.task in ("bytes", "choice"):
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
    read = len(missing) < len({t.key for t in trials})
    watched = sys.stderr.isatty()
    steps = sum(steps_of(t, len(data[t.recipe.data].x_train)) for t in missing.values())
    if read:
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
            elif "validation_mse" in result:
                label += f": validation squared error {result['validation_mse']:.3f}"
            bar.write(f"{i}/{len(missing)} {trial.recipe.data}, {label}", file=sys.stdout)
    # From the file's own values, so that what was just run and what was read are alike to the last digit.
    done = [Finished(t, store.trials[t.key]["result"], store.trials[t.key]["timings"]) for t in trials]
    try:
        store.table = experiment.refine(summarise(done), done)
        store.notes = experiment.notes(store.table)
    except (LookupError, TypeError, AttributeError) as error:
        if not read:
            raise
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{store.path}: corrupt: its results were changed ({what}); move it away to start anew"
        ) from error
    store.write()
    return done


def _sources(args: argparse.Namespace, chosen: Experiment) -> dict[str, Dataset]:
    """The data sets of a command line by name.

    Raises:
        ValueError: an option that this experiment has no use for.
    """
    if chosen.tables:
        return regression.tables(args)
    for option in ("csv", "target"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} goes with the experiment regression, {chosen.name} takes images")
    names = list(dict.fromkeys(args.data or ["digits" if args.quick else "mnist"]))
    if regression.DIABETES in names:
        raise ValueError(
            f"--data {regression.DIABETES} goes with the experiment regression, {chosen.name} takes images"
        )
    if args.data_dir is not None and "digits" in names:
        raise ValueError(
            "--data-dir: the digits are scikit-learn's, not in a folder; say --data mnist or fashion_mnist"
        )
    shapes = [name for name in names if name in CLOUD_DATA]
    if shapes and not (chosen.name == "pointcloud" or chosen.name == "partition" and args.models == ["pointnet"]):
        raise ValueError(
            f"--data {shapes[0]} goes with the experiment pointcloud, or with partition and --models pointnet: it is of clouds"
        )
    if shapes and len(names) > 1:
        raise ValueError(f"--data {shapes[0]} has a --data-dir of its own: run the others by themselves")
    return {name: load_data(name, args.data_dir, clouds(name)["points"]) for name in names}


def experiment(args: argparse.Namespace) -> int:
    """``ezo experiment``."""
    chosen = EXPERIMENTS[args.name]
    if args.models and chosen.name != "partition":
        raise ValueError(f"--models goes with the experiment partition, not with {chosen.name}")
    seeds = list(dict.fromkeys(args.seeds or (QUICK_SEEDS if args.quick else (0, 1, 2))))
    epochs = args.epochs if args.epochs is not None else 1 if args.quick else chosen.epochs
    if args.threads < 1:
        raise ValueError(f"--threads is {args.threads}: at least 1 is needed")
    torch.set_num_threads(args.threads)
    device = system.pick_device(args.device)
    data = _sources(args, chosen)
    trials = []
    models = tuple(dict.fromkeys(args.models or ("lenet5",)))
    # Seeds outermost: an experiment that is stopped has every arm about as often as the others.
    for seed in seeds:
        for name, own in data.items():
            trials += chosen.trials(Scope(name, fingerprint(own), len(own.x_train), seed, epochs, args.quick, models))
    if args.arms:
        names = list(dict.fromkeys(t.arm for t in trials))
        for words in args.arms:
            if not words or not any(words in name for name in names):
                raise ValueError(f"--arms {words or repr(words)}: in no arm's name; there are {'; '.join(names)}")
        trials = [t for t in trials if any(words in t.arm for words in args.arms)]
    # Last of what may be refused: it makes a folder.
    store = Store(args.out, chosen.name, args.quick)
    pictures = [store.path.with_suffix(".png"), store.path.with_name(f"{chosen.name}_trajectories.png")]
    if plot.available():
        for picture in pictures:
            outputs.check_writable("--out", picture)
    done = carry_out(chosen, trials, data, store, device)
    short = " (QUICK: cut short, no evidence)" if args.quick else ""
    print(f"\n{chosen.name}: {chosen.summary}{short}\n")
    print(text(store.table, chosen.columns))
    for note in store.notes:
        print(f"\n{note}")
    if plot.available():
        plot.write(pictures[0], store.table, chosen.plotted, chosen.name + short, chosen.x_label)
        paths = plot.trajectories_of(done)
        if paths:
            plot.write_trajectories(pictures[1], paths, f"{chosen.name}, seed {seeds[0]}{short}")
        print(f"\n{', '.join(map(str, (store.path, *pictures[: 1 + bool(paths)])))}")
    else:
        print(f"\n{store.path}; no plot: matplotlib is missing (pip install 'ezo-kernels[plot]')")
    return 0

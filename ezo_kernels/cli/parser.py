"""The command line's options."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from .._version import __version__
from . import recipe as R


class UsageError(Exception):
    """A command line that makes no sense; its text is the whole of what the user is told."""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line and left to ``main`` to print, and --data is no short form of --data-dir."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str):
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The options of :class:`Recipe`. Absent from the namespace unless given: a checkpoint may fill them."""
    default = {field.name: field.default for field in fields(R.Recipe)}

    def option(name: str, help: str, **kwargs) -> None:
        shown = kwargs.pop("shown", default[name])
        parser.add_argument(
            f"--{name.replace('_', '-')}", help=f"{help} (default: {shown})", default=argparse.SUPPRESS, **kwargs
        )

    option("model", "the network", choices=R.MODELS)
    option("hidden", "widths of the MLP's hidden layers", metavar="N,N")
    option("points", "points that PointNet sees of an image, or of a shape", type=int, metavar="N")
    option(
        "data",
        "the data set; digits is scikit-learn's, small and offline; modelnet40 is PointNet's, from --data-dir",
        choices=R.DATA,
    )
    option("method", "elastic: ZO trunk and BP head; mezo: ZO in place; bp: SGD; frozen: head only", choices=R.METHODS)
    option(
        "head",
        "layers trained by backpropagation: names, the last N weight layers, 0 or all",
        metavar="fc2,fc3|N|0|all",
        shown="fc2,fc3; 0 for mezo, all for bp",
    )
    option(
        "precision",
        "dtype of weights and activations; 16-bit trunks round stochastically; int8 is integers only",
        choices=R.PRECISIONS,
    )
    option("noise", "distribution of the perturbation, by name", metavar="NAME")
    option(
        "p_zero",
        "fraction of zeros of the noise sparse; of int8's, P,P@F: the second from fraction F of the run on",
        metavar="P,P@F",
        shown="0; int8: " + R.DEFAULT_P_ZERO[True],
    )
    option("r_max", "int8: largest magnitude of the noise", metavar="N,N@F")
    option("bits", "int8: bits of the trunk's update; --bits=-1 for a negative one", metavar="N,N@F")
    option(
        "head_bits",
        "int8: bits of the head's update",
        metavar="N,N@F",
        shown=f"{R.DEFAULT_HEAD_BITS[True]}; without a remainder {R.DEFAULT_HEAD_BITS[False]}",
    )
    option(
        "head_remainder",
        "int8: keep what the head's weights cannot hold of an update, a byte each, for the next",
        action=argparse.BooleanOptionalAction,
        shown="on where there is a head",
    )
    option("loss", "int8: loss whose sign is g, in integers or in floats", choices=R.LOSSES)
    option(
        "fraction_bits", "int8: bits behind the point of the integer loss; 0 is the paper's rule", type=int, metavar="N"
    )
    option("rounds", "Philox rounds, 7 or 10", type=int, metavar="N")
    option("queries", "directions a step", type=int, metavar="N")
    option(
        "antithetic",
        "both signs of each direction; --no-antithetic: one, held against the other queries",
        action=argparse.BooleanOptionalAction,
    )
    option(
        "scales",
        "how far a layer is perturbed, beside eps; its square, beside lr, is the layer's rate",
        metavar="NAME=X,NAME=X",
        shown="1 for all",
    )
    option(
        "importance_rows",
        "draw N images of each batch, by how wrong a plain forward of it is, for all directions; 0 takes all",
        type=int,
        metavar="N",
    )
    option("nodes", "layers whose outputs are perturbed, in place of their weights", metavar="NAME,NAME", shown="none")
    option("node_lr", "learning rate of these layers", type=float, metavar="X")
    option("node_eps", "how far their outputs are moved", type=float, metavar="X")
    option("node_damping", "of their inputs' second moments; 0: the plain gradient", type=float, metavar="X")
    option("node_clip", "largest magnitude of an image's g; 0: none", type=float, metavar="X")
    option("freeze", "layers that stay as they were initialised", metavar="NAME,NAME", shown="none")
    option("mode", "all groups of a step in one pass, or one by one", choices=R.MODES)
    option("epochs", "passes over the training images", type=int, metavar="N")
    option("batch", "images a step", type=int, metavar="N")
    option("lr", "learning rate of the trunk", type=float, metavar="X")
    option("eps", "scale of the perturbation", type=float, metavar="X")
    option("clip", "largest magnitude of the projected gradient", type=float, metavar="X")
    option("head_lr", "learning rate of the head, and of bp", type=float, metavar="X")
    option("schedule", "of both learning rates, a step at a time", choices=R.SCHEDULES)
    option("seed", "of weights, batches and noise", type=int, metavar="N")


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with the four IDX files or NAME.npz, or an npz file; of modelnet40 with its HDF5 or OFF files",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")


def add_experiment(commands) -> None:
    """``ezo experiment``."""
    from .experiments.catalogue import EXPERIMENTS

    lines = "\n".join(f"  {name:12} {experiment.summary}" for name, experiment in EXPERIMENTS.items())
    parser = commands.add_parser(
        "experiment",
        help="what the ElasticZO paper evaluates, with seeds, a table and a plot; goes on where it was stopped",
        description=f"Run an experiment into DIR/NAME.json and NAME.png; what is there already is not run again.\n\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted(EXPERIMENTS), metavar="NAME", help="one of the above")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go; made if need be")
    parser.add_argument("--quick", action="store_true", help="a few steps of each trial, on the digits: no evidence")
    parser.add_argument(
        "--data",
        nargs="+",
        choices=(*R.DATA, "diabetes"),
        metavar="NAME",
        help=f"{', '.join(R.DATA)} (default: mnist; quick: digits); modelnet40: of pointcloud, "
        "and of partition with PointNet; of regression: diabetes",
    )
    add_data_dir(parser)
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="of regression: a table, its first line names the columns"
    )
    parser.add_argument("--target", metavar="NAME", help="of regression: the column of --csv to predict")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=R.MODELS,
        metavar="NAME",
        help=f"of partition: {', '.join(R.MODELS)} (default: lenet5)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="(default: 0 1 2; quick: 0 1)")
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="of every trial (default: 10, a tenth of it for PointNet's cuts; baseline: 64, of two forwards an image; "
        "pointcloud: 1; regression: 200; quick: 1)",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="WORDS",
        help="only the arms whose name holds one of these, such as fp32 'full ZO'; table and plot have these alone, trials "
        "of others stay in the file",
    )
    add_device(parser)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")


def build() -> Parser:
    parser = Parser(prog="ezo", description="Zeroth-order training at the memory of inference.")
    parser.add_argument("--version", action="version", version=f"ezo-kernels {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model", description="Train, validate each epoch, test once.")
    add_recipe(train)
    add_data_dir(train)
    add_device(train)
    train.add_argument("--offline", action="store_true", help="do not download: the cache, else the digits")
    train.add_argument("--capture", action="store_true", help="replay each step as one CUDA graph; on a GPU alone")
    train.add_argument(
        "--max-steps", type=int, metavar="N", help="stop after N steps; the schedule spans --epochs still"
    )
    train.add_argument("--json", type=Path, metavar="FILE", help="write the results, the recipe and the versions")
    train.add_argument("--plot", type=Path, metavar="FILE.png", help="write the curves of loss and accuracy")
    train.add_argument("--checkpoint", type=Path, metavar="FILE", help="written after each epoch and on Ctrl-C")
    train.add_argument(
        "--seed-log",
        type=Path,
        metavar="FILE",
        help="the whole run in a few bytes a step, for ezo replay; written with the checkpoint, and gone on with by --resume",
    )
    train.add_argument("--resume", type=Path, metavar="FILE", help="go on from a checkpoint; its recipe is taken over")
    train.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="CPU threads (default: 1: these batches are too small for more, which mostly wait for each other)",
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar and no line an epoch")

    evaluate = commands.add_parser("eval", help="accuracy of a checkpoint", description="Accuracy of a checkpoint.")
    evaluate.add_argument("checkpoint", type=Path, metavar="FILE")
    evaluate.add_argument("--split", choices=("validation", "test"), default="test", help="(default: test)")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    add_data_dir(evaluate)
    add_device(evaluate)

    replay = commands.add_parser(
        "replay",
        help="a trained model again, from its seed log",
        description="Carry out the steps of a log of `ezo train --seed-log` on the model as it began, and test it.",
    )
    replay.add_argument("log", type=Path, metavar="FILE")
    replay.add_argument("--weights", type=Path, metavar="FILE", help="write the model's state_dict, as torch.save does")
    replay.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    add_data_dir(replay)
    add_device(replay)

    info = commands.add_parser("info", help="versions, device, and how each layer of a model would be trained")
    info.add_argument("--model", choices=R.MODELS, default="lenet5", help="(default: lenet5)")
    info.add_argument("--hidden", default="256,128", metavar="N,N", help="widths of the MLP's hidden layers")
    info.add_argument(
        "--head", metavar="fc2,fc3|N|0|all", help=f"(default: fc2,fc3, as in a training; of pointnet {R.POINTNET_HEAD})"
    )
    precisions = ("float", "bf16", "fp16", "int8")
    info.add_argument("--precision", choices=precisions, default="float", help="(default: float, which is fp32)")
    info.add_argument(
        "--strategy",
        metavar="NAME",
        help="auto, fused, two_products, slab or specialized, of all layers (default: auto)",
    )
    info.add_argument("--batch", type=int, metavar="N", help="rows a sign, for the strategies (default: 32)")
    info.add_argument("--noise", metavar="NAME", help="for the strategies (default: gaussian)")
    info.add_argument("--arch", type=int, metavar="N", help="strategies of another GPU, 90 for an H100; 0: of a CPU")
    add_device(info)

    profile = commands.add_parser(
        "profile",
        help="where the time of a training step goes, by operator and by kernel",
        description="Take steps of a training under torch.profiler; the model it trains is thrown away.",
    )
    add_recipe(profile)
    add_data_dir(profile)
    add_device(profile)
    profile.add_argument("--offline", action="store_true", help="do not download: the cache, else the digits")
    profile.add_argument("--steps", type=int, default=20, metavar="N", help="steps measured (default: 20)")
    profile.add_argument("--top", type=int, default=15, metavar="N", help="rows of a table (default: 15)")
    profile.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for profile.json and trace.json (Perfetto's); made if need be"
    )
    profile.add_argument(
        "--roofline",
        type=Path,
        metavar="FILE",
        help="of python -m bench roofline --lines FILE: adds the share of the roof",
    )
    profile.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")

    cut = commands.add_parser(
        "cut",
        help="which layers to give to backpropagation: bytes, time and predicted gain of every cut, and a choice",
        description="Choose the head of a model with its initial weights, from the first batches of the training images: "
        "bytes and seconds of one, gains of 16.",
    )
    cut.add_argument("--model", choices=R.MODELS, default="lenet5", help="(default: lenet5)")
    cut.add_argument("--hidden", default="256,128", metavar="N,N", help="widths of the MLP's hidden layers")
    cut.add_argument("--data", choices=R.DATA, default="mnist", help="(default: mnist)")
    add_data_dir(cut)
    cut.add_argument(
        "--precision", choices=R.PRECISIONS, default="fp32", help="(default: fp32); int8 is refused, it has no gradient"
    )
    cut.add_argument("--batch", type=int, default=32, metavar="N", help="rows, as in the training (default: 32)")
    cut.add_argument("--queries", type=int, default=1, metavar="N", help="directions a step (default: 1)")
    cut.add_argument("--memory", type=int, metavar="BYTES", help="budget at the peak of a step (default: none)")
    cut.add_argument("--time", type=float, metavar="SECONDS", help="budget of a step (default: none)")
    cut.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and draws (default: 0)")
    cut.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    cut.add_argument("--plot", type=Path, metavar="FILE.png", help="write gain, memory and time against the cut")
    add_device(cut)

    add_experiment(commands)

    data = commands.add_parser("data", help="get a data set into the cache, with its checksum compared")
    data.add_argument("name", choices=("mnist", "fashion_mnist"))
    return parser

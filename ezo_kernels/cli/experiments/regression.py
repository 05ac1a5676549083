"""The experiment ``regression``: how stable training in integers is on tables, beside its twin in floats.

An MLP with a squared error, standardised features and target, constant rates. In integers the learning rate is ``bits``, the
width of the trunk's update: one bit more is twice the step.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ...data import Batches, Dataset
from ...data.regression import load_regression
from ...models import MLP
from ...nn import convert_
from ...ops.int8_tensor import Int8Tensor, quantize
from ...optim import ElasticZO, baselines
from .plot import DIVERGED
from .probes import GradientTrace, SquaredErrorWatch, Trajectory, relative_difference
from .scope import Scope
from .summary import Column
from .trial import Trial

#: name of the table that needs no file
DIABETES = "diabetes"
#: of the trunk: b_ZO in integers, lr in floats
BITS, LRS = (-4, -2, 0, 2), (1e-5, 1e-4, 1e-3, 1e-2)
#: of the head, of full BP and of the frozen trunk; the validation split takes the best
HEAD_LRS = (1e-3, 3e-3, 1e-2, 3e-2)
HEAD = "fc3"
#: readings of a trajectory, beside the one of the start
READINGS = 50


@dataclass(frozen=True)
class RegressionRecipe:
    """What decides the bits of a run on a table.

    Args:
        data: its name. method: ``elastic``, ``bp`` or ``frozen``. head: ``0``, ``fc3`` or ``all``.
        precision: ``fp32`` or ``int8``. loss: of int8, whose sign g is, ``integer`` or ``float``.
        hidden: widths of the MLP's hidden layers.
        lr, eps: of a float trunk. head_lr: of a float head. r_max, p_zero, bits, head_bits: of integers.
    """

    data: str
    seed: int
    epochs: int
    method: str = "elastic"
    head: str = "0"
    precision: str = "fp32"
    loss: str = "integer"
    hidden: tuple[int, ...] = (64, 32)
    batch: int = 32
    queries: int = 1
    lr: float = 1e-3
    eps: float = 1e-3
    head_lr: float = 1e-2
    r_max: int = 15
    p_zero: float = 0.97
    bits: int = 0
    head_bits: int = 0
    rounds: int = 7

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}: at least 1 is needed")

    @property
    def integer(self) -> bool:
        return self.precision == "int8"

    @property
    def head_argument(self) -> list[str] | int | str:
        """The head as ``ezo_kernels.convert_`` takes it."""
        return {"0": 0, "all": "all"}.get(self.head, [self.head])


def trials(scope: Scope) -> list[Trial]:
    """Rates from small to large, in integers and in floats; the float loss's sign, BP and the frozen trunk beside."""
    common = {"seed": scope.seed, "epochs": scope.epochs, "batch": min(32, scope.train_rows)}

    def trial(arm: str, **options) -> Trial:
        rates = {"head_lrs": scope.ends(options.pop("head_lrs"))} if "head_lrs" in options else {}
        own = RegressionRecipe(scope.data, **common, **options)
        return scope.trial(arm, own, task="regression", **rates)

    out = []
    for head, name in (("0", "full ZO"), (HEAD, "ElasticZO, last layer by BP")):
        for bits in scope.ends(BITS):
            out.append(trial(f"{name}, int8, integer loss, bits {bits}", head=head, precision="int8", bits=bits))
        out.append(trial(f"{name}, int8, float loss, bits 0", head=head, precision="int8", loss="float"))
        for lr in scope.ends(LRS):
            rates = {"head_lrs": HEAD_LRS} if head == HEAD else {}
            out.append(trial(f"{name}, fp32, lr {lr:g}", head=head, lr=lr, **rates))
    out.append(trial("full BP, fp32", method="bp", head="all", head_lrs=HEAD_LRS))
    out.append(trial("frozen trunk, last layer by BP, fp32", method="frozen", head=HEAD, head_lrs=HEAD_LRS))
    return out


def tables(args: argparse.Namespace) -> dict[str, Dataset]:
    """The tables of a command line: those that ``--data`` and ``--csv`` name, diabetes if neither does.

    Raises:
        ValueError: images, a folder, or a CSV file without its target; what :func:`load_regression` refuses.
    """
    if strangers := [name for name in args.data or () if name != DIABETES]:
        raise ValueError(
            f"regression takes tables, not {', '.join(strangers)}: --data diabetes, or --csv FILE --target NAME"
        )
    if args.data_dir is not None:
        raise ValueError("--data-dir is for images; regression takes --csv FILE --target NAME")
    if (args.csv is None) != (args.target is None):
        raise ValueError("--csv FILE and --target NAME go together: the column to predict has to be named")
    found = {}
    if args.data or args.csv is None:
        found[DIABETES] = load_regression(DIABETES)
    if args.csv is not None:
        table = load_regression(args.csv, args.target)
        # a table of one's own may be called diabetes, too
        name = table.name if table.name not in found else f"{table.name}.csv"
        found[name] = replace(table, name=name)
    return found


def _build(recipe: RegressionRecipe, features: int, device: torch.device):
    """The model with its optimizer; the same initial weights for all methods and precisions of a seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    model = MLP(features, *recipe.hidden, 1, generator=generator).to(device)
    if recipe.integer:
        convert_(model, head=recipe.head_argument, precision="int8")
        return model, SquaredErrorWatch(
            model, recipe.r_max, recipe.p_zero, recipe.bits, recipe.head_bits, recipe.queries, recipe.seed,
            loss="squared_error", rounds=recipe.rounds, float_loss=recipe.loss == "float",
        )  # fmt: skip
    if recipe.method == "elastic":
        convert_(model, head=recipe.head_argument)
        return model, ElasticZO(
            model, lr=recipe.lr, eps=recipe.eps, head_lr=recipe.head_lr, queries=recipe.queries, seed=recipe.seed,
            rounds=recipe.rounds,
        )  # fmt: skip
    if recipe.method == "frozen":
        return model, baselines.FrozenTrunk(model, head=recipe.head_argument, lr=recipe.head_lr)
    return model, baselines.BackpropSGD(model, lr=recipe.head_lr)


@torch.no_grad()
def squared_error(model: torch.nn.Module, x, y: torch.Tensor) -> float:
    """Mean squared error over all rows, in units of the training split's variance; y is float [n, 1]."""
    out = model(x)
    out = out.dequantize() if isinstance(out, Int8Tensor) else out
    return F.mse_loss(out.double(), y.double()).item()


class _Attempt:
    """One training with one rate of the head."""

    def __init__(self, recipe: RegressionRecipe, data: Dataset, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        x, y = (torch.from_numpy(a).to(device) for a in (data.x_train, data.y_train))
        self.model, self.optimizer = _build(recipe, x.shape[1], device)
        self.exponent = self.target_exponent = None
        if recipe.integer:
            # One exponent for all of the table, by its training split; what is beyond saturates.
            x, target = quantize(x), quantize(y)
            self.exponent, self.target_exponent = x.exponent.item(), target.exponent.item()
        self.batches = Batches(x, y, recipe.batch, recipe.seed, drop_last=True)
        self.splits = {name: self._split(data, name) for name in ("valid", "test")}

    def _split(self, data: Dataset, name: str):
        x, y = (torch.from_numpy(getattr(data, f"{kind}_{name}")).to(self.device) for kind in "xy")
        return (quantize(x, self.exponent) if self.recipe.integer else x), y

    def error(self, split: str) -> float:
        """Of the validation or the test rows; infinite where the weights have diverged."""
        value = squared_error(self.model, *self.splits[split])
        return value if math.isfinite(value) else math.inf

    def train(self, max_steps: int | None, after_step: Callable[[], None]) -> tuple[list[dict], GradientTrace | None]:
        steps = self.recipe.epochs * len(self.batches)
        last = steps if max_steps is None else min(steps, max_steps)
        path = Trajectory(self.model, *self.splits["valid"])
        path.read(0, self.error("valid"))
        trace = GradientTrace() if self.recipe.method == "elastic" and not self.recipe.integer else None
        step, every = 0, max(1, last // READINGS)
        for epoch in range(self.recipe.epochs):
            for x, y in self.batches.epoch(epoch):
                if step == last:
                    return path.readings, trace
                if self.recipe.integer:
                    self.optimizer.watch(x, y)
                    self.optimizer.train_step(x, quantize(y, self.target_exponent))
                else:
                    self.optimizer.train_step(x, y, loss_fn=F.mse_loss)
                if trace is not None:
                    trace(self)
                step += 1
                if step % every == 0 or step == last:
                    path.read(step, self.error("valid"))
                after_step()
        return path.readings, trace


def train(trial: Trial, data: Dataset, device: torch.device, after_step: Callable[[], None]) -> tuple[dict, dict]:
    """Train with every rate of ``head_lrs``, if there are any; the best on the validation split is tested, once."""
    best, tried = None, []
    for rate in trial.head_lrs or (trial.recipe.head_lr,):
        attempt = _Attempt(replace(trial.recipe, head_lr=rate), data, device)
        began = time.perf_counter()
        path, trace = attempt.train(trial.max_steps, after_step)
        seconds, valid = time.perf_counter() - began, attempt.error("valid")
        tried.append({"head_lr": rate, "validation_mse": valid})
        if best is None or valid < best[1]:
            best = (attempt, valid, path, trace, seconds)
    attempt, valid, path, trace, seconds = best
    optimizer = attempt.optimizer
    result = {
        "validation_mse": valid,
        # The one time that the test rows are read: nothing is chosen after it.
        "test_mse": attempt.error("test"),
        "steps": path[-1]["step"],
        "diverged": float(valid > DIVERGED * path[0]["validation_mse"]),
        "skipped_steps": int(getattr(optimizer, "skipped", 0)),
        "trajectory": path,
        **Trajectory.summary(path),
    }
    if trial.head_lrs:
        result |= {"tried": tried, "head_lr": attempt.recipe.head_lr}
    if trace is not None:
        late = torch.cat(trace.pairs[len(trace.pairs) // 2 :])
        result |= trace.statistics(trial.recipe.eps) | {"difference_rms": relative_difference(late)}
    if trial.recipe.integer:
        result |= optimizer.statistics()
    return result, {"seconds": seconds}


VALID_MSE = Column("validation_mse", "validation, squared error / variance", 1, 3)
AGREEMENT = Column("sign_agreement_float", "sign as the float network's, %", 100, 1)
# Of floats and integers in one unit, which the variances of a slope and of a sign are not.
DIFFERENCE = Column("difference_rms", "rms of L+ - L- over L", 1, 3)
COLUMNS = (
    VALID_MSE,
    Column("test_mse", "test", 1, 3),
    Column("diverged", "diverged, %", 100, 0),
    Column("sign_agreement", "sign as the float loss of the same outputs, %", 100, 2),
    AGREEMENT,
    Column("ties", "ties, %", 100, 2),
    Column("g_variance", "variance of g", 1, 3),
    DIFFERENCE,
    Column("weight_growth", "largest growth of a layer's weights", 1, 2),
    Column("at_rails", "weights at +-127, %", 100, 2),
    Column("exponent_drift", "drift of exponents, bits", 1, 1),
)
PLOTTED = (VALID_MSE, AGREEMENT, DIFFERENCE)

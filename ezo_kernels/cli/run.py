"""A training run: its state, its loop, and how it is measured. It prints nothing and reads no option."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data import Batches, CloudBatches, Dataset, load, load_modelnet40, point_clouds, quantize_images, standardize
from ..models import MLP, LeNet5, PointNet
from ..ops.int8_tensor import Int8Tensor, quantize
from .methods import make_optimizer
from .recipe import CLOUD_DATA, Recipe

#: of the weights that a run starts from: an int8 run quantises fp32 ones
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}
#: outputs of a model; images have ten classes
CLASSES = {"modelnet40": 40}
#: of int8 clouds, whose coordinates are within [-1, 1]
CLOUD_EXPONENT = -7
#: rows of an evaluation's batch: large enough to be fast, and a bounded amount of memory
EVALUATION_ROWS = 1000


def build_model(recipe: Recipe, device: torch.device) -> torch.nn.Module:
    """The network with the initial weights of ``recipe.seed``: drawn on the CPU, so the same for every device."""
    generator = torch.Generator().manual_seed(recipe.seed)
    if recipe.model == "lenet5":
        model = LeNet5(generator=generator)
    elif recipe.model == "pointnet":
        # Batch norm has no integer form.
        model = PointNet(CLASSES.get(recipe.data, 10), norm=not recipe.integer, generator=generator)
    else:
        model = MLP(28 * 28, *recipe.hidden_widths, 10, generator=generator)
    return model.to(device, DTYPES[recipe.precision])


def loss_fn(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in fp32, whatever the dtype of the logits [B, classes]; y is int64 [B]."""
    return F.cross_entropy(logits.float(), y)


def loss_of(recipe: Recipe):
    """The loss that the optimizer of a recipe in floats is given: ElasticZO's own cross-entropy is in fp32, of all groups at
    once.
    """
    return F.cross_entropy if recipe.method == "elastic" else loss_fn


def load_data(name: str, data_dir: Path | None, points: int, **options) -> Dataset:
    """:func:`ezo_kernels.data.load`, or the clouds of ``points`` points of a data set of shapes, which only a folder has.

    Raises:
        ValueError: shapes, and no folder; whatever the loaders refuse.
    """
    if name not in CLOUD_DATA:
        return load(name, data_dir, **options)
    if data_dir is None:
        raise ValueError(f"{name} is not fetched: say --data-dir, a folder with its HDF5 or OFF files")
    return load_modelnet40(data_dir, points)


def data_for(recipe: Recipe, data: Dataset) -> Dataset:
    """The data as the recipe's model takes it: PointNet's as clouds of points drawn from the images, others' as they are."""
    return point_clouds(data, recipe.points) if recipe.model == "pointnet" and recipe.data not in CLOUD_DATA else data


def inputs(images, name: str, precision: str):
    """Images uint8 [n, 28, 28], or clouds float32 [n, 3, points] in the unit sphere, as models of this precision take them."""
    if images.dtype.kind == "f":
        x = torch.from_numpy(images)
        return quantize(x, CLOUD_EXPONENT) if precision == "int8" else x.to(DTYPES[precision])
    return quantize_images(images, name) if precision == "int8" else standardize(images, name, DTYPES[precision])


def owned(x, device: torch.device):
    """A batch on the device in torch's own memory, as a loader gives it: NumPy's begins anywhere, and a step copies that."""
    return x.to(device) if isinstance(x, Int8Tensor) else x.to(device, copy=True)


@torch.inference_mode()
def accuracy(model: torch.nn.Module, x, y: torch.Tensor) -> float:
    """The fraction of rows of x whose largest logit is at the label.

    An int8 model has one exponent for each batch of :data:`EVALUATION_ROWS`, so that number is part of the result.
    """
    training = model.training
    model.eval()
    hits = torch.zeros((), dtype=torch.int64, device=x.device)
    for rows, labels in zip(x.split(EVALUATION_ROWS), y.split(EVALUATION_ROWS), strict=True):
        logits = model(rows)
        hits += ((logits.values if isinstance(logits, Int8Tensor) else logits).argmax(1) == labels).sum()
    model.train(training)
    return hits.item() / len(x)


class AugmentedShapes(CloudBatches):
    """:class:`ezo_kernels.data.CloudBatches` with its augmentation, as the model of a recipe takes it, on its device."""

    def __init__(self, x, y, recipe: Recipe, device: torch.device) -> None:
        super().__init__(x, y, recipe.batch, recipe.seed, drop_last=True)
        self.precision, self.device = recipe.precision, device

    def _read(self, epoch: int, rows: torch.Tensor):
        x, y = super()._read(epoch, rows)
        return inputs(x.numpy(), "", self.precision).to(self.device), y.to(self.device)


class Run:
    """One training run on data in memory.

    Args:
        recipe, data, device: what, on what as :func:`data_for` gives it, where.
        make: ``make(recipe, model)`` -> the optimizer, as :func:`.methods.make_optimizer`.

    Attributes:
        step, steps: steps taken so far, and of the whole run.
        history: a dict an epoch: epoch, step, loss (mean over the epoch's finite losses), validation_accuracy, seconds.
        losses: fp32 [steps an epoch] on the device, the losses of the current epoch; NaN where there is none yet.
    """

    def __init__(self, recipe: Recipe, data: Dataset, device: torch.device, make=make_optimizer) -> None:
        self.recipe, self.data, self.device = recipe, data, device
        self.model = build_model(recipe, device)
        self.optimizer = make(recipe, self.model)
        # The schedule is a factor on what the optimizer was given.
        self.base_lrs = [group.get("lr") for group in self.optimizer.param_groups]
        # drop_last: every step has the same shape, as a captured one needs. Each epoch leaves out other images.
        if recipe.data in CLOUD_DATA:
            x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
            self.batches = AugmentedShapes(x, y, recipe, device)
        else:
            self.batches = Batches(*self.tensors("train"), recipe.batch, recipe.seed, drop_last=True)
        self.valid = self.tensors("valid")
        self.step, self.steps = 0, recipe.epochs * len(self.batches)
        self.history: list[dict] = []
        self.losses = torch.full((len(self.batches),), float("nan"), device=device)
        self.timed_seconds, self.timed_steps = 0.0, 0
        self._warm, self._epoch_start = False, 0.0

    def tensors(self, split: str):
        """Images and labels of a split, on the device, in the dtype of the weights."""
        x = inputs(getattr(self.data, f"x_{split}"), self.data.name, self.recipe.precision)
        y = torch.from_numpy(getattr(self.data, f"y_{split}"))
        return x.to(self.device), y.to(self.device)

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the current one."""
        return self.step / len(self.batches)

    def train(
        self,
        max_steps: int | None = None,
        stop: Callable[[], bool] = lambda: False,
        after_step: Callable[[Run], None] = lambda run: None,
        after_epoch: Callable[[Run], None] = lambda run: None,
    ) -> bool:
        """Take steps until the end, ``max_steps`` or ``stop()``.

        Returns:
            False if it was ``stop()`` that ended it.
        """
        last = self.steps if max_steps is None else min(max_steps, self.steps)
        self.model.train()
        while self.step < last:
            epoch, start = divmod(self.step, len(self.batches))
            self._epoch_start = began = time.perf_counter()
            stopped = False
            for x, y in self.batches.epoch(epoch, start):
                self._take_step(x, y)
                if self._warm:
                    self.timed_steps += 1
                else:
                    # The first step compiles and allocates: its time says nothing of the others.
                    self._warm = True
                    self._synchronize()
                    began = time.perf_counter()
                after_step(self)
                stopped = stop()
                if stopped or self.step >= last:
                    break
            self._synchronize()
            self.timed_seconds += time.perf_counter() - began
            if self.step % len(self.batches) == 0:
                self.history.append(self.row())
                self.losses.fill_(float("nan"))
                after_epoch(self)
            if stopped:
                return False
        return True

    def _take_step(self, x, y: torch.Tensor) -> None:
        if self.recipe.integer:
            for group, values in zip(
                self.optimizer.param_groups, self.recipe.integers_at(self.step, self.steps), strict=True
            ):
                group.update(values)
            self.optimizer.train_step(x, y)
            self.losses[self.step % len(self.batches)].copy_(self.optimizer.mean_loss)
            self.step += 1
            return
        factor = self.recipe.lr_factor(self.step, self.steps)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        loss = self.optimizer.train_step(x, y, loss_fn=loss_of(self.recipe))
        # Kept on the device: nobody waits for it until the epoch ends.
        self.losses[self.step % len(self.batches)].copy_(loss)
        self.step += 1

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def row(self) -> dict:
        """What the history keeps of the epoch that is being trained."""
        finite = self.losses[torch.isfinite(self.losses)]
        return {
            "epoch": round(self.epoch, 6),
            "step": self.step,
            "loss": finite.mean().item() if len(finite) else float("nan"),
            "validation_accuracy": self.validate(),
            "seconds": time.perf_counter() - self._epoch_start,
        }

    def validate(self) -> float:
        """Accuracy on the validation images."""
        return accuracy(self.model, *self.valid)

    def test(self) -> float:
        """Accuracy on the test images: to be asked for once, at the end."""
        return accuracy(self.model, *self.tensors("test"))

    @property
    def step_ms(self) -> float | None:
        """Milliseconds a step in this process, the first one left out; None before the second."""
        return 1000 * self.timed_seconds / self.timed_steps if self.timed_steps else None

    @property
    def skipped(self) -> int:
        """Steps that changed nothing, because their loss was not finite."""
        return int(getattr(self.optimizer, "skipped", 0))

    def state(self) -> dict:
        """What a checkpoint holds of the run: all that decides the rest of it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
        }

    def load_state(self, state: dict) -> None:
        """Go back to a :meth:`state`; the model's weights have been compared and copied before.

        Raises:
            ValueError: of a run with another number of steps an epoch, so with other data.
        """
        if state["losses"].shape != self.losses.shape:
            raise ValueError(
                f"a checkpoint of other data: {len(state['losses'])} steps an epoch, here it is {len(self.losses)}"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], list(state["history"])
        if hasattr(self.optimizer, "steps") and "steps" not in state["optimizer"]:
            self.optimizer.steps = self.step  # checkpoints from before MeZO's state had its count
        self.losses.copy_(state["losses"])

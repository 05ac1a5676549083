"""Bytes of a step by cut, without training: the real step, run on fake tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from ..nn.convert import convert_
from ..nn.cut import all_cuts
from ..nn.plan import refuse_classes
from ..ops.int8_tensor import Int8Tensor
from ..ops.noise import check_index
from ..optim import ElasticZO
from ..optim.baselines import FrozenTrunk
from ..optim.batches import call, rows_of
from .fake import fake_batch, fake_mode, fake_model
from .live import LiveBytes
from .table import size, table
from .tally import tally_of

MODES = ("stacked", "sequential")
OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Parts:
    """Bytes alive at the peak of a step.

    ``parameters`` (with the model's buffers), ``gradients``, ``state`` (what lives between steps: the optimiser's moments and
    the step's device scalars), ``activations`` (with what autograd saves or makes, and the stacked copy of the batch; the batch
    itself is the caller's), ``workspace`` (perturbed copies of small parameters, temporaries of the optimiser).
    """

    parameters: int
    gradients: int
    state: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.state + self.activations + self.workspace


@dataclass(frozen=True)
class CutBytes:
    """Bytes of a step at one cut: a row of :class:`MemoryPlan`.

    Attributes:
        layers: weight layers in the head, from 0 (pure zeroth order) on.
        head: what :func:`ezo_kernels.convert_` takes: names, none, or "all" (pure backpropagation).
        bytes: (``stacked`` or ``sequential``, the head's optimiser ``sgd`` or ``adam``) -> parts. A stacked step that the
            model does not allow is missing.
        tally: the paper's, every buffer at once in fp32.
    """

    layers: int
    head: tuple[str, ...] | str
    bytes: dict[tuple[str, str], Parts]
    tally: int


@dataclass(frozen=True)
class MemoryPlan:
    """What :func:`memory_plan` found; ``str`` is a table.

    Attributes:
        cuts: from pure zeroth order to pure backpropagation.
        backprop: ``sgd`` and ``adam`` -> parts of plain torch, without this library.
        refused: (head, why) of the cuts that the model cannot have.
        rows: of the batch. queries: directions a step.
    """

    cuts: tuple[CutBytes, ...]
    backprop: dict[str, Parts]
    refused: tuple[tuple[tuple[str, ...] | str, str], ...]
    rows: int
    queries: int

    def __str__(self) -> str:
        ways = [(mode, optimizer) for mode in MODES for optimizer in OPTIMIZERS]
        header = ["layers", "head", *(f"{mode}, {optimizer}" for mode, optimizer in ways), "all at once (paper)"]
        rows = []
        for cut in self.cuts:
            cells = [size(cut.bytes[way].total) if way in cut.bytes else "-" for way in ways]
            rows.append([str(cut.layers), shown(cut.head), *cells, size(cut.tally)])
        lines = [f"bytes at the peak of a step, batch {self.rows}, queries {self.queries}", table(header, rows)]
        plain = ", ".join(f"{name} {size(parts.total)}" for name, parts in self.backprop.items())
        lines.append(f"backpropagation by torch alone: {plain}")
        lines += [f"no cut at {shown(head)}: {why}" for head, why in self.refused]
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Everything as JSON takes it."""

        def parts(p: Parts) -> dict:
            return {**asdict(p), "total": p.total}

        cuts = [
            {
                "layers": cut.layers,
                "head": cut.head if isinstance(cut.head, str) else list(cut.head),
                "bytes": {f"{mode}, {optimizer}": parts(p) for (mode, optimizer), p in cut.bytes.items()},
                "tally_bytes": cut.tally,
            }
            for cut in self.cuts
        ]
        return {
            "rows": self.rows,
            "queries": self.queries,
            "cuts": cuts,
            "backprop": {name: parts(p) for name, p in self.backprop.items()},
            "refused": [{"head": h if isinstance(h, str) else list(h), "reason": why} for h, why in self.refused],
        }

    def plot(self, path: str | Path | None = None):
        """Bytes against the cut, as a matplotlib Figure; written to ``path`` if one is given.

        Raises:
            ModuleNotFoundError: no matplotlib (the extra ``plot``).
        """
        from .figures import memory_figure

        return memory_figure(self, path)


def shown(head: tuple[str, ...] | str) -> str:
    """A head in a table: where it starts."""
    if isinstance(head, str):
        return head
    return f"{head[0]} on" if len(head) > 1 else head[0] if head else "none"


def batch_of(sample):
    """x and y of a sample: the pair (x, y), or x alone with y None."""
    if isinstance(sample, (tuple, list)):
        if len(sample) != 2:
            raise ValueError(
                f"sample must be x or the pair (x, y), got {len(sample)} items; several inputs go as ((a, b), y)"
            )
        return _floats(sample[0]), sample[1]
    _floats(sample)
    if not isinstance(sample, (torch.Tensor, dict)):
        raise TypeError(f"sample must be a tensor, a dict or the pair (x, y), got {type(sample).__name__}")
    return sample, None


def _floats(x):
    """``x``, unless it is in integers."""
    if isinstance(x, Int8Tensor):
        raise TypeError(
            "the sample is an Int8Tensor, and this is of floats: planning.plan_int8_step gives the bytes of a step in "
            "integers; a cut that is chosen in floats may be trained in integers"
        )
    return x


def check_model(model: nn.Module) -> None:
    """Refuse a model that is converted, that has nothing to train, or that no conversion takes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_classes(model)
    if "_ezo" in model.__dict__:
        raise ValueError("the model is converted already: unconvert_ it, a plan tries every cut on its own")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no parameter to train: all are frozen")


def head_of(cuts: list[tuple[str, ...]], layers: int) -> tuple[str, ...] | str:
    """The head with this many weight layers, as :func:`ezo_kernels.convert_` takes it."""
    return "all" if layers == len(cuts) - 1 else cuts[layers]


def _classes(model: nn.Module, x) -> torch.Tensor:
    """Class ids that fit the model's output, for a sample without y."""
    with torch.no_grad():
        out = call(model, x, {})
    if not isinstance(out, torch.Tensor) or out.dim() < 2 or not out.is_floating_point():
        raise ValueError("the model's output is not [B, classes, ...]: give the sample as the pair (x, y), and loss_fn")
    return torch.zeros((out.shape[0], *out.shape[2:]), dtype=torch.int64, device=out.device)


def _check_targets(model: nn.Module, x, y, loss_fn) -> None:
    """Refuse targets that F.cross_entropy would refuse in the middle of a fake step, in words about its insides."""
    if loss_fn is not F.cross_entropy or not isinstance(y, torch.Tensor) or y.dtype == torch.int64:
        return
    with torch.no_grad():
        out = call(model, x, {})
    if not isinstance(out, torch.Tensor) or (y.is_floating_point() and y.shape == out.shape):
        return
    error = ValueError if y.is_floating_point() and y.dim() == out.dim() else TypeError
    raise error(
        f"F.cross_entropy takes int64 class ids, or probabilities of the output's shape: got {y.dtype} of {tuple(y.shape)} "
        f"for an output of {tuple(out.shape)}"
    )


def new_optimizer(name: str, parameters) -> torch.optim.Optimizer:
    """The optimiser of this name that plans and times are of."""
    # fused: without it Adam asks the host for its step count, which a fake tensor cannot answer
    return torch.optim.SGD(parameters) if name == "sgd" else torch.optim.Adam(parameters, fused=True)


def parts_of(live: LiveBytes, parameters: int) -> Parts:
    """What was alive at the peak, by what it was for."""
    found = live.at_peak("activations")
    return Parts(parameters, found["gradients"], found["state"], found["activations"], found["workspace"])


def _watch_gradients(live: LiveBytes, model: nn.Module) -> None:
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: live.mark([p.grad], "gradients"))


def _require_forward(model: nn.Module, held: dict, draws: list[str]) -> None:
    """Refuse what a real first step refuses of its forward, as far as fakes show it."""
    problems = [f"random in a way that would differ between the signs: {draws[0]}"] if draws else []
    now = dict(model.named_buffers())
    written = sorted(n for n, (b, version) in held.items() if now.get(n) is not b or b._version != version)
    if written:
        problems.append(f"buffers written by the forward: {', '.join(map(repr, written))}")
    if problems:
        raise ValueError("this model cannot take a zeroth-order step: " + "; ".join(problems))


def step_bytes(model: nn.Module, x, y, loss_fn, *, mode: str, optimizer: str, queries: int = 1) -> Parts:
    """Bytes of the second :meth:`ezo_kernels.ElasticZO.train_step` of a converted model, real or fake, which takes two.

    The first one makes the optimiser's state and checks the model. ``model`` trains: give it one that may.
    """
    owned = [*model.parameters(), *model.buffers()]
    live = LiveBytes([*owned, *tensors_of(x), *tensors_of(y)])
    with live:
        head = [p for p in model.parameters() if p.requires_grad]
        opt = ElasticZO(
            model, queries=queries, mode=mode, head_optimizer=new_optimizer(optimizer, head) if head else None
        )
        _watch_gradients(live, model)
        finish, held = opt._finish, {name: (b, b._version) for name, b in model.named_buffers()}

        def finish_as_workspace() -> None:
            if opt.trunk:
                _require_forward(model, held, live.draws)
            with live.role("workspace"):
                finish()
            held.update({name: (b, b._version) for name, b in model.named_buffers()})  # batch norms' are written there

        opt._finish = finish_as_workspace
        # What a real first step checks of the model's values fakes do not have, but which weights it leaves out they show.
        opt.zo.visited = set()
        opt.train_step(x, y, loss_fn)
        live.mark_alive("state")
        live.restart()
        opt.train_step(x, y, loss_fn)
    return parts_of(live, storage_bytes(owned))


def backprop_bytes(model: nn.Module, x, y, loss_fn, *, optimizer: str) -> Parts:
    """Bytes of the second step of plain backpropagation; ``model`` is a torch model, real or fake, and trains."""
    owned = [*model.parameters(), *model.buffers()]
    live = LiveBytes([*owned, *tensors_of(x), *tensors_of(y)])
    with live:
        opt = new_optimizer(optimizer, [p for p in model.parameters() if p.requires_grad])
        _watch_gradients(live, model)
        for _ in range(2):
            live.mark_alive("state")
            live.restart()
            loss_fn(call(model, x, {}), y).backward()
            with live.role("workspace"):
                opt.step()
            opt.zero_grad()
    return parts_of(live, storage_bytes(owned))


def tensors_of(batch) -> list[torch.Tensor]:
    """The tensors of a batch of any structure."""
    return [t for t in pytree.tree_leaves(batch) if isinstance(t, torch.Tensor)]


def storage_bytes(tensors) -> int:
    """Bytes of the storages of these tensors, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def memory_plan(model: nn.Module, sample, *, loss_fn=F.cross_entropy, queries: int = 1) -> MemoryPlan:
    """Bytes of a training step at every cut, planned without computing or allocating anything.

    The step itself, conversion and optimiser included, runs on a twin of the model in fake tensors, while every storage is
    followed from where it is made to where it is freed: a trunk frees its activations as it goes, a head keeps what autograd
    saves. So a model far too large for this machine, or one on the meta device (planned as on the CPU), can be planned. The
    time is that of eight traced steps a cut: seconds for a few layers, minutes for a hundred.

    Cuts that conversion or a step refuses are left out and named in ``refused``, such as those with a layer in the trunk that
    the forward does not use. Whether a model treats the rows of a batch apart, as a stacked step must have it, shows only in a
    real first step.

    Not counted: the batch itself, what a kernel takes and gives back inside of one call, an allocator's rounding, the CUDA
    context. Adam is torch's with ``fused=True``. Steps in integers have :func:`ezo_kernels.planning.plan_int8_step`.

    Args:
        model: a plain torch model in any dtype; not touched.
        sample: one batch as a loader gives it, the pair (x, y), x a tensor, a tuple of arguments or a dict; or x alone (a
            tensor or a dict), with class ids made up for y.
        loss_fn: ``loss_fn(output, y)`` -> scalar.
        queries: directions a step.

    Raises:
        TypeError: a sample or a model of another type, labels of another dtype.
        ValueError: a converted model, one with nothing to train, without a weight layer or without a cut that can be trained,
            an empty batch, an output that no class ids fit, a forward or a loss that asks a tensor for values (``if x.sum() >
            0``).
        NotImplementedError: a model that :func:`ezo_kernels.convert_` refuses whatever the head, an operator without a fake.
    """
    check_model(model)
    check_index(queries, "queries", 1 << 12)
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    real_x, real_y = batch_of(sample)
    rows = rows_of(real_x)
    mode = fake_mode()
    x, y = fake_batch(real_x, mode), fake_batch(real_y, mode)
    with mode:
        twin = fake_model(model, mode)
        cuts = all_cuts(twin, x)
        if len(cuts) == 1:
            raise ValueError("the model runs no weight layer: there is nothing to cut")
        tally = tally_of(twin, x, cuts=cuts)
        if real_y is None:
            y = _classes(twin, x)
        _check_targets(twin, x, y, loss_fn)
        found, refused = [], []
        for n in range(len(cuts)):
            head = head_of(cuts, n)
            try:
                found.append(CutBytes(n, head, _ways(model, mode, head, x, y, loss_fn, queries), tally[n]))
            except (ValueError, NotImplementedError) as error:
                refused.append((head, str(error)))
        if not found:
            raise ValueError(
                f"no cut of this model can be trained: {'; '.join(dict.fromkeys(why for _, why in refused))}"
            )
        backprop = {name: backprop_bytes(fake_model(model, mode), x, y, loss_fn, optimizer=name) for name in OPTIMIZERS}
    return MemoryPlan(tuple(found), backprop, tuple(refused), rows, queries)


def plan_step(
    model: nn.Module, x, y, loss_fn, *, head, mode: str = "auto", queries: int = 1, frozen: bool = False
) -> Parts:
    """What :func:`memory_plan` finds of one head in one mode, its optimiser SGD, in a fraction of the time.

    Args:
        model: a plain torch model; not touched.
        x, y, loss_fn, queries: as in :func:`memory_plan`.
        head: as :func:`ezo_kernels.convert_` takes it; None plans plain backpropagation, without this library.
        mode: ``stacked``, ``sequential`` or ``auto``.
        frozen: the trunk stays as it is, :class:`ezo_kernels.optim.baselines.FrozenTrunk`; no mode and no queries.
    """
    fakes = fake_mode()
    x, y = fake_batch(x, fakes), fake_batch(y, fakes)
    with fakes:
        twin = fake_model(model, fakes)
        if frozen:
            FrozenTrunk(twin, head)  # says what autograd may keep
        if head is None or frozen:
            return backprop_bytes(twin, x, y, loss_fn, optimizer="sgd")
        return step_bytes(convert_(twin, head=head), x, y, loss_fn, mode=mode, optimizer="sgd", queries=queries)


def _ways(model, mode, head, x, y, loss_fn, queries) -> dict[tuple[str, str], Parts]:
    found: dict[tuple[str, str], Parts] = {}
    errors: dict[str, Exception] = {}
    for way in MODES:
        for optimizer in OPTIMIZERS:
            if not head and optimizer != "sgd":
                if (way, "sgd") in found:
                    found[way, optimizer] = found[way, "sgd"]  # no head, so nothing for it to optimise
                continue
            twin = convert_(fake_model(model, mode), head=head)
            if way == "stacked" and ElasticZO(twin).mode != way:
                continue
            try:
                found[way, optimizer] = step_bytes(twin, x, y, loss_fn, mode=way, optimizer=optimizer, queries=queries)
            except (ValueError, NotImplementedError) as error:
                errors[way] = error
    if not found:
        raise next(iter(errors.values()))
    return found

"""Modules that run once a group: those whose parameters no kernel reads, those of the head, and batch norm.

They keep their class's behaviour: a subclass made here overrides ``forward`` only, and the module's ``__class__`` is set to
it, so that names, Parameters, hooks and ``isinstance`` stay what they were.
"""

from __future__ import annotations

import contextlib
import functools
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from ..ops import perturb
from ..ops._perturbation import NotStackedError, check_order
from ..ops.batch_norm import batch_norm, move_running_statistics, takes
from ..ops.grouped_linear import grouped_linear, is_for_groups
from .context import ZOContext
from .linear import EndsInRelu

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Grouped(nn.Module):
    """Runs its base class's forward on each group's rows, with each group's copies of its own trunk parameters.

    Attributes:
        zo: the model's context.
        zo_owned: (path below this module, site, layout) of the trunk parameters that it reads.
    """

    zo: ZOContext
    zo_owned: tuple[tuple[str, int, str], ...]

    def forward(self, *args, **kwargs):
        if self.zo.p is None:
            return super().forward(*args, **kwargs)
        return _run(self, functools.partial(self._group_forward, super().forward), args, kwargs)

    def _group_forward(self, forward, *args, **kwargs):
        return forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        # The class is made at run time; a pickle names its base, which may say itself what of it is kept.
        return _rebuild, (type(self).base,), (self.__getstate__(), self.zo, self.zo_owned)

    def __setstate__(self, state):
        if isinstance(state, dict):  # as it was pickled before zo_owned had its name
            state = {**state}
            zo, owned = state.pop("zo"), state.pop("owned")
        else:
            state, zo, owned = state
        super().__setstate__(state)
        self.__dict__.update(zo=zo, zo_owned=owned)


class GroupedBatchNorm(Grouped):
    """Batch norm with statistics of each group's rows; running statistics are left to the step, which may be skipped."""

    def forward(self, input):
        zo = self.zo
        if zo.p is not None and zo.is_shared(input) and not self.zo_owned:
            return self._shared(input)
        p, stacked = zo.p, zo.p is not None and (not zo.stacked or zo.is_stacked(input))
        own = self.training or self.running_mean is None
        if not (stacked and own and type(input) in (torch.Tensor, FakeTensor) and takes(input, p.groups)):
            return super().forward(input)
        self._check_input_dim(input)
        self._check_channels(input)
        held = [t for t in (self.weight, self.bias, self.running_mean, self.running_var) if t is not None]
        if any(t.requires_grad or t.device != input.device for t in held):
            return super().forward(input)
        affine = {"weight": self.weight, "bias": self.bias}
        affine |= {path: copies(self, path, site, layout, zo) for path, site, layout in self.zo_owned}
        y, mean, var = batch_norm(input, affine["weight"], affine["bias"], p.groups, self.eps)
        if self._tracks():
            zo.batch_stats.setdefault(self, []).append((mean, var))
        return y

    def _shared(self, input):
        """Once for all groups; each has the statistics."""
        zo, noted = self.zo, len(self.zo.batch_stats.get(self, ()))
        with zo.one_group(0):
            y = self.forward(input)
        own = zo.batch_stats.get(self, [])
        own[noted:] = [tuple(t.repeat(zo.p.groups, 1) for t in stats) for stats in own[noted:]]
        return y

    def _tracks(self) -> bool:
        """As torch has it, who may be told later not to: running statistics there are then stay as they are."""
        return self.running_mean is not None and self.track_running_stats

    def _check_channels(self, x) -> None:
        """As torch does before it runs: afterwards, the statistics' own error would come when weights have moved."""
        for name in ("weight", "bias", "running_mean", "running_var"):
            held = getattr(self, name)
            if held is not None and held.shape != (x.shape[1],):
                raise ValueError(f"{name} should contain {x.shape[1]} elements not {held.numel()}")

    def _group_forward(self, forward, x):
        if not (self.training or self.running_mean is None):
            return forward(x)
        self._check_input_dim(x)
        self._check_channels(x)
        mean = x.new_zeros(x.shape[1], dtype=torch.float32)
        var = torch.ones_like(mean)
        # statistics of 16-bit rows stay fp32, and torch wants weight and bias of the statistics' dtype then
        affine = [None if p is None else p.float() for p in (self.weight, self.bias)]
        # momentum 1 makes F.batch_norm write this batch's own mean and unbiased variance into its "running" ones.
        y = F.batch_norm(x, mean, var, *affine, True, 1.0, self.eps)
        if self._tracks():
            self.zo.batch_stats.setdefault(self, []).append((mean[None], var[None]))
        return y


class GroupedLinear(EndsInRelu, Grouped):
    """A linear layer of the head: all groups in one launch where that is what a group by itself would take."""

    def forward(self, input, *, relu: bool = False):
        p = self.zo.p
        apart = p is None or self.zo_owned or (self.zo.stacked and not self.zo.is_stacked(input))
        if apart or not is_for_groups(input, self.weight, self.bias, p.groups):
            y = super().forward(input)
            return F.relu(y) if relu else y
        return grouped_linear(input, self.weight, self.bias, p.groups, relu)


@functools.cache
def grouped_class(base: type) -> type:
    """The subclass of ``base`` that runs once a group."""
    mixin = GroupedBatchNorm if base in BATCH_NORMS else GroupedLinear if base is nn.Linear else Grouped
    return type("ZO" + base.__name__, (mixin, base), {"base": base, "__module__": __name__})


def _rebuild(base: type):
    return grouped_class(base).__new__(grouped_class(base))


def group_(module: nn.Module, zo: ZOContext, owned=()) -> None:
    """Make ``module`` run once a group, in place."""
    cls = grouped_class(type(module))
    object.__setattr__(module, "__class__", cls)  # a class of a user's may guard its attributes
    module.__dict__.update(zo=zo, zo_owned=tuple(owned))


def ungroup_(module: nn.Module) -> None:
    """Undo :func:`group_`."""
    del module.__dict__["zo"], module.__dict__["zo_owned"]
    object.__setattr__(module, "__class__", type(module).base)


def copies(module: nn.Module, path: str, site: int, layout: str, zo: ZOContext):
    """[groups, *shape]: every group's copy of one parameter below ``module``."""
    owner, _, name = path.rpartition(".")
    zo.visit(site)
    return perturb(module.get_submodule(owner)._parameters[name], zo.of(site), site=site, layout=layout)


@contextlib.contextmanager
def swapped(module: nn.Module, tensors: dict[str, torch.Tensor]):
    """Put ``tensors`` in the place of parameters below ``module``; the Parameters themselves are not written."""
    held = []
    try:
        for path, tensor in tensors.items():
            owner, _, name = path.rpartition(".")
            table = module.get_submodule(owner)._parameters
            held.append((table, name, table[name]))
            table[name] = tensor
        yield
    finally:
        for table, name, parameter in reversed(held):
            table[name] = parameter


def _run(module: Grouped, forward, args, kwargs):
    zo = module.zo
    if module.zo_owned and torch.is_grad_enabled():
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                check_order(leaf, type(module).base.__name__, module.zo_owned[0][1])
    spread = {path: copies(module, path, site, layout, zo) for path, site, layout in module.zo_owned}
    if not zo.stacked:
        with swapped(module, {path: t[0] for path, t in spread.items()}):
            return forward(*args, **kwargs)
    if not module.zo_owned and not module._modules and len(args) == 1 and not kwargs and zo.is_stacked(args[0]):
        # nothing to swap or to narrow
        return zo.made(_joined(module, (forward(own) for own in zo.parts(args[0]))))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not any(zo.is_stacked(leaf) or zo.is_shared(leaf) for leaf in leaves):
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        raise NotStackedError(
            f"{type(module).base.__name__}: no argument holds the {zo.p.groups} groups of this pass along dimension 0 "
            f"(shapes {shapes}); run them one by one (mode='sequential')",
            module.zo_owned[0][1] if module.zo_owned else None,
        )
    mask = _mask_of_all(module, args, kwargs)
    split = [
        zo.parts(leaf) if leaf is not mask and zo.is_stacked(leaf) else itertools.repeat(leaf, zo.p.groups)
        for leaf in leaves
    ]

    def one_by_one():
        for g, mine in enumerate(zip(*split, strict=True)):
            with swapped(module, {path: t[g] for path, t in spread.items()}), zo.one_group(g):
                a, k = pytree.tree_unflatten(list(mine), spec)
                out = forward(*a, **k)
            yield out
            del out

    return zo.made(_joined(module, one_by_one()))


def _mask_of_all(module: Grouped, args, kwargs) -> torch.Tensor | None:
    """The [target, source] mask of attention, which is every row's, however many rows a target has.

    One that has been stacked, for it was as long as the batch, is not of this length any more.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return None
    mask = kwargs.get("attn_mask", args[5] if len(args) > 5 else None)
    query = kwargs.get("query", args[0] if args else None)
    if not (isinstance(mask, torch.Tensor) and mask.dim() == 2 and isinstance(query, torch.Tensor)):
        return None
    targets = query.shape[0 if query.dim() == 2 or not module.batch_first else 1]
    return mask if mask.shape[0] == targets else None


def _joined(module: Grouped, outputs):
    """What a module gives for each group (an iterator) as one output, its tensors stacked along dimension 0."""
    first = next(outputs)
    if isinstance(first, torch.Tensor) and first.dim():
        if first.requires_grad or torch.compiler.is_compiling():
            return torch.cat([first, *outputs])  # most heads
        held = [first]
        del first
        return _filled(module.zo.p.groups, held, outputs)
    flat = [pytree.tree_flatten(out) for out in (first, *outputs)]
    joined = []
    for parts in zip(*(leaves for leaves, _ in flat), strict=True):
        if isinstance(parts[0], torch.Tensor) and not parts[0].dim():
            raise NotStackedError(
                f"{type(module).base.__name__} gives a tensor without rows, one of each group: run the groups one by one "
                "(mode='sequential')",
                module.zo_owned[0][1] if module.zo_owned else None,
            )
        joined.append(torch.cat(parts) if isinstance(parts[0], torch.Tensor) else parts[0])
    return pytree.tree_unflatten(joined, flat[0][1])


def _filled(groups: int, held: list, outputs) -> torch.Tensor:
    """``torch.cat`` of what ``held`` has and ``outputs`` give, that holds no more than one of them beside the whole."""
    y = held.pop()
    shape, rows = y.shape, y.shape[0]
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.dim(), torch.contiguous_format)
    if y.is_contiguous() or not y.is_contiguous(memory_format=layout):
        layout = torch.contiguous_format
    whole = torch.empty((groups * rows, *shape[1:]), dtype=y.dtype, device=y.device, memory_format=layout)
    for g in range(groups):
        y = next(outputs) if y is None else y
        if y.shape != shape or y.dtype != whole.dtype or y.requires_grad:
            return torch.cat([whole[: g * rows], y, *outputs])
        whole[g * rows : (g + 1) * rows].copy_(y)
        y = None  # before the next group runs
    return whole


def batch_statistics(model: nn.Module) -> list[str]:
    """Names of batch norms that would take the statistics of what they are given."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None)
    ]


@torch.no_grad()
def update_batch_norms(zo: ZOContext, ok: torch.Tensor) -> None:
    """Move running statistics once, by the mean over the step's groups; not where ``ok`` is false."""
    for module, stats in zo.batch_stats.items():
        batches = module.num_batches_tracked
        if batches is not None:
            batches.add_(ok)
        if module.momentum is None:
            factor = 0.0 if batches is None else 1.0 / batches.clamp(min=1).float()
        else:
            factor = module.momentum
        both = [new[0] if len(new) == 1 else torch.cat(new) for new in zip(*stats, strict=True)]
        running = module.running_mean, module.running_var
        if module.momentum is not None and takes(running[0][None], 1) and all(r.is_contiguous() for r in running):
            move_running_statistics(*running, *both, ok, factor)
            continue
        for old, new in zip(running, both, strict=True):
            mean = new.mean(0).to(old.dtype)
            old.copy_(torch.where(ok, old + (mean - old) * factor, old))
    zo.batch_stats.clear()

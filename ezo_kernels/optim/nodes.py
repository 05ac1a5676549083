"""Node perturbation: layers whose outputs are perturbed, row by row, in place of their weights (:mod:`ezo_kernels.ops.node`).

All rows of a batch have noise of their own, and each row's loss answers for it: a step measures B numbers a direction where
perturbed weights measure one. What the update needs beside the losses are the layer's inputs, the mean over the groups of each
row's; they stay from the forward to the update, fp32 [R, inputs] a layer (docs/method.md, Node perturbation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils import _pytree as pytree

from ..nn.convert import plan_of
from ..nn.grouped import batch_statistics
from ..nn.linear import ZOLinear
from ..ops import Noise, Perturbation, decorrelated_gradient, output_errors
from ..ops._perturbation import PassError
from .arguments import LARGEST, moved, number, rate
from .batches import call, picked, rows_of
from .check import unwritten
from .compare import differ, largest
from .losses import by_row, counted_rows, ignored_by, row_shares


@dataclass(frozen=True)
class NodePerturbation:
    """How some linear layers of the trunk learn: ``ElasticZO(..., node_perturbation=NodePerturbation(["fc1", "fc2"]))``.

    Args:
        layers: names of nn.Linear modules.
        lr: learning rate of their weights and biases, for the gradient as ``damping`` has it; ``param_groups[-1]``.
        eps: how far their outputs are moved, above 0; of the size of a twentieth of what they are, not of a weight's.
        damping: of the inputs' second moments, whose inverse the gradient is multiplied by: a share of their trace, above 0.
            None: the plain gradient, which wants an lr as backpropagation has it.
        constant_statistics: allow batch norms in training, whose statistics then count as constants: a row's loss answers for
            its own noise, not for what that does to the others through mean and variance (docs/method.md). False refuses them.
        clip: largest magnitude of a row's g, what its own loss (not its share of the mean) changes by along its noise; or None.
            The default suits cross-entropy. Without one large weights make large g, large steps and larger weights.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, naming it.
    """

    layers: Sequence[str]
    lr: float = 0.2
    eps: float = 0.05
    damping: float | None = 0.001
    constant_statistics: bool = False
    clip: float | None = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not isinstance(self.layers, Sequence):
            raise TypeError(f"layers must be a list of names, got {self.layers!r}")
        if not self.layers or not all(isinstance(name, str) for name in self.layers):
            raise ValueError(f"layers must be names of layers, at least one, got {list(self.layers)}")
        object.__setattr__(self, "layers", tuple(dict.fromkeys(self.layers)))
        object.__setattr__(self, "lr", number(self.lr, "lr of node_perturbation", least=0.0))
        object.__setattr__(self, "eps", number(self.eps, "eps of node_perturbation", least=0.0, strict=True))
        if not isinstance(self.constant_statistics, bool):
            raise TypeError(f"constant_statistics must be a bool, got {type(self.constant_statistics).__name__}")
        if self.damping is not None:
            own = number(self.damping, "damping of node_perturbation", least=0.0, strict=True)
            object.__setattr__(self, "damping", own)
        if self.clip is not None:
            object.__setattr__(self, "clip", _clip(self.clip))


def _clip(value) -> float:
    return number(value, "clip of node_perturbation", least=0.0, strict=True, held=False)


class Inputs:
    """The mean over a step's groups of what layers were given, in the groups' order."""

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._sums: dict[int, torch.Tensor] = {}
        self._seen: dict[int, int] = {}

    @torch.no_grad()
    def add(self, site: int, x: torch.Tensor, parts: int, groups: int) -> None:
        """``x`` [parts * B, ..., K] is what ``groups`` groups were given, each its own part or all the same one.

        Raises:
            PassError: the layer was given more groups than there are: it ran twice.
        """
        first, *others = x.detach().reshape(parts, -1, x.shape[-1]).float()
        seen = self._seen.get(site, 0)
        if seen + groups > self._groups:
            raise PassError("a layer whose outputs are perturbed ran twice in a forward: it has one noise a step", site)
        self._seen[site] = seen + groups
        total = first.clone()
        for other in others if parts == groups else [first] * (groups - 1):  # the bits of copies
            total += other
        if seen and total.shape != self._sums[site].shape:
            raise PassError(f"x has {len(total)} rows in one group and {len(self._sums[site])} in another", site)
        self._sums[site] = total if not seen else self._sums[site].add_(total)

    def of(self, site: int) -> torch.Tensor:
        """fp32 [R, K]."""
        if site not in self._sums:
            raise PassError("its outputs are to be perturbed, and the forward does not run it", site)
        return self._sums[site] / self._groups


class _Layer(NamedTuple):
    name: str
    module: ZOLinear
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None


def _layers(setting: NodePerturbation, model: torch.nn.Module) -> list[_Layer]:
    modules, fused = dict(model.named_modules()), plan_of(model).fused
    linear = [name for name, cls in fused.items() if cls is ZOLinear]
    for name in setting.layers:
        if name not in modules:
            raise ValueError(f"node_perturbation: no layer {name!r}; the trunk's linear layers are {', '.join(linear)}")
    sites = {s.site: s for s in plan_of(model).sites}
    found, problems = [], []
    for name in setting.layers:
        module = modules[name]
        if name not in linear:
            problems.append(f"{name!r} ({type(module).__name__}) is no nn.Linear of the trunk with weights to train")
            continue
        own = {"weight": module.site, "bias": module.bias_site}
        if module.site is None:
            problems.append(f"{name!r} has a frozen weight")
            continue
        tied = [leaf for leaf, site in own.items() if site is not None and len(sites[site].names) > 1]
        problems += [f"the {leaf} of {name!r} is tied" for leaf in tied]
        bias = None if module.bias_site is None else module.bias
        for leaf, p in (("weight", module.weight), ("bias", bias)):
            if p is not None and p.dtype != torch.float32:
                problems.append(f"the {leaf} of {name!r} is {p.dtype}: only float32 is updated this way")
        found.append(_Layer(name, module, module.weight, bias))
    if problems:
        raise NotImplementedError("node_perturbation: " + "; ".join(problems))
    return found


class Nodes:
    """The layers of a model that learn by node perturbation, and what a step collects of them."""

    def __init__(self, setting: NodePerturbation, model: torch.nn.Module, device: torch.device) -> None:
        if not isinstance(setting, NodePerturbation):
            raise TypeError(f"node_perturbation must be a NodePerturbation, got {type(setting).__name__}")
        self.setting, self.layers = setting, _layers(setting, model)
        self.parameters = [p for own in self.layers for p in (own.weight, own.bias) if p is not None]
        self.weights = frozenset(own.module.site for own in self.layers)
        self.sites = self.weights | {own.module.bias_site for own in self.layers if own.bias is not None}
        self.group = {
            "params": self.parameters, "lr": setting.lr, "eps": setting.eps, "clip": setting.clip, "name": "nodes",
        }  # fmt: skip
        self._lr = torch.full((1,), setting.lr, dtype=torch.float32, device=device)
        self._eps = torch.full((1,), setting.eps, dtype=torch.float32, device=device)
        self._filled = {"lr": setting.lr, "eps": setting.eps}
        self.rows = 0
        from .node_forward import node_forward

        self.forward = node_forward
        self.own = {site: {"eps": self._eps} for site in self.weights}
        self.drop()

    def fill(self) -> None:
        """Look at the group's numbers, and take lr and eps to the device."""
        if any(p.dtype != torch.float32 for p in self.parameters):
            raise ValueError("node_perturbation: its layers are no longer float32, and only that is updated this way")
        if self.group["clip"] is not None:
            _clip(self.group["clip"])
        for name, tensor in (("lr", self._lr), ("eps", self._eps)):
            if (held := moved(self.group, name, self._filled, " of node_perturbation")) is not None:
                tensor.fill_(held)
                self._filled[name] = self.group[name]

    def begin(self, groups: int) -> Inputs:
        """A pass of ``groups`` groups begins; what keeps its inputs."""
        self.drop()
        self._inputs = Inputs(groups)
        return self._inputs

    def drop(self) -> None:
        """Forget what was collected."""
        self._inputs: Inputs | None = None
        self._shares: list[torch.Tensor] = []
        self._counted: torch.Tensor | None = None
        self._off: list[torch.Tensor] = []
        self._steps: list[tuple] = []

    @torch.no_grad()
    def note(self, loss_fn, output, y, groups: int, losses, check: bool) -> None:
        """What each row adds to the losses of its group; ``check``: whether their sum is looked at.

        Raises:
            NotImplementedError, ValueError: as :func:`row_shares`, or rows that do not add up to the loss.
        """
        shares = row_shares(loss_fn, output, y, groups)
        if (values := shares.shape[1]) != self.rows:  # of tokens: their row's noise moves them all
            if values % self.rows:
                raise ValueError(f"node_perturbation: the loss has {values} values for {self.rows} rows of the batch")
            shares = shares.view(groups, self.rows, -1).sum(2)
        whole = losses if isinstance(losses, torch.Tensor) else torch.stack([loss.reshape(()) for loss in losses])
        whole, sums = whole.detach().float().reshape(-1), shares.sum(1)
        off = ((whole - sums).abs() > 1e-2 * sums.abs() + 1e-5).any()  # 16 bits of a loss are 3 digits
        self._off.append(off)
        if check and bool(off):
            raise ValueError(
                f"node_perturbation: the loss is {whole[0].item():.6g}, and the mean of its rows, by reduction='none', "
                f"{sums[0].item():.6g}: it must be a mean in which every row counts alike"
            )
        self._counted = counted_rows(loss_fn, output, y)
        self._shares.append(shares)

    @torch.no_grad()
    def solve(self, key: torch.Tensor, noise: Noise, queries: int, antithetic: bool) -> torch.Tensor:
        """Make the steps of this pass, of which nothing is applied yet.

        Returns:
            fp32 [1]: 1 where one of them is not finite, else 0.
        """
        shares = torch.cat(self._shares)
        if antithetic:
            coef = (shares[0::2] - shares[1::2]) / (2 * queries * self._eps)
        else:  # less the mean of the others: docs/method.md
            coef = (shares - shares.mean(0)) / ((queries - 1) * self._eps)
        bad = torch.stack(self._off).any().reshape(1)  # another loss than the first step's, that is no such mean
        if (clip := self.group["clip"]) is not None:
            # in fp64, as Python divides
            rows = coef.new_full((), coef.shape[1], dtype=torch.float64) if self._counted is None else self._counted
            most = (min(clip, LARGEST) / (coef.shape[0] * rows)).float()
            coef = coef.clamp(-most, most)
        for own in self.layers:
            x = self._inputs.of(own.module.site)
            if len(x) % coef.shape[1]:
                raise ValueError(f"node_perturbation: {own.name} has {len(x)} rows for {coef.shape[1]} losses of rows")
            shape = (len(x), own.weight.shape[0])
            error = output_errors(coef, key, shape, site=own.module.site, noise=noise)
            step = decorrelated_gradient(x, error, self.setting.damping, own.bias is not None)
            for p, d in zip((own.weight, own.bias), step, strict=True):
                if p is not None:
                    bad |= ~torch.isfinite(d.sum())  # of a finite step the sum is, unless it is near what fp32 ends at
                    self._steps.append((p, d))
        return bad.float()

    @torch.no_grad()
    def apply(self, ok: torch.Tensor) -> None:
        """Take the steps, if ``ok``."""
        for p, d in self._steps:
            p.sub_(torch.where(ok, d * self._lr, 0.0))
        self.drop()

    def fixed(self) -> dict:
        """What a state must have alike."""
        setting = self.setting
        return {
            "layers": list(setting.layers), "damping": setting.damping, "constant_statistics": setting.constant_statistics,
        }  # fmt: skip


def check_nodes(nodes: Nodes | None, theirs) -> None:
    """ValueError unless the state ``theirs`` is of a run with the same layers and damping, and has an lr, an eps and a clip."""
    ours = None if nodes is None else nodes.fixed()
    try:
        fixed = [
            own and {name: own[name] for name in ("layers", "damping", "constant_statistics")} for own in (theirs, ours)
        ]
        if theirs is not None:
            rate(theirs["lr"], "lr of node_perturbation")
            number(theirs["eps"], "eps of node_perturbation", least=0.0, strict=True)
            if theirs["clip"] is not None:
                _clip(theirs["clip"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"node_perturbation in the state is none: {error}") from None
    if fixed[0] != fixed[1]:
        raise ValueError(f"the state is of node_perturbation={fixed[0]}, this run of {fixed[1]}")


class NodeRows:
    """What :class:`ezo_kernels.ElasticZO` asks of a model some of whose layers learn by node perturbation."""

    @staticmethod
    def _require_nodes_can(loss_fn, update: bool) -> None:
        if not update:
            raise NotImplementedError("node_perturbation takes a step on each batch: update=False accumulates none")
        if ignored_by(loss_fn) is None:
            by_row(loss_fn)

    def _require_row_by_row(self, x, kwargs: dict) -> None:
        """Refuse a model in which a row's outputs, or what such a layer is given of it, depend on other rows or lie elsewhere.

        Looked at in a first step: the first half of the batch by itself against the same rows among all.
        """
        self.nodes.rows = taken = rows_of(x)
        if not self._checks.apart_is_new:  # by train or eval, too, as batch norms are
            return
        constant = self.nodes.setting.constant_statistics
        norms = [
            n for n in batch_statistics(self.model) if not constant or self.model.get_submodule(n).running_mean is None
        ]
        if norms:
            raise NotImplementedError(
                f"node_perturbation: {', '.join(map(repr, norms))} would take batch statistics, and then a row's loss answers "
                "for the noise of the others, too: eval() them, or keep running statistics and set constant_statistics=True"
            )
        if taken < 2 or self._is_fake:
            return
        half = torch.arange((taken + 1) // 2, device=self.device)
        _, *others = (t for t in pytree.tree_leaves((x, kwargs)) if torch.is_tensor(t) and t.dim())
        masks = {id(t) for t in others if t.shape == (taken, taken)}  # [T, T] of tokens, as many as rows by chance
        part = pytree.tree_map(
            lambda t, own: t if id(t) in masks else own, (x, kwargs), picked((x, kwargs), half, taken)
        )
        whole, alone = (self._seen_by_nodes(*batch) for batch in ((x, kwargs), part))
        for i, (a, b) in enumerate(zip(whole, alone, strict=True)):
            if i < len(self.nodes.layers) and a.shape[0] * len(half) != b.shape[0] * taken:
                raise ValueError(
                    f"node_perturbation: {self.nodes.layers[i].name!r} is given {len(a)} rows of a batch of {taken} and "
                    f"{len(b)} of one of {len(half)}: they are not the batch's"
                )
            if a.dim() and a.shape[0] * len(half) == b.shape[0] * taken:
                a = a[: b.shape[0]]
            bound = self._rounding(b.dtype) ** 0.5 * largest(a)
            if a.shape != b.shape or bool(differ(a, b) > bound):
                raise ValueError(
                    "node_perturbation: a row's values are others without the rest of its batch: the model does not treat the "
                    "rows of a batch apart, or has them in another order at a perturbed layer"
                )
        if not any(bool(t.isnan().any()) for t in whole):  # a step that is skipped has shown nothing
            self._checks.apart_passed()

    @torch.no_grad()
    def _seen_by_nodes(self, x, kwargs: dict) -> list[torch.Tensor]:
        """Unperturbed: the inputs of these layers, then the model's outputs."""
        p = Perturbation(self._key, self._eps, self.noise, 0, 1, (0,))
        self.zo.inputs, self.zo.undropped = Inputs(1), True
        norms = [self.model.get_submodule(name) for name in batch_statistics(self.model)]
        for norm in norms:
            norm.training = False
        try:
            with unwritten(self.model, True), self.zo.running(p):
                output = call(self.model, x, kwargs)
            inputs = self.zo.inputs
        finally:
            self.zo.inputs, self.zo.undropped = None, False
            for norm in norms:
                norm.training = True
        outputs = [t for t in pytree.tree_leaves(output) if torch.is_tensor(t) and t.is_floating_point() and t.numel()]
        return [*(inputs.of(own.module.site) for own in self.nodes.layers), *outputs]

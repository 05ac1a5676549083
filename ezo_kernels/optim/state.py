"""Saving and loading an optimiser: values go into the tensors that are there, never in their place."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping

import numpy as np
import torch

from ..nn.convert import context_of
from ..ops._strategy import strategy_hash
from .arguments import number, rate
from .nodes import check_nodes


def plain_group(group: dict) -> dict:
    """A group whose numbers are Python's: those of a schedule may be numpy's, which torch.load takes for code."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in group.items()}


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """The name of torch's own optimizer that it is, whatever a subclass calls itself; of another its class's."""
    known = (
        c for c in type(optimizer).__mro__ if c.__module__.startswith("torch.optim.") and c is not torch.optim.Optimizer
    )
    return next(known, type(optimizer)).__name__


class Copies:
    """deepcopy and pickle of an optimiser, which go with its model, and what a captured step asks of it.

    Attributes:
        states_loaded: how often ``load_state_dict`` was called: a log of the steps before is of another run.
    """

    states_loaded = 0

    def __getstate__(self) -> dict:
        # torch's own keeps its three attributes alone. "step" is there once a scheduler has wrapped it, around this object.
        state = {name: value for name, value in self.__dict__.items() if name != "step"}
        # of integers one launch leaves both in the same memory, as two dtypes, which torch.save refuses
        return {**state, "losses": self.losses.clone(), "g": self.g.clone()}

    @property
    def capture_counters(self) -> dict[str, int] | None:
        """Captures, replays and eager steps of a captured step; None without one."""
        return None if self._captured is None else self._captured.counters()

    def _require_model(self) -> None:
        """Refuse a model that is no longer what this optimizer was made for: its updates would go to nobody's weights."""
        whose = type(self).__name__
        if context_of(self.model) is not self.zo:
            raise ValueError(f"the model was converted anew since this {whose} was made: make a new one")
        self._places.require(self.model, whose)

    def _results(self, loss) -> tuple:
        return loss, self.losses, self.g

    def _took(self, results) -> None:
        _, self.losses, self.g = results
        self._opt_called = True  # torch's schedulers ask whether the optimizer stepped before them


class OptimizerState(Copies):
    """state_dict and load_state_dict of :class:`ElasticZO`."""

    def _manifest(self) -> list:
        sites = zip(self.zo.manifest, self.trunk, strict=True)
        return [(s.site, list(s.names), list(s.shape), s.layout, s.z_dtype_for(p)) for s, p in sites]

    def _check_manifest(self, theirs: list) -> None:
        try:
            theirs = [list(row) for row in theirs]
        except TypeError:
            raise ValueError(f"the state's manifest is no list of sites but {type(theirs).__name__}") from None
        ours = [list(row) for row in self._manifest()]
        if [row[:4] for row in theirs] != [row[:4] for row in ours]:
            raise ValueError("the state is of another model, or of one converted with another head")
        differ = [(row[1][0], a[4], row[4]) for a, row in zip(theirs, ours, strict=True) if a[4:] != row[4:]]
        if differ:
            name, saved, here = differ[0]
            more = f", and {len(differ) - 1} more" if len(differ) > 1 else ""
            raise ValueError(
                f"z of {name!r} is {saved} in the state and {here} in this run{more}: give the weights the dtype that they "
                "were saved in, and convert_ the strategy (z of 16-bit linear weights is rounded with 'auto' and "
                "'two_products', not with 'fused' and 'slab')"
            )

    def add_param_group(self, param_group: dict) -> None:
        if getattr(self, "param_groups", None):
            raise NotImplementedError(
                "ElasticZO trains what convert_ decided: convert the model again to change the cut"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict:
        """Everything a run needs to go on bit for bit, beside the model's own state_dict.

        Taken between steps: what ``train_step(..., update=False)`` has accumulated is not in it.
        """
        trunk = plain_group({k: v for k, v in self.param_groups[0].items() if k != "params"})
        head = None if self.head_optimizer is None else self.head_optimizer.optimizer.state_dict()
        if head is not None:
            head["param_groups"] = [plain_group(group) for group in head["param_groups"]]
        return {
            "rng_version": self.rng_version,
            "strategies": strategy_hash(),
            "noise": dataclasses.asdict(self.noise),
            "queries": self.queries,
            "antithetic": self.antithetic,
            "scales": self.scales,
            "importance_rows": self.importance_rows,
            "node_perturbation": None
            if self.nodes is None
            else plain_group({k: v for k, v in self.nodes.group.items() if k != "params"}) | self.nodes.fixed(),
            "manifest": self._manifest(),
            "seed": self._seed.clone(),
            "step": self._step.clone(),
            "skipped": self.skipped.clone(),
            "trunk": trunk,
            "head": head,
            "head_optimizer": None if head is None else kind_of(self.head_optimizer.optimizer),
            "head_shapes": [list(p.shape) for p in self.head],
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from :meth:`state_dict`. A state made with another table of strategies is taken, with a warning.

        Raises:
            TypeError: no state at all.
            ValueError: a state of another noise contract, noise, model or cut, or values that cannot be; nothing is changed
                then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"a state is a dict, got {type(state_dict).__name__}")
        try:
            version, noise, queries = state_dict["rng_version"], state_dict["noise"], state_dict["queries"]
            manifest, trunk, head = state_dict["manifest"], state_dict["trunk"], state_dict["head"]
            tensors = [(getattr(self, "_" + k, None), state_dict[k]) for k in ("seed", "step")]
            tensors.append((self.skipped, state_dict["skipped"]))
        except KeyError as missing:
            raise ValueError(f"this is no state of ElasticZO: it lacks {missing}") from None
        if version != self.rng_version:
            raise ValueError(f"the state is of noise contract {version!r}, this run of {self.rng_version!r}")
        antithetic = state_dict.get("antithetic", True)  # what states from before this option were
        if (noise, queries, antithetic) != (dataclasses.asdict(self.noise), self.queries, self.antithetic):
            raise ValueError(
                f"the state is of noise {noise} with {queries} queries, antithetic={antithetic}, this run of "
                f"{dataclasses.asdict(self.noise)} with {self.queries}, antithetic={self.antithetic}"
            )
        self._check_manifest(manifest)
        if (theirs := state_dict.get("scales", {})) != self.scales:  # {} is what states from before this option were
            raise ValueError(f"the state is of scales {theirs} by site, this run of {self.scales}")
        if (theirs := state_dict.get("importance_rows")) != self.importance_rows:
            raise ValueError(f"the state is of importance_rows={theirs}, this run of {self.importance_rows}")
        nodes = state_dict.get("node_perturbation")
        check_nodes(self.nodes, nodes)
        if state_dict.get("head_shapes", shapes := [list(p.shape) for p in self.head]) != shapes:
            raise ValueError("the state is of a model with another head: its parameters have other shapes")
        for name, (mine, saved) in zip(("seed", "step", "skipped"), tensors, strict=True):
            kind = (saved.dtype, saved.shape) if isinstance(saved, torch.Tensor) else type(saved).__name__
            if kind != (mine.dtype, mine.shape):
                raise ValueError(f"{name} of the state must be {mine.dtype} {tuple(mine.shape)}, got {kind}")
        try:
            rate(trunk["lr"], "lr")
            number(trunk["eps"], "eps", least=0.0, strict=True)
            if trunk["clip"] is not None:
                number(trunk["clip"], "clip", least=0.0, strict=True, held=False)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the trunk's settings in the state are no settings: {error}") from None
        if (head is None) != (self.head_optimizer is None):
            raise ValueError("the state and this run do not both have a head")
        if head is not None:
            mine = kind_of(self.head_optimizer.optimizer)
            if (theirs := state_dict.get("head_optimizer", mine)) != mine:  # states from before it was kept lack it
                raise ValueError(f"the head's state in it is of {theirs}, none of {mine}, which this run has")
            try:
                self.head_optimizer.load_state_dict(head)
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"the head's state in it is none of {type(self.head_optimizer.optimizer).__name__}"
                ) from error
            last = [] if self.nodes is None else [self.nodes.group]
            self.param_groups[1:] = [*self.head_optimizer.optimizer.param_groups, *last]
        self.states_loaded += 1
        with torch.no_grad():
            for mine, saved in tensors:
                mine.copy_(saved)
        self.param_groups[0].update(trunk)
        if self.nodes is not None:
            self.nodes.group.update({k: v for k, v in nodes.items() if k not in self.nodes.fixed()})
        self._drop()
        made = state_dict.get("strategies", strategy_hash())  # states from before it was kept
        if made != strategy_hash():
            warnings.warn(
                f"the state was made with the strategies {made}, this run has {strategy_hash()}: on a GPU layers may be "
                "multiplied another way, and the last bits of the run that goes on may differ",
                RuntimeWarning,
                stacklevel=2,
            )

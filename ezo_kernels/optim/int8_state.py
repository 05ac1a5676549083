"""Saving and loading an integer optimiser, and the schedule of its bit widths."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..ops.int8_pass import sparse_noise
from ..ops.int8_update import check_bits
from ..ops.noise import check_index
from .state import Copies, plain_group


class Int8State(Copies):
    """state_dict and load_state_dict of :class:`ezo_kernels.ElasticZOInt8`."""

    def _identity(self) -> dict:
        """What a state must share with the run that goes on from it."""
        return {
            "rng_version": self.rng_version,
            "numerics_version": self.numerics_version,
            "queries": self.queries,
            "antithetic": self.antithetic,
            "loss": self.loss,
            "fraction_bits": self.fraction_bits,
            "head_grad": self.head_grad,
            "rounding": [self.rounding, self.head_rounding, self.activation_rounding],
            "manifest": [[s.site, list(s.names), list(s.shape), s.layout, s.z_dtype] for s in self.zo.manifest],
            "head": list(self._head),
        }

    @staticmethod
    def _as_manifest(theirs) -> list:
        """A state's manifest in lists, however it was saved."""
        try:
            return [[*row[:1], list(row[1]), list(row[2]), *row[3:]] for row in theirs]
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"the state's manifest is no list of sites: {error}") from None

    def state_dict(self) -> dict:
        """Everything a run needs to go on bit for bit, beside the model's own state_dict."""
        groups = [plain_group({k: v for k, v in group.items() if k != "params"}) for group in self.param_groups]
        tensors = {"seed": self._seed.clone(), "step": self._step.clone(), "skipped": self.skipped.clone()}
        remainders = {name: r.clone() for name, r in self._remainders.items()}
        return {**self._identity(), **tensors, "head_remainder": remainders, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            TypeError: no state at all.
            ValueError: a state of another contract, arithmetic, recipe, model or cut; nothing is changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"a state is a dict, got {type(state_dict).__name__}")
        own = self._identity()
        state_dict = {
            "antithetic": True,
            "head_remainder": {},
            **state_dict,
        }  # what states from before these options were
        missing = sorted(({*own, "seed", "step", "param_groups"}) - set(state_dict))
        if missing:
            raise ValueError(f"this is no state of ElasticZOInt8: it lacks {', '.join(missing)}")
        for name, mine in own.items():
            theirs = state_dict[name]
            if name == "manifest":
                theirs = self._as_manifest(theirs)
            if theirs != mine:
                shown = "" if name in ("manifest", "head") else f" ({theirs!r} is not {mine!r})"
                raise ValueError(f"the state is of another run: {name} differs{shown}")
        groups = state_dict["param_groups"]
        if (
            not isinstance(groups, (list, tuple))
            or len(groups) != len(self.param_groups)
            or not all(isinstance(group, Mapping) for group in groups)
            or any(set(g) != set(m) - {"params"} for g, m in zip(groups, self.param_groups, strict=True))
        ):
            raise ValueError("the state's param_groups are not those of ElasticZOInt8: the trunk's and the head's")
        try:
            for group in groups:
                check_bits(group["bits"], "bits")
            sparse_noise(self.rounds, groups[0]["p_zero"], groups[0]["r_max"])
        except TypeError as error:
            raise ValueError(f"the settings in the state are no settings: {error}") from None
        remainders = state_dict["head_remainder"]
        if not isinstance(remainders, Mapping):
            raise ValueError(f"head_remainder of the state must be a dict of tensors, got {type(remainders).__name__}")
        if set(remainders) != set(self._remainders):
            kept = ["with" if kept else "without" for kept in (remainders, self._remainders)]
            raise ValueError(
                f"the state is of another run: it was made {kept[0]} head_remainder, this run is {kept[1]}"
            )
        for name, value in remainders.items():
            mine = self._remainders[name]
            if not isinstance(value, torch.Tensor) or value.dtype != torch.int8 or value.shape != mine.shape:
                raise ValueError(f"head_remainder of {name} must be an int8 tensor of shape {tuple(mine.shape)}")
        tensors = {"seed": self._seed, "step": self._step, "skipped": self.skipped}
        saved = {name: state_dict[name] for name in tensors if name in state_dict}  # earlier states lack the last
        for name, value in saved.items():
            if not isinstance(value, torch.Tensor) or value.dtype != torch.int64 or value.numel() != 1:
                raise ValueError(f"{name} of the state must be an int64 tensor of one element, got {value!r}")
        self.states_loaded += 1
        with torch.no_grad():
            for name, value in saved.items():
                tensors[name].copy_(value.reshape(tensors[name].shape))
            for name, value in remainders.items():
                self._remainders[name].copy_(value)
        for group, theirs in zip(self.param_groups, groups, strict=True):
            group.update(theirs)

    def add_param_group(self, param_group: dict) -> None:
        if len(getattr(self, "param_groups", [])) >= 2:
            raise NotImplementedError(
                "ElasticZOInt8 trains what convert_ decided: convert the model again to change the cut"
            )
        super().add_param_group(param_group)


class IntegerSchedule:
    """Changes bit widths and noise at given steps: what a learning-rate schedule is to integers.

    Args:
        optimizer: an :class:`ezo_kernels.ElasticZOInt8`.
        milestones: step -> what changes there, of ``bits``, ``r_max``, ``p_zero`` and ``head_bits``. Call :meth:`step` after
            each step of the optimizer.

    Raises:
        TypeError, ValueError: an unknown name, a value out of range.
    """

    _TRUNK = ("bits", "r_max", "p_zero")

    def __init__(self, optimizer, milestones: dict[int, dict]) -> None:
        if not isinstance(optimizer, Int8State):
            raise TypeError(f"IntegerSchedule takes an ElasticZOInt8, got {type(optimizer).__name__}")
        if not isinstance(milestones, Mapping):
            raise TypeError(f"milestones must be a dict of steps, got {type(milestones).__name__}")
        self.optimizer, self.milestones, self.last_step = optimizer, dict(milestones), 0
        for at, changes in self.milestones.items():
            if isinstance(at, bool) or not isinstance(at, int) or not isinstance(changes, Mapping):
                raise TypeError(
                    f"a milestone is an int and a dict, got {type(at).__name__} {at} and {type(changes).__name__}"
                )
            unknown = set(changes) - {*self._TRUNK, "head_bits"}
            if unknown or at < 0:
                raise ValueError(
                    f"a milestone is a step and any of bits, r_max, p_zero, head_bits; got {at}: {changes}"
                )
            for name in ("bits", "head_bits"):
                if name in changes:
                    check_bits(changes[name], name)
            noise = {k: changes[k] for k in ("r_max", "p_zero") if k in changes}
            sparse_noise(**noise)
        trunk, head = optimizer.param_groups
        self._first = {**{name: trunk[name] for name in self._TRUNK}, "head_bits": head["bits"]}
        self._apply()

    def _apply(self) -> None:
        trunk, head = self.optimizer.param_groups
        for at in sorted(self.milestones):
            if at <= self.last_step:
                changes = self.milestones[at]
                trunk.update({k: v for k, v in changes.items() if k in self._TRUNK})
                if "head_bits" in changes:
                    head["bits"] = changes["head_bits"]

    def step(self) -> None:
        """One step of the optimizer was taken."""
        self.last_step += 1
        if self.last_step in self.milestones:
            self._apply()

    def state_dict(self) -> dict:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            TypeError, ValueError: no state of a schedule; nothing is changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"a state is a dict, got {type(state_dict).__name__}")
        if "last_step" not in state_dict:
            raise ValueError("this is no state of IntegerSchedule: it lacks last_step")
        self.last_step = check_index(state_dict["last_step"], "last_step of the state", 1 << 63)
        trunk, head = self.optimizer.param_groups
        trunk.update({name: self._first[name] for name in self._TRUNK})
        head["bits"] = self._first["head_bits"]
        self._apply()

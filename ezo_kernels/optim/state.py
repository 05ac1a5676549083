"""Saving and loading an optimiser: values go into the tensors that are there, never in their place."""

from __future__ import annotations

import dataclasses

import torch


class Copies:
    """deepcopy and pickle of an optimiser, which go with its model, and what a captured step asks of it."""

    def __getstate__(self) -> dict:
        # torch's own keeps its three attributes alone. "step" is there once a scheduler has wrapped it, around this object.
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    @property
    def capture_counters(self) -> dict[str, int] | None:
        """Captures, replays and eager steps of a captured step; None without one."""
        return None if self._captured is None else self._captured.counters()

    def _results(self, loss) -> tuple:
        return loss, self.losses, self.g

    def _took(self, results) -> None:
        _, self.losses, self.g = results
        self._opt_called = True  # torch's schedulers ask whether the optimizer stepped before them


class OptimizerState(Copies):
    """state_dict and load_state_dict of :class:`ElasticZO`."""

    def _manifest(self) -> list:
        return [(s.site, list(s.names), list(s.shape), s.layout, s.z_dtype) for s in self.zo.manifest]

    def add_param_group(self, param_group: dict) -> None:
        if getattr(self, "param_groups", None):
            raise NotImplementedError(
                "ElasticZO trains what convert_ decided: convert the model again to change the cut"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict:
        """Everything a run needs to go on bit for bit, beside the model's own state_dict."""
        trunk = {k: v for k, v in self.param_groups[0].items() if k != "params"}
        return {
            "rng_version": self.rng_version,
            "noise": dataclasses.asdict(self.noise),
            "queries": self.queries,
            "manifest": self._manifest(),
            "seed": self._seed.clone(),
            "step": self._step.clone(),
            "skipped": self.skipped.clone(),
            "trunk": trunk,
            "head": None if self.head_optimizer is None else self.head_optimizer.optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: a state of another noise contract, noise, model or cut; nothing is changed then.
        """
        try:
            version, noise, queries = state_dict["rng_version"], state_dict["noise"], state_dict["queries"]
            manifest, trunk, head = state_dict["manifest"], state_dict["trunk"], state_dict["head"]
            tensors = [(getattr(self, "_" + k, None), state_dict[k]) for k in ("seed", "step")]
            tensors.append((self.skipped, state_dict["skipped"]))
        except KeyError as missing:
            raise ValueError(f"this is no state of ElasticZO: it lacks {missing}") from None
        if version != self.rng_version:
            raise ValueError(f"the state is of noise contract {version!r}, this run of {self.rng_version!r}")
        if noise != dataclasses.asdict(self.noise) or queries != self.queries:
            raise ValueError(
                f"the state is of noise {noise} with {queries} queries, this run of {dataclasses.asdict(self.noise)} "
                f"with {self.queries}"
            )
        if [list(row) for row in manifest] != [list(row) for row in self._manifest()]:
            raise ValueError("the state is of another model, or of one converted with another head")
        if (head is None) != (self.head_optimizer is None):
            raise ValueError("the state and this run do not both have a head")
        if head is not None:
            self.head_optimizer.load_state_dict(head)
            self.param_groups[1:] = self.head_optimizer.optimizer.param_groups
        with torch.no_grad():
            for mine, saved in tensors:
                mine.copy_(saved)
        self.param_groups[0].update(trunk)
        self._drop()

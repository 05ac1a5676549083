"""A trial: all that decides one number of an experiment; and what it is filed under."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from ...ops._constants import INT8_VERSION
from ...ops.noise import rng_version
from ...optim import NodePerturbation
from ..cut import SIGNAL_BATCHES
from ..recipe import Recipe

#: what a trial does with its recipe: :mod:`.tasks` has a function of each name
TASKS = ("train", "validate", "bytes", "phases", "choice", "regression")
PROBES = ("g", "signs")
#: Options that recipes had not when the first files were made: at these values they are left out, so that those files hold.
LATER = {
    "scales": "", "head_remainder": False, "points": 128, "importance_rows": 0, "nodes": "", "node_lr": NodePerturbation.lr,
    "node_eps": NodePerturbation.eps, "node_damping": NodePerturbation.damping, "node_clip": 0.0, "freeze": "",
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One run of an experiment: pure data, so that a list of them can be compared, hashed and counted without running it.

    Args:
        arm: what the table and the plot call it; not part of what is hashed, so arms may share a trial.
        recipe: method, data, model, head, precision, rates, seed, epochs and batch; of the task ``regression`` a
            :class:`.regression.RegressionRecipe`.
        data: fingerprint of the data set: other files are other trials.
        task: ``train`` and validate, then test once, or ``validate`` alone; on tables ``regression``; ``bytes`` or ``phases``
            of a step; ``choice`` of a cut.
        x: where the arm's curve has it (eps, batch, ...); not hashed, either.
        max_steps: stop there; the schedule spans the recipe's epochs still.
        head_lrs: rates of the head, or of backpropagation, of which the validation split takes the best; none: the recipe's.
        eps_rule: ``balance`` computes eps before the first step (:mod:`.epsilon`) and overrides the recipe's.
        rotate: degrees by which all images are turned first, or None.
        start: a recipe that is trained on the upright images before; ``recipe`` goes on from its weights.
        probes: what is watched beside the losses, of :data:`PROBES`.
    """

    arm: str
    recipe: Recipe
    data: str
    task: str = "train"
    x: float | None = None
    max_steps: int | None = None
    head_lrs: tuple[float, ...] = ()
    eps_rule: str | None = None
    rotate: float | None = None
    start: Recipe | None = None
    probes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}: there are {', '.join(TASKS)}")
        if strangers := set(self.probes) - set(PROBES):
            raise ValueError(f"unknown probes {', '.join(sorted(strangers))}: there are {', '.join(PROBES)}")
        if self.eps_rule not in (None, "balance"):
            raise ValueError(f"eps_rule is {self.eps_rule!r}: None or 'balance'")
        if self.start is not None and (self.eps_rule or "int8" in (self.start.precision, self.recipe.precision)):
            raise ValueError("a start goes with floats and with an eps of its own: no eps_rule, no int8")

    def specification(self) -> dict:
        """All that decides the result, as JSON takes it, with the versions of noise and integer arithmetic."""
        values = asdict(self)
        for label in ("arm", "x"):
            del values[label]
        for recipe in filter(None, (values["recipe"], values["start"])):
            early = [name for name, value in LATER.items() if recipe.get(name) == value]
            # of a run without perturbed outputs nothing reads them
            unread = [] if recipe.get("nodes") else [name for name in recipe if name.startswith("node_")]
            for name in {*early, *unread}:
                del recipe[name]
        if self.task == "choice":
            values["signal_batches"] = SIGNAL_BATCHES
        values["rng_version"] = rng_version(self.recipe.rounds)
        values["numerics_version"] = INT8_VERSION if self.recipe.integer else None
        return json.loads(json.dumps(values))

    @property
    def key(self) -> str:
        """sha256 of the specification: another recipe, seed, data set or contract is another trial."""
        return hashlib.sha256(json.dumps(self.specification(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Finished:
    """A trial with what it gave: ``result`` is the same on every run, ``timings`` is not."""

    trial: Trial
    result: dict
    timings: dict

    @property
    def values(self) -> dict[str, float]:
        """All of its numbers by name."""
        found = {**self.result, **self.timings}
        return {k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}

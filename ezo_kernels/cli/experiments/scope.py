"""What a plan of trials is made for, and what an experiment is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..recipe import Recipe
from .recipes import best, best_int8, candidate, drawn, outputs, recipe
from .summary import Column
from .trial import Finished, Trial

#: steps of a trial under --quick, and its seeds
QUICK_STEPS, QUICK_SEEDS = 6, (0, 1)


@dataclass(frozen=True)
class Scope:
    """What a plan is made for: a data set, a seed, and how long.

    Args:
        data, fingerprint: name and hash of the data set; train_rows: its training images.
        seed, epochs: of every trial. quick: cut all of them to :data:`QUICK_STEPS` steps and sweeps to their ends.
        models: whose cuts are swept.
    """

    data: str
    fingerprint: str
    train_rows: int
    seed: int
    epochs: int
    quick: bool
    models: tuple[str, ...] = ("lenet5",)

    def trial(self, arm: str, recipe: Recipe, **options) -> Trial:
        """A trial of this scope; a quick one stops early."""
        if self.quick:
            options["max_steps"] = min(options.get("max_steps") or QUICK_STEPS, QUICK_STEPS)
        return Trial(arm, recipe, self.fingerprint, **options)

    def elastic(self, head: str, precision: str = "fp32", **options) -> Recipe:
        """ElasticZO's recipe at this scope."""
        return recipe(self.data, head, self.seed, options.pop("epochs", self.epochs), precision, **options)

    def best(self, head: str) -> Recipe:
        """The best recipe known in floats, at the forward passes of this scope's epochs with two a step."""
        return best(self.data, head, self.seed, self.epochs)

    def best_int8(self, head: str, loss: str) -> Recipe:
        """The same in integers, with a float or an integer loss."""
        return best_int8(self.data, head, self.seed, self.epochs, loss)

    def candidate(self, head: str, name: str) -> Recipe:
        """A candidate of the grid, at the same forward passes."""
        return candidate(self.data, head, self.seed, self.epochs, name)

    def drawn(self, head: str) -> Recipe:
        """The recipe on rows drawn by importance, at the same forward passes."""
        return drawn(self.data, head, self.seed, self.epochs)

    def outputs(self, head: str) -> Recipe:
        """The recipe with perturbed outputs, at the same forward passes."""
        return outputs(self.data, head, self.seed, self.epochs)

    def other(self, method: str, head: str = "", **options) -> Recipe:
        """The recipe of a method that ElasticZO is held against."""
        return Recipe(data=self.data, method=method, head=head, seed=self.seed, **{"epochs": self.epochs, **options})

    def ends(self, values: tuple) -> tuple:
        """A sweep: all of its values, or the first and the last one of a quick run."""
        return (values[0], values[-1]) if self.quick else values


@dataclass(frozen=True)
class Experiment:
    """A name, one line of help, the trials of a scope, and what is shown of them.

    Args:
        columns, plotted: of the printed table, and of the figure; x_label: of arms that are curves.
        refine: changes the summary's rows before they are shown, by what follows from several of them and the trials.
        notes: sentences that follow from the rows.
        epochs: of every trial unless said otherwise, of a full run.
        tables: takes tables of numbers (regression), not images.
    """

    name: str
    summary: str
    trials: Callable[[Scope], list[Trial]]
    columns: tuple[Column, ...]
    plotted: tuple[Column, ...]
    x_label: str = ""
    refine: Callable[[list[dict], list[Finished]], list[dict]] = lambda table, done: table
    notes: Callable[[list[dict]], list[str]] = lambda table: []
    epochs: int = 10
    tables: bool = False

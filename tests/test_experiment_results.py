"""The results of experiments that are committed: of the recipes that would be run, and what was chosen from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import int8_training
from ezo_kernels.cli.experiments.catalogue import EXPERIMENTS, LAYERS
from ezo_kernels.cli.experiments.recipes import BEST, GRID, HEAD_INT8, HEADS, LONG_INT8, PURE_INT8, best_int8
from ezo_kernels.cli.experiments.scope import Scope
from ezo_kernels.cli.experiments.trial import Trial
from ezo_kernels.cli.recipe import Recipe, parse_schedule

RESULTS = Path(__file__).resolve().parents[1] / "bench/results/experiments"


def test_an_option_that_came_later_leaves_the_files_before_it_valid():
    plain, scaled = (Trial("a", Recipe(scales=s), "") for s in ("", "conv1=2"))
    assert "scales" not in plain.specification()["recipe"] and scaled.specification()["recipe"]["scales"] == "conv1=2.0"
    started = Trial("a", Recipe(), "", start=Recipe()).specification()
    assert "scales" not in started["start"] and plain.key != scaled.key


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_committed_is_what_would_be_run(path):
    """A recipe that changed, or a key that is made in another way, would leave results that nobody's recipe gives."""
    name = path.stem.partition("_")[0]
    trials = json.loads(path.read_text())["trials"]
    found = set()
    for data, seed in {
        (t["specification"]["recipe"]["data"], t["specification"]["recipe"]["seed"]) for t in trials.values()
    }:
        own = [t for t in trials.values() if t["specification"]["recipe"]["data"] == data]
        scope = Scope(
            data, own[0]["specification"]["data"], 55_000, seed, EXPERIMENTS[name].epochs, False, tuple(LAYERS)
        )
        found |= {t.key for t in EXPERIMENTS[name].trials(scope)}
    assert set(trials) <= found


def test_the_recipes_are_the_grids_best():
    trials = json.loads((RESULTS / "grid.json").read_text())["trials"].values()
    told = (RESULTS.parents[2] / "docs/recipes.md").read_text()
    for head, candidates in GRID.items():
        errors = {}
        for name in candidates:
            arm = f"{HEADS[head]}, {name}"
            found = {
                t["specification"]["recipe"]["data"]: t["result"]["validation_error"] for t in trials if t["arm"] == arm
            }
            errors[name] = 100 * (found["mnist"] + found["fashion_mnist"]) / 2
            shown = f"**{name}**" if BEST[head] == name else name
            row = f"{100 * found['mnist']:.2f} | {100 * found['fashion_mnist']:.2f} | {errors[name]:.2f} |"
            assert f"| {head.replace(',', ', ').replace('0', 'none')} | {shown} | {row}" in told
        assert BEST[head] == min(errors, key=errors.get)
    assert not any("test_error" in t["result"] for t in trials)


@pytest.mark.parametrize("data", LONG_INT8)
@pytest.mark.parametrize(("head", "arm"), [("0", "pure"), ("fc3", "fc3"), ("fc2,fc3", "fc2,fc3")])
def test_long_runs_of_integers_have_the_schedule_of_their_evidence(data, head, arm):
    """That of a run of ten epochs leaves a third of MNIST's validation split after sixty-four."""
    options, milestones = int8_training.INT8[data][arm]
    ours = best_int8(data, head, 0, 64, "integer")
    short = best_int8(data, head, 0, 10, "integer")
    assert short.r_max == (PURE_INT8 if head == "0" else HEAD_INT8)["r_max"]
    assert ours.head_remainder == options.get("head_remainder", False)
    for name in ("r_max", "p_zero", "bits", "head_bits")[: 4 if head != "0" else 3]:
        kind = float if name == "p_zero" else int
        theirs = [(at, change[name]) for at, change in milestones.items() if name in change]
        assert parse_schedule(getattr(ours, name), name, kind) == [(0.0, options[name]), *theirs]

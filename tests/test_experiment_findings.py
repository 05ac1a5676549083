"""What experiments conclude from several trials: rank of a computed eps, elbow, regret of a chosen cut, ratios of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ezo_kernels as ezo
from ezo_kernels.cli.cut import first_batch
from ezo_kernels.cli.experiments import findings, tasks
from ezo_kernels.cli.experiments.catalogue import EXPERIMENTS, LAYERS
from ezo_kernels.cli.experiments.scope import Scope
from ezo_kernels.cli.experiments.summary import number, summarise
from ezo_kernels.cli.experiments.trial import Finished, Trial
from ezo_kernels.cli.recipe import Recipe
from ezo_kernels.cli.run import build_model
from ezo_kernels.data import load
from ezo_kernels.planning import choose_cut

CPU = torch.device("cpu")


def done(arm, x, seed, result, task="train"):
    recipe = Recipe(data="digits", seed=seed, lr=1e-4 * (1 + (x or 0)))
    return Finished(Trial(arm, recipe, "", x=x, task=task), {"curve": [], **result}, {})


# ---- epsilon


def sweep(seed, errors, computed, eps):
    out = [done("sweep", x, seed, {"validation_error": error}) for x, error in errors.items()]
    return [*out, done("computed", None, seed, {"validation_error": computed, "eps": eps})]


def test_the_computed_eps_has_a_rank_in_each_seeds_sweep():
    ones = sweep(0, {1e-4: 0.5, 1e-3: 0.2, 1e-2: 0.3}, 0.25, 4e-3) + sweep(
        1, {1e-4: 0.6, 1e-3: 0.4, 1e-2: 0.3}, 0.2, 2e-3
    )
    table = summarise(ones)
    out = findings.place_computed(table, ones)
    assert all("rank" not in row["metrics"] for row in table)
    row = next(row for row in out if row["arm"] == "computed")
    m = row["metrics"]
    assert row["x"] == pytest.approx(3e-3) and m["rank"]["mean"] == 1.5 and m["rank"]["n"] == 2  # 2nd, then 1st
    assert m["behind_best"]["mean"] == pytest.approx((0.05 - 0.1) / 2)
    assert m["eps_of_best"]["mean"] == pytest.approx((1e-3 + 1e-2) / 2)
    ranks = {row["x"]: row["metrics"]["rank"]["mean"] for row in out if row["arm"] == "sweep"}
    assert ranks == {1e-4: 3.0, 1e-3: 1.5, 1e-2: 1.5}
    (said,) = findings.say_rank(out)
    assert "has rank 1.5 of 4" in said and "-2.50 points" in said


def test_an_unfinished_sweep_has_no_rank_but_a_table():
    ones = [done("computed", None, 0, {"validation_error": 0.3, "eps": 1e-3})]
    out = findings.place_computed(summarise(ones), ones)
    assert out[0]["x"] == 1e-3 and "rank" not in out[0]["metrics"] and findings.say_rank(out) == []


# ---- partition


def cuts_of(seed, errors, chosen, sizes=(100, 101, 110, 150, 200, 300)):
    out = [
        done("lenet5", n, seed, {"validation_error": e, "test_error": e + 0.01, "step_bytes": sizes[n]})
        for n, e in enumerate(errors)
    ]
    return [*out, done("lenet5, choose_cut", None, seed, {"chosen_layers": chosen}, task="choice")]


def test_regret_stands_beside_the_last_layer_and_a_random_cut():
    ones = cuts_of(0, (0.9, 0.5, 0.2, 0.1, 0.1, 0.1), 1) + cuts_of(1, (0.9, 0.5, 0.2, 0.12, 0.1, 0.11), 3)
    out = findings.judge_cuts(summarise(ones), ones)
    (row,) = [row for row in out if row["arm"] == "lenet5, choose_cut"]
    m = row["metrics"]
    assert m["regret_chosen"]["mean"] == pytest.approx((0.4 + 0.02) / 2) and m["regret_chosen"]["n"] == 2
    assert m["regret_last"]["mean"] == pytest.approx(0.4)
    assert m["regret_random"]["mean"] == pytest.approx(((1.9 / 6 - 0.1) + (1.93 / 6 - 0.1)) / 2)
    chosen = {row["x"]: row["metrics"]["chosen"]["mean"] for row in out if row["x"] is not None}
    assert chosen == {0: 0, 1: 0.5, 2: 0, 3: 0.5, 4: 0, 5: 0}
    assert sum(row["metrics"].get("elbow", {}).get("mean", 0) for row in out) == 1
    said = findings.say_cuts(out)
    assert any("choose_cut 21.00, always the last layer 40.00" in line for line in said)


@pytest.mark.parametrize("beyond, word", [(0.15, "more than a little"), (0.01, " little")])
def test_what_is_gained_beyond_the_last_two_layers_is_said(beyond, word):
    ones = cuts_of(0, (0.9, 0.5, 0.2, 0.2, 0.2 - beyond, 0.2), 2)
    out = findings.judge_cuts(summarise(ones), ones)
    m = next(row["metrics"] for row in out if row["x"] == 2)
    assert m["beyond"]["mean"] == pytest.approx(beyond)
    assert m["beyond_share"]["mean"] == pytest.approx(beyond / 0.2)
    assert any(f"lenet5:{word if word[0] == ' ' else ' ' + word} is gained beyond" in s for s in findings.say_cuts(out))


def test_models_and_data_are_judged_apart():
    other = [
        Finished(
            Trial("mlp", Recipe(data="digits", model="mlp"), "", x=n), {"test_error": 0.1, "validation_error": e}, {}
        )
        for n, e in enumerate((0.5, 0.4))
    ]
    ones = cuts_of(0, (0.9, 0.5, 0.2, 0.1, 0.1, 0.1), 1)
    out = findings.judge_cuts(summarise(ones + other), ones + other)
    assert all("elbow" not in row["metrics"] for row in out if row["arm"] == "mlp")
    alone = findings.judge_cuts(summarise(ones), ones)
    assert [r for r in out if r["arm"] != "mlp"] == alone


def test_the_sweep_is_of_every_cut_of_every_model():
    trials = EXPERIMENTS["partition"].trials(Scope("mnist", "", 55_000, 0, 10, False, ("lenet5", "mlp", "pointnet")))
    for model, layers in LAYERS.items():
        own = [t for t in trials if t.recipe.model == model]
        assert [t.recipe.head for t in own if t.task == "train"] == [*map(str, range(layers)), "all"]
        assert [t.task for t in own].count("choice") == 1
        modules = build_model(Recipe(model=model), CPU).modules()
        assert sum(isinstance(m, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)) for m in modules) == layers


def test_epochs_are_those_asked_for():
    def epochs(name, n):
        scope = Scope("mnist", "", 55_000, 0, n, False, ("mlp", "pointnet"))
        return {(t.recipe.model, t.recipe.epochs) for t in EXPERIMENTS[name].trials(scope)}

    assert EXPERIMENTS["pointcloud"].epochs == 1 and epochs("pointcloud", 5) == {("pointnet", 5)}
    assert epochs("partition", 25) == {("mlp", 25), ("pointnet", 3)}


def test_the_choice_is_that_of_choose_cut_on_the_first_batches():
    data = load("digits")
    recipe = Recipe(data="digits", model="mlp", hidden="16", head="0", seed=3)
    result, timings = tasks.choose(Trial("a", recipe, "", task="choice"), data, CPU, lambda: None)
    x, y = ezo.data.standardize(data.x_train[:32], "digits"), torch.from_numpy(data.y_train[:32])
    rows = ezo.data.standardize(data.x_train[:512], "digits"), torch.from_numpy(data.y_train[:512])
    own = choose_cut(build_model(recipe, CPU), (x, y), signal_sample=rows, seed=3, time_step=lambda step: 0.1)
    assert (
        result["signal_rows"] == 512 and Trial("a", recipe, "", task="choice").specification()["signal_batches"] == 16
    )
    assert result["chosen_layers"] == own.layers and [c["gain"] for c in result["cuts"]] == [r.gain for r in own.rows]
    assert (
        len(timings["step_ms_of_cuts"]) == 3
        and result == tasks.choose(Trial("a", recipe, ""), data, CPU, lambda: None)[0]
    )
    with pytest.raises(ValueError, match="a batch of 5000 out of 1297"):
        first_batch(Recipe(data="digits", batch=5000), data, CPU)


# ---- memory


def bytes_of(arm, step, paper=None, planned=None):
    result = {"step_bytes": step, "planned_over_measured": (planned or step) / step}
    return done(arm, None, 0, result | ({} if paper is None else {"paper_bytes": paper}), task="bytes")


def test_ratios_of_bytes():
    ones = [
        bytes_of("batch 32: full ZO, fp32, sequential", 100, 200),
        bytes_of("batch 32: ElasticZO, fp32, sequential", 120, 210, planned=121),
        bytes_of("batch 32: full BP, fp32", 240, 420),
        bytes_of("batch 32: frozen trunk, head fc3, fp32", 90),
        bytes_of("batch 256: full ZO, fp32, sequential", 1000, 1000),
    ]
    out = {row["arm"]: row["metrics"] for row in findings.against_full_zo(summarise(ones), ones)}
    elastic = out["batch 32: ElasticZO, fp32, sequential"]
    assert elastic["step_bytes_over_full_zo"]["mean"] == 1.2 and elastic["paper_bytes_over_full_zo"]["mean"] == 1.05
    assert elastic["full_bp_over"]["mean"] == 2.0 and elastic["paper_full_bp_over"]["mean"] == 2.0
    frozen = out["batch 32: frozen trunk, head fc3, fp32"]
    assert frozen["step_bytes_over_full_zo"]["mean"] == 0.9 and "paper_bytes_over_full_zo" not in frozen
    assert out["batch 256: full ZO, fp32, sequential"]["step_bytes_over_full_zo"]["mean"] == 1.0
    some = {row["arm"]: row["metrics"] for row in findings.against_full_zo(summarise(ones[1:]), ones[1:])}
    alone = some["batch 32: ElasticZO, fp32, sequential"]
    assert "step_bytes_over_full_zo" not in alone and alone["full_bp_over"]["mean"] == 2.0
    (said,) = findings.say_planned(summarise(ones))
    assert "5 arms: within 0.833% of 1" in said and findings.say_planned([]) == []


@pytest.mark.parametrize("precision, mode", [("fp32", "sequential"), ("int8", "stacked"), ("int8", "sequential")])
def test_planned_bytes_are_the_measured_ones(precision, mode):
    data = load("digits")
    for method, head in (("elastic", "0"), ("elastic", "fc2,fc3"), ("frozen", "fc3"), ("bp", "all")):
        if method != "elastic" and precision == "int8":
            continue
        recipe = Recipe(data="digits", method=method, head=head, precision=precision, mode=mode, batch=16)
        result, _ = tasks.count_bytes(Trial("a", recipe, "", task="bytes"), data, CPU, lambda: None)
        assert result["planned_over_measured"] == pytest.approx(1, abs=0.01)
        assert ("paper_bytes" in result) == (method != "frozen")


def test_numbers_that_nobody_would_count_are_short():
    assert number(1234.5678, 2) == "1,234.57" and number(5.9e50, 3) == "5.9e+50" and number(-2e12, 0) == "-2.0e+12"


# ---- docs/cut.md


def test_the_regret_in_the_docs_is_the_files():
    root = Path(__file__).parents[1]
    said = (root / "docs/cut.md").read_text(encoding="utf-8").split("## Regret")[1]
    record = json.loads((root / "bench/results/experiments/partition.json").read_text())
    assert not record["quick"]
    for shown, model in (("LeNet-5", "lenet5"), ("MLP", "mlp")):
        cuts = [row for row in record["table"] if row["data"] == "digits" and row["arm"] == model]
        (choice,) = [row for row in record["table"] if row["data"] == "digits" and row["arm"] == f"{model}, choose_cut"]
        errors = ", ".join(f"{100 * row['metrics']['validation_error']['mean']:.2f}" for row in cuts)
        trials = [t for t in record["trials"].values() if t["arm"] == f"{model}, choose_cut"]
        by_seed = {t["specification"]["recipe"]["seed"]: t["result"]["chosen_layers"] for t in trials}
        regrets = [f"{100 * choice['metrics'][f'regret_{name}']['mean']:.2f}" for name in ("chosen", "last", "random")]
        (elbow,) = [row["x"] for row in cuts if row["metrics"]["elbow"]["mean"] == 1]
        two = cuts[2]["metrics"]
        beyond = f"{100 * two['beyond']['mean']:.2f} points, {100 * two['beyond_share']['mean']:.0f}% of the error"
        chosen = ", ".join(str(by_seed[seed]) for seed in choice["seeds"])
        assert f"| {shown} | {errors} | {chosen} | {' | '.join(regrets)} | {elbow} | {beyond} |" in said


def test_a_run_has_converged_when_its_error_stays_near_the_last():
    curve = [{"step": 10 * (i + 1), "validation_accuracy": a} for i, a in enumerate((0.5, 0.8, 0.7, 0.792, 0.805, 0.8))]
    assert findings.converged_step(curve, 60) == 40 and findings.converged_step(curve[:2], 60) == 20
    assert findings.converged_step([], 6) == 6

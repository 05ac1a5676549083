"""``ezo experiment``: each runs in its quick form, stops and goes on without a trace, and refuses what is not its own."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import ezo_kernels as ezo
from ezo_kernels.cli import main
from ezo_kernels.cli.experiments import catalogue, epsilon, findings, plot, probes, tasks
from ezo_kernels.cli.experiments import run as runner
from ezo_kernels.cli.experiments.catalogue import EXPERIMENTS
from ezo_kernels.cli.experiments.recipes import GRID
from ezo_kernels.cli.experiments.scope import QUICK_STEPS, Scope
from ezo_kernels.cli.experiments.summary import Column, summarise, text
from ezo_kernels.cli.experiments.trial import Finished, Trial
from ezo_kernels.cli.recipe import Recipe
from ezo_kernels.cli.run import Run, data_for
from ezo_kernels.data import load
from ezo_kernels.planning.tally import paper_bytes

CPU = torch.device("cpu")
SPLITS = ("train", "valid", "test")
#: experiments whose tables end in sentences
SAYING = ("epsilon", "memory", "partition")


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def numbers(path) -> dict:
    """What has to be the same on every run: specification and result of every trial by key."""
    trials = json.loads(path.read_text())["trials"]
    return {key: (t["specification"], t["result"]) for key, t in trials.items()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(name, quick, tmp_path):
    code, out, err = quick(name, "--seeds", 0)
    assert code == 0, err
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["quick"] is True and found["experiment"] == name and "QUICK" in out
    scope = Scope("digits", "", 1297, 0, 1, True)
    arms = {t.arm for t in EXPERIMENTS[name].trials(scope)}
    assert {row["arm"] for row in found["table"]} == arms and all(arm in out for arm in arms)
    for trial in found["trials"].values():
        assert all(math.isfinite(v) for v in trial["result"].values() if isinstance(v, float))
        assert trial["environment"]["torch"] and trial["specification"]["rng_version"]
    shown = {column.name for column in EXPERIMENTS[name].columns}
    assert shown <= {n for row in found["table"] for n in row["metrics"]}
    assert all(note in out for note in found["notes"]) and bool(found["notes"]) == (name in SAYING)
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    before = numbers(tmp_path / f"{name}.json")
    code, out, _ = quick(name, "--seeds", 0)
    assert code == 0 and "0 to run" in out and numbers(tmp_path / f"{name}.json") == before


def test_stopped_and_restarted_is_as_undisturbed(quick, tmp_path, monkeypatch):
    code, _, err = quick("epsilon", "--out", tmp_path / "whole")
    assert code == 0, err
    calls, train = [], tasks.train

    def dies(trial, data, device, after_step):
        def step():
            calls.append(1)
            if len(calls) == 2 * QUICK_STEPS + 3:  # in the middle of the third of six trials
                raise OSError("the power went")
            after_step()

        return train(trial, data, device, step)

    monkeypatch.setitem(tasks.RUN, "train", dies)
    code, _, err = quick("epsilon", "--out", tmp_path / "cut")
    assert code == 2 and "the power went" in err
    assert len(numbers(tmp_path / "cut" / "epsilon.json")) == 2
    monkeypatch.setitem(tasks.RUN, "train", train)
    code, out, _ = quick("epsilon", "--out", tmp_path / "cut")
    assert code == 0 and "2 trials are there, 4 to run" in out
    whole, cut = (numbers(tmp_path / name / "epsilon.json") for name in ("whole", "cut"))
    assert list(whole) == list(cut) and whole == cut
    timed = {"seconds", "step_ms"}
    tables = []
    for name in ("whole", "cut"):
        table = json.loads((tmp_path / name / "epsilon.json").read_text())["table"]
        tables.append([{**r, "metrics": {k: v for k, v in r["metrics"].items() if k not in timed}} for r in table])
    assert tables[0] == tables[1]


def test_arms_by_name_add_to_the_same_file(quick, tmp_path):
    code, out, err = quick("baseline", "--arms", "full ZO, int8", "frozen", "--seeds", 0)
    assert code == 0, err
    arms = {t["arm"] for t in json.loads((tmp_path / "baseline.json").read_text())["trials"].values()}
    assert len(arms) == 4 and all("full ZO, int8" in arm or "frozen" in arm for arm in arms)
    code, out, err = quick("baseline", "--arms", "full ZO", "--seeds", 0)
    assert code == 0 and "2 trials are there, 1 to run" in out, err


def test_arms_are_at_equal_forwards():
    scope = Scope("mnist", "", 55000, 0, 64, False)
    plan = {t.arm: t.recipe for t in EXPERIMENTS["baseline"].trials(scope)}
    elastic = [r for r in plan.values() if r.method == "elastic"]
    assert len(elastic) == 9
    assert {r.epochs * r.queries * (1 + r.antithetic) for r in elastic} == {128}
    for head in ("fc3", "fc2,fc3"):
        frozen = next(r for r in plan.values() if r.method == "frozen" and r.head == head)
        ours = next(r for r in elastic if r.head == head and not r.integer)
        assert frozen.epochs == ours.epochs and frozen.batch == ours.batch  # as many steps


def test_a_file_that_is_not_ours_is_refused_and_left_alone(quick, tmp_path):
    path = tmp_path / "memory.json"
    ours = {"format": "ezo-experiment-1", "experiment": "memory", "quick": True, "trials": {}}
    for content, said in (
        ('{"format": "ezo-experi', "corrupt"),
        ("[1, 2]", "not a file of the format ezo-experiment-1"),
        ('{"runs": []}', "not a file of the format ezo-experiment-1"),
        (json.dumps({**ours, "experiment": "noise"}), "holds the experiment 'noise', not 'memory'"),
        (json.dumps({**ours, "quick": False}), "cannot be mixed"),
        (json.dumps({**ours, "trials": {"a": {"arm": "x"}}}), "corrupt: its trials have no result"),
    ):
        path.write_text(content)
        code, out, err = quick("memory")
        assert code == 2 and out == "" and err.count("\n") == 1 and said in err and str(path) in err
        assert path.read_text() == content
    path.write_bytes(b"\xff\xfe\x00")
    assert "corrupt" in quick("memory")[2]


def test_bad_options_are_one_line(quick, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "held" / "memory.json").mkdir(parents=True)
    (tmp_path / "drawn" / "memory.png").mkdir(parents=True)
    for argv, said in (
        (["memory", "--out", tmp_path / "file"], "cannot be made: there is a file of that name"),
        (["memory", "--out", tmp_path / "drawn"], "memory.png: is a folder"),
        (["memory", "--out", tmp_path / "new", "--data", "mnist", "--data-dir", tmp_path / "nothing"], "nothing"),
        (["memory", "--data-dir", tmp_path], "the digits are scikit-learn's"),
        (["memory", "--csv", tmp_path / "t.csv"], "--csv goes with the experiment regression"),
        (["memory", "--data", "diabetes"], "goes with the experiment regression"),
        (["batch", "--models", "mlp"], "--models goes with the experiment partition"),
        (["memory", "--out", tmp_path / "held"], "is a folder"),
        (["memory", "--threads", 0], "--threads is 0"),
        (["memory", "--seeds", -1], "seed is -1"),
        (["baseline", "--epochs", 0], "epochs is 0"),
        (["baseline", "--arms", "fp32", "nobody"], "--arms nobody: in no arm's name; there are full ZO, fp32"),
        (["baseline", "--arms", ""], "--arms '': in no arm's name"),
        (["memory", "--data", "mnist", "--data-dir", tmp_path / "nothing"], "nothing"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ):
        code, _, err = quick(*argv)
        assert code == 2 and err.startswith("ezo: error: ") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "new").exists()  # refused before anything was made
    with pytest.raises(SystemExit):
        main(["experiment", "--help"])
    listed = capsys.readouterr().out
    for experiment in EXPERIMENTS.values():
        assert f"  {experiment.name} " in listed and experiment.summary in listed


def test_without_matplotlib_the_plot_is_left_out_and_said_so(quick, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot.available()
    code, out, _ = quick("batch", "--seeds", 0)
    assert code == 0 and "no plot: matplotlib is missing" in out
    assert not (tmp_path / "batch.png").exists() and (tmp_path / "batch.json").exists()


def test_key_is_of_everything_but_labels():
    trial = Trial("a", Recipe(), "0123")
    others = {
        "task": "bytes",
        "data": "4567",
        "max_steps": 3,
        "head_lrs": (0.1,),
        "eps_rule": "balance",
        "probes": ("g",),
        "rotate": 9.0,
        "start": Recipe(method="bp"),
    }
    assert {f.name for f in fields(Trial)} == {"arm", "x", "recipe", *others}
    changed = [replace(trial, **{name: value}) for name, value in others.items()]
    changed.append(replace(changed[-1], start=Recipe(method="bp", seed=1)))
    changed += [replace(trial, recipe=Recipe(seed=1)), replace(trial, recipe=Recipe(lr=1e-5))]
    assert len({trial.key, *(t.key for t in changed)}) == len(changed) + 1
    assert replace(trial, arm="b", x=2.0).key == trial.key
    assert Trial("a", Recipe(precision="int8"), "").specification()["numerics_version"]
    for bad in (
        {"task": "sing"},
        {"probes": ("h",)},
        {"eps_rule": "guess"},
        {"eps_rule": "balance", "start": Recipe()},
    ):
        with pytest.raises(ValueError):
            replace(trial, **bad)


def test_the_grid_never_sees_the_test_images(monkeypatch, quick):
    monkeypatch.setattr("ezo_kernels.cli.run.Run.test", lambda self: 1 / 0)
    code, out, err = quick("grid", "--seeds", 0)
    assert code == 0, err
    assert "test error" not in out
    assert len({len(candidates) for candidates in GRID.values()}) == 1  # as many for each arm


def test_the_fingerprint_sees_one_pixel(digits):
    x = digits.x_test.copy()
    x[-1, 5, 5] ^= 1
    assert runner.fingerprint(digits) != runner.fingerprint(replace(digits, x_test=x))


def test_rates_are_chosen_on_validation_and_the_test_set_is_read_once(digits, monkeypatch):
    asked = []
    monkeypatch.setattr(Run, "test", lambda run: asked.append(run.recipe.head_lr) or 0.25)
    monkeypatch.setattr(Run, "validate", lambda run: {0.02: 0.5, 0.1: 0.7, 0.4: 0.6}[run.recipe.head_lr])
    recipe = Recipe(data="digits", method="frozen", head="fc3", epochs=1)
    trial = Trial("frozen", recipe, "", max_steps=2, head_lrs=(0.02, 0.1, 0.4))
    result, _ = tasks.train(trial, digits, CPU, lambda: None)
    assert asked == [0.1] and result["head_lr"] == 0.1 and result["test_error"] == 0.75
    assert [round(t["validation_error"], 3) for t in result["tried"]] == [0.5, 0.3, 0.4]


def test_mean_and_spread_over_seeds():
    def done(arm, seed, error):
        return Finished(Trial(arm, Recipe(seed=seed), ""), {"test_error": error, "curve": []}, {"seconds": 2.0})

    table = summarise([done("a", 0, 0.1), done("b", 0, 0.5), done("a", 1, 0.3)])
    assert [(row["arm"], row["seeds"]) for row in table] == [("a", [0, 1]), ("b", [0])]
    found = table[0]["metrics"]["test_error"]
    assert found["mean"] == pytest.approx(0.2) and found["spread"] == pytest.approx(0.1 * 2**0.5) and found["n"] == 2
    assert table[1]["metrics"]["test_error"]["spread"] is None
    shown = text(table, (Column("test_error", "error, %", 100), Column("absent", "nothing")))
    assert "20.00 ± 14.14" in shown and "nothing" not in shown


def test_the_papers_equations():
    model = ezo.models.LeNet5()
    x, many = torch.zeros(32, 1, 28, 28), torch.zeros(256, 1, 28, 28)
    full = paper_bytes(model, x, 0)
    assert full == 2_742_568 and paper_bytes(model, many, 0) == 18_922_536
    assert paper_bytes(model, x, 0, integer=True) == 1_716_554
    assert paper_bytes(model, many, "all") == 2 * 18_922_536
    # overheads that the abstract and its reading give: 0.171 and 2.44%, 0.072%; 1.67% in integers
    assert paper_bytes(model, x, "fc3") / full == pytest.approx(1.00171, abs=5e-6)
    assert paper_bytes(model, x, ["fc2", "fc3"]) / full == pytest.approx(1.0244, abs=5e-5)
    assert paper_bytes(model, x, 2, integer=True) / 1_716_554 == pytest.approx(1.0167, abs=6e-5)
    with pytest.raises(ValueError, match="no module 'fc9'"):
        paper_bytes(model, x, "fc9")


def test_balanced_eps_is_where_the_error_is_least(digits):
    def error(eps, r, t):
        return eps**4 * t**2 / 36 + r**2 / (4 * eps**2)

    eps = epsilon.balance(1e-7, 3.0)
    assert all(error(eps, 1e-7, 3.0) < error(eps * f, 1e-7, 3.0) for f in (0.9, 0.99, 1.01, 1.1))
    recipe = Recipe(data="digits", head="0")
    found = epsilon.balanced_eps(recipe, digits, CPU)
    assert found == epsilon.balanced_eps(recipe, digits, CPU)
    # rounding in fp32 of a loss near 2.3 is a few units in its last place
    assert 1e-9 < found["rounding_rms"] < 1e-5 and 1e-5 < found["eps"] < 1e-1
    with pytest.raises(ValueError, match="no trunk"):
        epsilon.balanced_eps(replace(recipe, head="all"), digits, CPU)


def test_third_derivative_of_a_cubic_is_found(digits, monkeypatch):
    """On a model whose loss is known: sum over weights of w^3 has T = 6 sum z^3 along z."""
    monkeypatch.setattr(epsilon, "loss_fn", lambda out, y: out.sum())
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda out, y: out.sum())

    class Cubic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.fc(torch.eye(3, dtype=self.fc.weight.dtype)) ** 3

    monkeypatch.setattr(epsilon, "build_model", lambda recipe, device: Cubic())
    found = epsilon.balanced_eps(Recipe(data="digits", head="0"), digits, CPU)
    # E (6 sum z^3)^2 = 36 * 9 * 15 for gaussian z: within the noise of 16 directions
    assert 0.4 < found["third_rms"] / (36 * 9 * 15) ** 0.5 < 2.0


def test_elbow_is_farthest_below_the_chord():
    def row(x, size, error):
        one = {"spread": None, "n": 1}
        return {
            "data": "d", "arm": "a", "x": x, "seeds": [0],
            "metrics": {"step_bytes": {"mean": size, **one}, "validation_error": {"mean": error, **one}},
        }  # fmt: skip

    table = [row(0, 100, 0.5), row(1, 110, 0.12), row(2, 150, 0.10), row(5, 200, 0.05)]
    marked = findings.mark_elbow(table)
    assert [r["metrics"]["elbow"]["mean"] for r in marked] == [0, 1, 0, 0] and "elbow" not in table[0]["metrics"]
    assert "elbow" not in findings.mark_elbow(table[:2])[0]["metrics"]


def test_adapting_goes_on_from_the_start_on_turned_images(digits, monkeypatch):
    seen = []
    take = Run._take_step

    def watched(run, x, y):
        seen.append((run.recipe.method, run.data.x_test.copy(), [p.detach().clone() for p in run.model.parameters()]))
        take(run, x, y)

    monkeypatch.setattr(Run, "_take_step", watched)
    start = Recipe(data="digits", method="bp", epochs=1)
    trial = Trial("a", Recipe(data="digits", epochs=1), "", max_steps=2, rotate=90.0, start=start)
    result, _ = tasks.train(trial, digits, CPU, lambda: None)
    assert [method for method, _, _ in seen] == ["bp", "bp", "elastic", "elastic"]
    upright, turned = seen[0][1], seen[2][1]
    assert (upright == digits.x_test).all() and (turned == np.rot90(upright, 1, (1, 2))).all()
    # the second step of the start has moved the weights that the adaptation then begins with, once more
    assert not all(torch.equal(a, b) for a, b in zip(seen[0][2], seen[2][2], strict=True))
    alone = Run(start, digits, CPU)
    alone.train(2)
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), seen[2][2], strict=True))
    assert 0 <= result["start_validation_error"] <= 1


def test_pointnet_sees_clouds_and_its_last_two_layers_are_one_head(digits):
    small = replace(digits, **{f"{k}_{split}": getattr(digits, f"{k}_{split}")[:40] for split in SPLITS for k in "xy"})
    recipe = Recipe(model="pointnet", data="digits", batch=8, epochs=1)
    assert recipe.head == "2" and Recipe(model="pointnet", method="bp").head == "all"
    for precision in ("fp32", "int8"):
        own = replace(recipe, precision=precision, p_zero="")
        run = Run(own, data_for(own, small), CPU)
        assert run.tensors("train")[0].shape == (40, 3, 128)
        run.train(1)
        assert 0 <= run.validate() <= 1
    # coordinates are in the unit sphere: int8 with 7 bits behind the point
    exact = torch.from_numpy(run.data.x_train)
    assert (run.tensors("train")[0].dequantize() - exact).abs().max() <= 2**-7
    assert data_for(Recipe(data="digits"), small) is small
    assert data_for(replace(recipe, points=16), small).x_train.shape == (40, 3, 16)


def test_batches_at_equal_steps_take_the_same_steps():
    trials = EXPERIMENTS["batch"].trials(Scope("mnist", "", 55_000, 0, 10, False))
    steps = {runner.steps_of(t, 55_000) for t in trials if t.arm == "equal steps"}
    assert steps == {10 * (55_000 // 32)} and {t.x for t in trials} == set(catalogue.BATCHES)
    samples = {t.recipe.epochs for t in trials if t.arm == "equal samples"}
    assert samples == {10}


def test_sign_counter_counts_every_fourth_and_changes_nothing():
    def trained(kind):
        model = ezo.models.LeNet5(generator=torch.Generator().manual_seed(0))
        opt = kind(ezo.convert_(model, head=["fc3"], precision="int8"), seed=0, queries=2)
        generator = torch.Generator().manual_seed(1)
        for _ in range(8):
            x = ezo.quantize(torch.rand(8, 1, 28, 28, generator=generator))
            opt.train_step(x, torch.randint(10, (8,), generator=generator))
        return opt, model.state_dict()

    opt, counted = trained(probes.SignCounter)
    _, plain = trained(ezo.ElasticZOInt8)
    assert opt.pairs == 2 * 2 and all(torch.equal(counted[name], plain[name]) for name in plain)
    assert set(opt.agreement) == {0, 2, 4, 8} and 0 <= opt.agreement[0] <= opt.agreement[8] == 1.0


def test_variance_of_g_is_that_of_its_second_half():
    trace = probes.GradientTrace()
    trace.pairs = [torch.tensor([[100.0, 0.0]])] * 2 + [torch.tensor([[d, 0.0]]) for d in (1.0, 3.0)]
    assert trace.statistics(0.5) == {"g_variance": 2.0, "g_mean_square": 5.0}


def test_shares_of_a_step_add_up(digits):
    for recipe in (Recipe(data="digits"), Recipe(data="digits", method="bp"), Recipe(data="digits", precision="int8")):
        result, timings = tasks.phases(Trial("a", recipe, "", task="phases", max_steps=3), digits, CPU, lambda: None)
        shares = {name: value for name, value in timings.items() if name.startswith("share_")}
        assert result["timed_steps"] == 3 and sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
        assert {"share_forward", "share_loss", "share_other"} <= set(shares)
        heads = {"share_head_backward", "share_head_update", "share_update", "share_g"}
        assert set(shares) - {"share_forward", "share_loss", "share_other"} == (
            {"share_backward_and_update"} if recipe.method == "bp" else heads
        )
    with pytest.raises(ValueError, match="more than 3 are needed"):
        tasks.phases(Trial("a", Recipe(data="digits", batch=600), "", task="phases"), digits, CPU, lambda: None)

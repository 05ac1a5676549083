"""``ezo experiment regression``: what is watched is right and changes nothing, tables are those that were named, it resumes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.cli import main
from ezo_kernels.cli.experiments import plot, probes, regression, tasks
from ezo_kernels.cli.experiments.probes import SquaredErrorWatch, Trajectory, relative_difference
from ezo_kernels.cli.experiments.regression import RegressionRecipe, squared_error
from ezo_kernels.cli.experiments.scope import QUICK_STEPS, Scope
from ezo_kernels.cli.experiments.trial import Trial
from ezo_kernels.data.regression import load_regression

CPU = torch.device("cpu")


def write_table(path, rows=60, header="a,b,price"):
    values = np.random.Generator(np.random.Philox(5)).normal(size=(rows, 3))
    values[:, 2] = 3 * values[:, 0] - values[:, 1] + 0.1 * values[:, 2]
    path.write_text("\n".join([header, *(",".join(f"{v:.6f}" for v in row) for row in values)]) + "\n")
    return path


@pytest.fixture
def quick(tmp_path, capsys):
    def run(*argv):
        code = main([str(a) for a in ("experiment", "regression", "--quick", "--out", tmp_path / "out", *argv)])
        return code, *capsys.readouterr()

    return run


def numbers(path) -> dict:
    trials = json.loads(path.read_text())["trials"]
    return {key: (t["specification"], t["result"]) for key, t in trials.items()}


def run_of(recipe, data, max_steps=None):
    trial = Trial("a", recipe, "", task="regression", max_steps=max_steps)
    return regression.train(trial, data, CPU, lambda: None)[0]


@pytest.fixture(scope="module")
def diabetes():
    return load_regression("diabetes")


# ---- what is watched


def trained(kind, steps=20, head="0", **options):
    """An int8 MLP after steps on fixed numbers, and its optimizer."""
    generator = torch.Generator().manual_seed(0)
    model = ezo.models.MLP(6, 16, 8, 1, generator=generator)
    ezo.convert_(model, head=0 if head == "0" else [head], precision="int8")
    opt = kind(model, 7, 0.8, 0, 0, 2, 3, loss="squared_error", **options)
    for _ in range(steps):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 1, generator=generator)
        xq = ezo.quantize(x, -5)
        if isinstance(opt, SquaredErrorWatch):
            opt.watch(xq, y)
        opt.train_step(xq, ezo.quantize(y, -5))
    return model, opt


@pytest.mark.parametrize("head", ["0", "fc3"])
def test_watching_changes_no_bit(head):
    plain, _ = trained(ezo.ElasticZOInt8, head=head)
    watched, opt = trained(SquaredErrorWatch, head=head)
    for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    found = opt.statistics()
    assert found["sign_agreement"] > 0.95 and 0 <= found["ties"] < 0.1 and 0.5 < found["sign_agreement_float"] <= 1


def test_the_float_loss_leads_where_it_is_asked_to(monkeypatch):
    """A float loss of the opposite sign turns every step of the trunk round, and only there."""
    real = F.mse_loss
    same = trained(SquaredErrorWatch)[0].fc1.weight.clone()
    floats = trained(SquaredErrorWatch, float_loss=True)[0].fc1.weight.clone()
    assert torch.equal(same, floats)  # its sign is that of the integers on all of these steps
    monkeypatch.setattr(probes.F, "mse_loss", lambda a, b: -real(a, b))
    assert torch.equal(trained(SquaredErrorWatch)[0].fc1.weight, same)
    turned, opt = trained(SquaredErrorWatch, float_loss=True)
    assert not torch.equal(turned.fc1.weight, same) and opt.statistics()["sign_agreement"] < 0.05


def test_the_float_network_has_the_very_weights_of_the_group():
    """Against the step's own z: one layer without rounding, so integers and floats agree exactly but for the output's shift."""
    generator = torch.Generator().manual_seed(1)
    model = ezo.models.MLP(4, 1, generator=generator)
    ezo.convert_(model, head=0, precision="int8")
    opt = SquaredErrorWatch(model, 15, 0.3, 0, 0, 1, 9, loss="squared_error")
    for _ in range(3):
        x, y = ezo.quantize(torch.randn(8, 4, generator=generator), -5), torch.randn(8, 1, generator=generator)
        layer, step = model.fc1, opt.step_count.item()
        sites = {s.names[0]: s for s in opt.zo.manifest}
        z = {
            name: ezo.ops.materialize(
                s.shape, seed=9, step=step, site=s.site, noise="sparse_int8", r_max=15, p_zero=0.3, layout=s.layout
            ).double()
            for name, s in sites.items()
        }
        losses = []
        for sign in (1, -1):
            w = (layer.weight.double() + sign * z["fc1.weight"]).clamp(-127, 127) * 2.0 ** layer.weight_exponent.item()
            b = (layer.bias.double() + sign * z["fc1.bias"]).clamp(-127, 127) * 2.0 ** layer.bias_exponent.item()
            losses.append(((x.dequantize(torch.float64) @ w.T + b - y) ** 2).mean())
        assert opt._signs_in_floats(x, y, 0).item() == torch.sign(losses[0] - losses[1]).item() != 0
        opt.train_step(x, ezo.quantize(y, -5))


def test_ties_are_disagreement_and_counted():
    model = ezo.convert_(ezo.models.MLP(4, 1), head=0, precision="int8")
    watch = SquaredErrorWatch(model, loss="squared_error")
    watch.integer_signs = [torch.tensor([1, 0, -1, 0])]
    watch.signs = [torch.tensor([1.0, 0.0, 1.0, -1.0])]
    watch.pairs = [torch.tensor([[2.0, 1.0], [1.0, 1.0], [1.0, 3.0], [3.0, 3.0]])]
    found = watch.statistics()
    assert found["sign_agreement"] == 0.25 and found["ties"] == 0.5
    assert found["difference_rms"] == pytest.approx(math.sqrt(0.5))  # of the second half: (1 - 3) / 2 and 0
    assert found["g_variance"] == pytest.approx(0.5)  # of -1 and 0


def test_difference_is_relative():
    assert relative_difference(torch.tensor([[3.0, 1.0]])) == 1.0


def test_trajectories_read_weights_rails_and_exponents():
    model = ezo.models.MLP(2, 2, 1)
    with torch.no_grad():
        model.fc1.weight.fill_(3.0)
        model.fc1.bias.zero_()
        model.fc2.weight.fill_(0.5)
        model.fc2.bias.zero_()
    x = torch.tensor([[1.0, 1.0]])
    path = Trajectory(model, x, torch.zeros(1, 1))
    path.read(0, 1.0)
    first = path.readings[0]
    assert first["weights"] == {"fc1": 3.0, "fc2": 0.5} and first["at_rails"] == {}
    assert first["exponents"] == {"fc1": -4, "fc2": -4}  # outputs of 6: 96 * 2^-4 is the finest within 127
    with torch.no_grad():
        model.fc1.weight.mul_(4)
    path.read(5, 0.5)
    assert Trajectory.summary(path.readings) == {"weight_growth": 4.0, "exponent_drift": 2.0}
    assert not model.fc1._forward_hooks
    integers = ezo.convert_(model, head=0, precision="int8")
    path = Trajectory(integers, ezo.quantize(x), torch.zeros(1, 1))
    path.read(0, 1.0)
    weights = path.readings[0]["weights"]
    assert weights["fc1"] == pytest.approx(12.0, rel=0.01) and weights["fc2"] == pytest.approx(0.5, rel=0.01)
    with torch.no_grad():
        integers.fc1.weight[0] = -127
    path.read(1, 1.0)
    assert path.readings[1]["at_rails"] == {"fc1": 0.5, "fc2": 0.0}
    assert Trajectory.summary(path.readings)["at_rails"] == 0.5


# ---- the trials


def test_arms_cover_precisions_rates_and_baselines():
    trials = regression.trials(Scope("diabetes", "f", 310, 0, 200, False))
    assert len({t.key for t in trials}) == len(trials) == len({t.arm for t in trials})
    recipes = [t.recipe for t in trials]
    for head in ("0", "fc3"):
        own = [r for r in recipes if r.head == head and r.method == "elastic"]
        assert [r.bits for r in own if r.integer and r.loss == "integer"] == list(regression.BITS)
        assert [r.lr for r in own if not r.integer] == list(regression.LRS)
        assert [r.bits for r in own if r.loss == "float"] == [0]
    assert {r.method for r in recipes} == {"elastic", "bp", "frozen"}
    assert all(t.head_lrs for t in trials if t.recipe.method != "elastic") and recipes[0].batch == 32
    assert regression.trials(Scope("few", "f", 9, 0, 1, True))[0].recipe.batch == 9
    assert Trial("a", RegressionRecipe("d", 0, 1), "").key != Trial("a", RegressionRecipe("d", 0, 1, bits=1), "").key


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"lr": 1e-3}, {"method": "bp", "head": "all"}], ids=str)
def test_every_kind_learns(diabetes, options):
    recipe = RegressionRecipe("diabetes", 0, 30, **options)
    found = run_of(recipe, diabetes)
    first = found["trajectory"][0]["validation_mse"]
    assert found["validation_mse"] < 0.75 * first and found["diverged"] == 0 and found["steps"] == 30 * (310 // 32)
    assert len(found["trajectory"]) >= regression.READINGS and found["trajectory"][-1]["step"] == found["steps"]
    # the last reading and the result are of the same weights
    assert found["trajectory"][-1]["validation_mse"] == found["validation_mse"]
    assert found == run_of(recipe, diabetes)


def test_divergence_is_said(diabetes):
    found = run_of(RegressionRecipe("diabetes", 0, 20, method="bp", head="all", head_lr=10.0), diabetes)
    assert found["diverged"] == 1.0


def test_a_frozen_trunk_stays_and_its_twin_starts_alike(diabetes):
    found = run_of(RegressionRecipe("diabetes", 0, 2, method="frozen", head="fc3"), diabetes)
    first, last = found["trajectory"][0]["weights"], found["trajectory"][-1]["weights"]
    assert (first["fc1"], first["fc2"]) == (last["fc1"], last["fc2"]) and first["fc3"] != last["fc3"]
    twin = run_of(RegressionRecipe("diabetes", 0, 1, precision="int8"), diabetes, max_steps=1)["trajectory"][0]
    assert all(twin["weights"][n] == pytest.approx(first[n], rel=0.02) for n in first)


def test_the_best_rate_on_validation_is_the_one_tested(diabetes, monkeypatch):
    asked = []
    real = regression._Attempt.error

    def error(attempt, split):
        if split == "test":
            asked.append(attempt.recipe.head_lr)
            return 0.25
        return {0.001: 0.5, 0.01: 0.3, 0.03: 0.4}.get(attempt.recipe.head_lr, real(attempt, split))

    monkeypatch.setattr(regression._Attempt, "error", error)
    recipe = RegressionRecipe("diabetes", 0, 1, method="frozen", head="fc3")
    trial = Trial("a", recipe, "", task="regression", max_steps=2, head_lrs=(0.001, 0.01, 0.03))
    result, _ = regression.train(trial, diabetes, CPU, lambda: None)
    assert asked == [0.01] and result["head_lr"] == 0.01 and result["test_mse"] == 0.25 and len(result["tried"]) == 3


def test_squared_error_is_over_all_rows():
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.zero_()
    assert squared_error(model, torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [1.0]])) == pytest.approx(5.0)


# ---- the command


def test_stopped_and_restarted_is_as_undisturbed(quick, tmp_path, monkeypatch):
    table = write_table(tmp_path / "houses.csv", rows=400)
    given = ("--csv", table, "--target", "price", "--seeds", 0)
    assert quick(*given, "--out", tmp_path / "whole")[0] == 0
    calls, train = [], regression.train

    def dies(trial, data, device, after_step):
        def step():
            calls.append(1)
            if len(calls) == 2 * QUICK_STEPS + 3:
                raise OSError("the power went")
            after_step()

        return train(trial, data, device, step)

    monkeypatch.setitem(tasks.RUN, "regression", dies)
    code, _, err = quick(*given, "--out", tmp_path / "cut")
    assert code == 2 and "the power went" in err
    assert len(numbers(tmp_path / "cut" / "regression.json")) == 2
    monkeypatch.setitem(tasks.RUN, "regression", train)
    code, out, _ = quick(*given, "--out", tmp_path / "cut")
    assert code == 0 and "2 trials are there, 10 to run" in out
    whole, cut = (numbers(tmp_path / name / "regression.json") for name in ("whole", "cut"))
    assert list(whole) == list(cut) and whole == cut and all(s["recipe"]["data"] == "houses" for s, _ in cut.values())
    assert (tmp_path / "cut" / "regression_trajectories.png").stat().st_size > 5000
    # other rows are other trials
    write_table(table, rows=401)
    code, out, _ = quick(*given, "--out", tmp_path / "cut")
    assert code == 0 and "trials are there" not in out and len(numbers(tmp_path / "cut" / "regression.json")) == 24


def test_a_table_beside_diabetes(tmp_path):
    table = write_table(tmp_path / "diabetes.csv")

    def args(**given):
        return type("Args", (), {"data": None, "csv": None, "target": None, "data_dir": None, **given})

    found = regression.tables(args(data=["diabetes"], csv=table, target="price"))
    assert list(found) == ["diabetes", "diabetes.csv"] and found["diabetes.csv"].name == "diabetes.csv"
    assert len(found["diabetes"].x_train) == 310 and found["diabetes.csv"].features == ("a", "b")
    assert list(regression.tables(args())) == ["diabetes"]
    assert list(regression.tables(args(csv=table, target="a"))) == ["diabetes"]  # the file's own name


def test_bad_tables_are_one_line(quick, tmp_path):
    table = write_table(tmp_path / "t.csv")
    (tmp_path / "broken.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "binary.csv").write_bytes(b"PK\x03\x04")
    (tmp_path / "short.csv").write_text("a,b\n1,2\n3,4\n")
    for argv, said in (
        (("--csv", tmp_path / "none.csv", "--target", "a"), "none.csv: no such file"),
        (("--csv", tmp_path, "--target", "a"), "no such file"),
        (("--csv", table), "--csv FILE and --target NAME go together"),
        (("--target", "a"), "--csv FILE and --target NAME go together"),
        (("--csv", table, "--target", "cost"), "no column 'cost' to predict: there are a, b, price"),
        (("--csv", tmp_path / "broken.csv", "--target", "a"), "line 3: 1 fields, but 2 columns"),
        (("--csv", tmp_path / "binary.csv", "--target", "a"), "no CSV file: its first line is not text"),
        (("--csv", tmp_path / "short.csv", "--target", "a"), "2 rows are too few"),
        (("--data", "digits"), "regression takes tables, not digits"),
        (("--data-dir", tmp_path), "--data-dir is for images"),
        (("--models", "mlp"), "--models goes with the experiment partition"),
    ):
        code, out, err = quick(*argv)
        assert code == 2 and out == "" and err.startswith("ezo: error: ") and err.count("\n") == 1 and said in err, argv


def test_figures_of_trajectories_leave_out_what_diverged(tmp_path, monkeypatch):
    def reading(step, error, exponent):
        return {
            "step": step,
            "validation_mse": error,
            "weights": {"f": 1.0},
            "at_rails": {},
            "exponents": {"f": exponent},
        }

    drawn, real = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, *a, **k: drawn.append(a[:2]) or real(axes, *a, **k))
    path = tmp_path / "t.png"
    readings = [reading(0, 1.0, 0), reading(1, 2.0, 1), reading(2, 11.0, 9), reading(3, 3.0, 0), reading(4, None, None)]
    plot.write_trajectories(path, [("d", "a", readings)], "t")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert drawn == [((0, 1), (1.0, 2.0)), ((0, 1), (1.0, 1.0)), ((0, 1), (0, 1))]  # nothing at the rails in floats


def test_bars_leave_out_what_diverged_and_say_so(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "_bars", lambda axes, rows, column, named: drawn.append([row["arm"] for row in rows]))

    def row(arm, diverged):
        values = {"validation_mse": 1.0, "diverged": diverged}
        return {
            "data": "d",
            "arm": arm,
            "x": None,
            "metrics": {k: {"mean": v, "spread": None} for k, v in values.items()},
        }

    titles, real = [], Figure.suptitle
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text: titles.append(text) or real(figure, text))
    plot.write(tmp_path / "b.png", [row("a", 0.0), row("b", 1 / 3)], (regression.VALID_MSE,), "title")
    assert drawn == [["a"]] and titles == ["title (left out: 1 that diverged)"]


def test_the_allocators_peak_is_that_of_the_largest_moment():
    def step():
        a = torch.empty(1000)
        b = torch.empty(3000)
        del a, b
        return torch.empty(2000)

    assert probes.allocated_peak(step, CPU) == 16_000

"""The files of ``ezo experiment``: of two processes at once, changed by hand, of nothing but what has diverged."""

from __future__ import annotations

import json

import pytest

from ezo_kernels.cli.experiments import plot
from ezo_kernels.cli.experiments.store import Store
from ezo_kernels.cli.experiments.summary import Column


def test_two_processes_file_into_one_file(tmp_path):
    """Other arms of the same experiment, begun before the first has filed anything: none loses what the other ran."""
    one, two = Store(tmp_path, "memory", True), Store(tmp_path, "memory", True)
    for store, key in ((one, "a"), (two, "b"), (one, "c")):
        store.add(key, {"arm": key, "result": {"x": 1}, "timings": {}})
    two.write()
    assert sorted(json.loads((tmp_path / "memory.json").read_text())["trials"]) == ["a", "b", "c"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory.json"]


@pytest.mark.parametrize("epochs", [0, -3])
def test_a_table_is_trained_for_at_least_an_epoch(quick, tmp_path, epochs):
    code, out, err = quick("regression", "--epochs", epochs, "--arms", "int8")
    assert code == 2 and err == f"ezo: error: epochs is {epochs}: at least 1 is needed\n", out
    assert not (tmp_path / "regression.json").exists()


def test_results_that_were_changed_are_one_line(quick, tmp_path):
    assert quick("epsilon", "--seeds", 0)[0] == 0
    path = tmp_path / "epsilon.json"
    found = json.loads(path.read_text())
    for trial in found["trials"].values():
        trial["result"].clear()
    path.write_text(json.dumps(found))
    code, _, err = quick("epsilon", "--seeds", 0)
    assert code == 2 and err.count("\n") == 1 and str(path) in err and "corrupt" in err and "move it away" in err
    path.write_text("[" * 100_000)
    code, _, err = quick("epsilon", "--seeds", 0)
    assert code == 2 and err.count("\n") == 1 and str(path) in err and "corrupt" in err


def test_a_figure_of_arms_that_all_diverged(tmp_path):
    columns = (Column("validation_mse", "validation"),)
    metrics = {name: {"mean": 1.0, "spread": None, "n": 1} for name in ("diverged", "steps")}
    plot.write(tmp_path / "all.png", [{"data": "t", "arm": "a", "x": None, "metrics": metrics}], columns, "regression")
    assert (tmp_path / "all.png").stat().st_size > 1000

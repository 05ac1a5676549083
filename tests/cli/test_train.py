"""``ezo train`` and ``ezo eval``: what they write, print and promise."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch

from ezo_kernels.cli import checkpoint as ckpt
from ezo_kernels.cli import train as train_module
from ezo_kernels.cli.recipe import METHODS, PRECISIONS, Recipe
from ezo_kernels.cli.run import Run
from ezo_kernels.ops._strategy import strategy_hash


def test_train_writes_what_it_promises(train, tmp_path, folder):
    files = {name: tmp_path / f"run.{name}" for name in ("json", "png", "pt")}
    code, out, err = train("--json", files["json"], "--plot", files["png"], "--checkpoint", files["pt"])
    assert code == 0 and err == ""
    assert "epoch 1/2" in out and "epoch 2/2" in out and "NOT the genuine" in out and "\r" not in out
    record = json.loads(files["json"].read_text())
    assert record["model"] == "lenet5" and record["parameters"] == 107_786
    assert record["data"] == "mnist" and record["genuine"] is False and record["data_source"] == str(folder)
    assert record["precision"] == "fp32" and record["head"] == "fc2,fc3" and record["method"] == "elastic"
    assert record["epochs"] == 2 and record["steps"] == record["steps_of_recipe"] == 14 and record["seed"] == 0
    assert 0 <= record["validation_accuracy"] <= 1 and 0 <= record["test_accuracy"] <= 1
    assert record["step_ms"] > 0 and record["peak_memory_bytes"] > 1e6 and record["skipped_steps"] == 0
    assert record["rng_version"] == "ezo-1/philox4x32-7" and record["strategy_hash"] == strategy_hash()
    assert Recipe.from_dict(record["recipe"]) == Recipe(batch=16, epochs=2, noise="clt4")
    assert record["versions"]["torch"] == torch.__version__ and "python" in record["versions"]
    assert [row["epoch"] for row in record["history"]] == [1, 2]
    assert all(row["loss"] > 0 and row["seconds"] > 0 for row in record["history"])
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert ckpt.read(files["pt"])["step"] == 14
    # Nothing but what was asked for: no temporary file is left.
    assert set(tmp_path.iterdir()) == set(files.values())


def test_eval_agrees_with_the_end_of_training(train, ezo, tmp_path, folder):
    train("--json", tmp_path / "a.json", "--checkpoint", tmp_path / "a.pt", "--quiet")
    trained = json.loads((tmp_path / "a.json").read_text())
    for split, images in (("test", 40), ("validation", 11)):
        code, out, err = ezo(
            "eval", tmp_path / "a.pt", "--split", split, "--data-dir", folder, "--json", tmp_path / "b"
        )
        assert code == 0 and f"{images} {split} images" in out
        assert json.loads((tmp_path / "b").read_text())[f"{split}_accuracy"] == trained[f"{split}_accuracy"]


def test_it_learns(train, tmp_path):
    code, _, _ = train("--epochs", 12, "--json", tmp_path / "a.json", "--quiet")
    record = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and record["test_accuracy"] > 0.8
    assert record["history"][-1]["loss"] < 0.5 * record["history"][0]["loss"]


def test_it_learns_in_integers(ezo, tmp_path):
    """The short form of bench/int8_training.py, on scikit-learn's digits."""
    code, _, _ = ezo(
        "train", "--data", "digits", "--precision", "int8", "--epochs", 4, "--batch", 16, "--json", tmp_path / "a.json"
    )
    record = json.loads((tmp_path / "a.json").read_text())
    assert code == 0 and record["test_accuracy"] > 0.8
    assert record["history"][-1]["loss"] < 0.7 * record["history"][0]["loss"]


def test_quiet_prints_the_result_alone(train):
    code, out, err = train("--quiet", "--max-steps", 2)
    assert code == 0 and err == "" and out.count("\n") == 1 and "after 2 steps" in out


def test_skipped_steps_are_said(train):
    code, out, _ = train("--quiet", "--max-steps", 3, "--lr", "1e30", "--head-lr", "1e30")
    assert code == 0 and "after 3 steps (2 skipped: their loss was not finite)" in out


def test_a_terminal_sees_a_bar(train, monkeypatch):
    """With steps a second, loss, accuracy and memory; an epoch's line goes above it, not through it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(train_module.Progress, "PERIOD_S", 0.0)
    code, out, err = train()
    assert code == 0 and "epoch 1/2" in out
    last = err.split("\r")[-1]
    # tqdm redraws by the clock, so only the last state, which it always draws, is sure to be there
    for word in ("14/14", "step/s", r"loss \d\.\d+", "validation ", "MiB"):
        assert re.search(word, last), last
    assert train("--quiet")[2] == ""


@pytest.mark.parametrize("method", METHODS)
def test_methods(train, method, tmp_path):
    code, _, err = train("--method", method, "--max-steps", 3, "--json", tmp_path / "a.json")
    assert (code, err) == (0, "")
    head = {"elastic": "fc2,fc3", "mezo": "0", "bp": "all", "frozen": "fc2,fc3"}[method]
    assert json.loads((tmp_path / "a.json").read_text())["head"] == head


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "int8"])
def test_precisions(train, precision, tmp_path):
    code, _, err = train("--precision", precision, "--max-steps", 3, "--checkpoint", tmp_path / "a.pt")
    assert (code, err) == (0, "")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {p.dtype for p in ckpt.read(tmp_path / "a.pt")["model"].values()} == {dtype}


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "mlp", "--hidden", "32,16"),
        ("--head", "1"),
        ("--head", "0"),
        ("--head", "all"),
        ("--head", "fc3"),
        ("--noise", "sparse", "--p-zero", 0.5),
        ("--rounds", 10),
        ("--queries", 2, "--mode", "sequential"),
        ("--schedule", "constant"),
    ],
)
def test_options_reach_the_run(train, options, tmp_path):
    code, _, err = train(*options, "--max-steps", 2, "--json", tmp_path / "a.json")
    assert (code, err) == (0, "")
    recipe = json.loads((tmp_path / "a.json").read_text())["recipe"]
    for name, value in zip(options[::2], options[1::2], strict=True):
        assert str(recipe[name[2:].replace("-", "_")]) == str(value)


def test_the_schedule_reaches_the_optimizer(folder):
    from ezo_kernels.data import load

    run = Run(Recipe(batch=16, epochs=2, noise="clt4"), load("mnist", folder), torch.device("cpu"))
    seen = []
    run.train(after_step=lambda run: seen.append([group["lr"] for group in run.optimizer.param_groups]))
    want = 0.5 * (1 + np.cos(np.pi * np.arange(14) / 14))
    assert np.allclose(seen, np.outer(want, [1e-4, 0.05]), rtol=1e-12)


def test_the_test_images_are_read_once_at_the_end(train, monkeypatch):
    order = []
    for name in ("validate", "test"):
        original = getattr(Run, name)
        monkeypatch.setattr(Run, name, lambda run, name=name, f=original: order.append(name) or f(run))
    train()
    assert order == ["validate", "validate", "test"]

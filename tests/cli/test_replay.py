"""``ezo train --seed-log`` and ``ezo replay``."""

from __future__ import annotations

import json

import pytest
import torch

from tests.cli.outcome import refused

SMALL = ("--data", "digits", "--quiet")


@pytest.mark.parametrize("how", [("--head", "fc3"), ("--head", "0", "--queries", 2), ("--precision", "int8")], ids=str)
def test_the_run_again_from_a_few_bytes_a_step(ezo, tmp_path, how):
    log = tmp_path / "run.seeds"
    code, out, err = ezo(
        "train", *SMALL, *how, "--epochs", 2, "--max-steps", 30, "--seed-log", log, "--json", tmp_path / "a"
    )
    assert code == 0, err
    ran = json.loads((tmp_path / "a").read_text())
    code, out, err = ezo("replay", log, "--json", tmp_path / "b", "--weights", tmp_path / "w.pt")
    assert code == 0 and "30 steps from" in out and "bit for bit" in out, err
    again = json.loads((tmp_path / "b").read_text())
    assert again["test_accuracy"] == ran["test_accuracy"] and again["steps"] == 30
    weights = torch.load(tmp_path / "w.pt", weights_only=True)
    assert {"conv1.weight", "fc3.bias"} <= set(weights)


def test_a_resumed_run_goes_on_with_its_log(ezo, tmp_path):
    log, point = tmp_path / "run.seeds", tmp_path / "c.pt"
    files = ("--seed-log", log, "--checkpoint", point)
    assert ezo("train", *SMALL, "--epochs", 1, "--max-steps", 5, *files)[0] == 0
    assert ezo("train", "--resume", point, *files, "--max-steps", 12, "--quiet")[0] == 0
    code, out, err = ezo("replay", log)
    assert code == 0 and "12 steps from" in out, err
    assert refused(ezo("train", "--resume", point, "--seed-log", tmp_path / "new"), "no such log")
    point.unlink()
    assert ezo("train", *SMALL, "--epochs", 1, "--max-steps", 5, "--checkpoint", point)[0] == 0
    assert refused(ezo("train", "--resume", point, "--seed-log", log), "ends at step 12, the optimizer is at step 5")


def test_what_has_no_log(ezo, tmp_path):
    log = tmp_path / "run.seeds"
    for how, words in (
        (("--method", "bp"), "of method elastic with a trunk, not bp"),
        (("--head", "all"), "not elastic with head all"),
        (("--head", "fc3", "--nodes", "fc1"), "node_perturbation makes its steps of each row"),
    ):
        assert refused(ezo("train", *SMALL, *how, "--max-steps", 2, "--seed-log", log), words)
    assert refused(ezo("train", *SMALL, "--seed-log", log, "--json", log), "--json and --seed-log name the same file")
    assert refused(ezo("train", *SMALL, "--seed-log", tmp_path / "none" / "log"), "there is no folder")
    assert refused(ezo("replay", log), "no such log")
    log.write_bytes(b"text")
    assert refused(ezo("replay", log), "corrupt or no seed log")
    assert list(tmp_path.iterdir()) == [log]

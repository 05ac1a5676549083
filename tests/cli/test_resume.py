"""Runs that were stopped, and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from ezo_kernels.cli import checkpoint as ckpt
from ezo_kernels.cli.recipe import METHODS, Recipe
from ezo_kernels.cli.run import Run
from tests.cli.outcome import refused, same_state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [5, 7])
def test_a_resumed_run_is_the_run(train, tmp_path, method, at):
    whole, part, end = (tmp_path / name for name in ("whole.pt", "part.pt", "end.pt"))
    assert train("--method", method, "--seed", 3, "--checkpoint", whole)[0] == 0
    assert train("--method", method, "--seed", 3, "--checkpoint", part, "--max-steps", at)[0] == 0
    a = ckpt.read(part)
    assert a["step"] == at
    code, _, err = train("--resume", part, "--checkpoint", end)
    assert (code, err) == (0, "")
    assert same_state(ckpt.read(whole), ckpt.read(end))
    assert not same_state(a["model"], ckpt.read(end)["model"])


def test_a_resumed_run_with_perturbed_outputs_is_the_run(train, tmp_path):
    own = ("--nodes", "fc1", "--node-lr", 0.1, "--freeze", "conv1", "--queries", 2)
    whole, part, end = (tmp_path / name for name in ("whole.pt", "part.pt", "end.pt"))
    assert train(*own, "--checkpoint", whole)[0] == 0
    assert train(*own, "--checkpoint", part, "--max-steps", 5)[0] == 0
    assert train("--resume", part, "--checkpoint", end)[0] == 0
    first, last = ckpt.read(part)["model"], ckpt.read(end)["model"]
    assert same_state(ckpt.read(whole), ckpt.read(end))
    assert torch.equal(first["conv1.weight"], last["conv1.weight"])
    assert not torch.equal(first["fc1.weight"], last["fc1.weight"])
    code, _, err = train("--resume", part, "--node-lr", 0.2)
    assert code == 2 and "node_lr" in err


def test_a_checkpoint_of_mezo_from_before_its_state_had_its_steps_goes_on(train, tmp_path):
    whole, part, end = (tmp_path / name for name in ("whole.pt", "part.pt", "end.pt"))
    assert train("--method", "mezo", "--checkpoint", whole, "--max-steps", 3)[0] == 0
    assert train("--method", "mezo", "--checkpoint", part, "--max-steps", 2)[0] == 0
    contents = torch.load(part, weights_only=True)
    assert contents["optimizer"].pop("steps") == 2 and contents["optimizer"].pop("skipped") == 0
    torch.save(contents, part)
    assert train("--resume", part, "--checkpoint", end, "--max-steps", 3)[0] == 0
    assert same_state(ckpt.read(whole), ckpt.read(end))


INT8 = (
    "--precision",
    "int8",
    "--p-zero",
    "0.5,0.9@0.5",
    "--bits",
    "2,1@0.5",
    "--head-bits",
    "3,1@0.25",
    "--r-max",
    "7,15@0.5",
)


def test_a_resumed_integer_run_is_the_run(ezo, folder, tmp_path):
    def train(*argv):
        return ezo("train", "--data-dir", folder, "--batch", 16, "--epochs", 2, "--seed", 3, *argv)

    whole, part, end, record = (tmp_path / name for name in ("whole.pt", "part.pt", "end.pt", "a.json"))
    assert train(*INT8, "--checkpoint", whole, "--json", record)[0] == 0
    assert train(*INT8, "--checkpoint", part, "--max-steps", 5)[0] == 0
    assert train("--resume", part, "--checkpoint", end)[::2] == (0, "")
    a, b = ckpt.read(whole), ckpt.read(end)
    assert same_state(a, b) and not same_state(ckpt.read(part)["model"], b["model"])
    assert {v.dtype for v in b["model"].values()} == {torch.int8, torch.int32}
    groups = b["optimizer"]["param_groups"]
    assert [g["bits"] for g in groups] == [1, 1] and groups[0]["p_zero"] == 0.9 and groups[0]["r_max"] == 15
    result = json.loads(record.read_text())
    assert result["precision"] == "int8" and result["numerics_version"] == "ezo-int8-1"
    code, out, _ = ezo("eval", end, "--data-dir", folder, "--split", "validation")
    assert code == 0 and f"{100 * result['validation_accuracy']:.2f}%" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--precision", "int8", "--lr", 0.1), "--lr: no meaning with --precision int8"),
        (("--precision", "int8", "--noise", "gaussian"), "--noise"),
        (("--bits", "1"), "--bits: no meaning with --precision fp32"),
        (("--precision", "int8", "--bits", "1,0@0.7,2@0.5"), "rising fractions"),
        (("--precision", "int8", "--bits", "1,0@nan"), "rising fractions"),
        (("--precision", "int8", "--bits", "a"), "'a'"),
        (("--precision", "int8", "--bits", "9"), "got 9"),
        (("--precision", "int8", "--bits", "1,-9@0.9"), "bits must be in [-8, 7], got -9"),
        (("--precision", "int8", "--head-bits", "3,8@0.5"), "head_bits must be in [-8, 7], got 8"),
        (("--precision", "int8", "--r-max", "3,0@0.9"), "r_max must be in 1..127, got 0"),
        (("--precision", "int8", "--p-zero", "0.5,1.5@0.5"), "got 1.5"),
        (("--precision", "int8", "--p-zero", "1"), "got 1.0"),
        (("--precision", "int8", "--r-max", 200), "got 200"),
        (("--precision", "int8", "--method", "bp"), "method elastic"),
        (("--precision", "int8", "--fraction-bits", 9), "fraction_bits"),
        (("--p-zero", "0,0.5@0.5", "--noise", "sparse"), "needs precision int8"),
        (("--head-remainder",), "precision int8, and a head other than 0"),
        (("--precision", "int8", "--head", "0", "--head-remainder"), "precision int8, and a head other than 0"),
        (("--precision", "int8", "--head", "0", "--head-bits", "1"), "--head-bits: no meaning with --head 0"),
        (("--points", "16"), "points goes with model pointnet, not lenet5"),
        (("--model", "pointnet", "--points", "0"), "points is 0: at least 1 is needed"),
    ],
)
def test_bad_integer_options_are_refused_before_training(ezo, folder, untrained, options, said):
    refused(ezo("train", "--data-dir", folder, *options), said)


def test_an_integer_head_keeps_remainders_unless_told_otherwise():
    """And checkpoints from before there were any go on without."""
    kept, rough = Recipe(precision="int8"), Recipe(precision="int8", head_remainder=False)
    assert kept.head_remainder and not rough.head_remainder and kept.head_bits != rough.head_bits
    assert not Recipe(precision="int8", head="0").head_remainder and not Recipe().head_remainder
    old = {name: value for name, value in rough.as_dict().items() if name not in ("head_remainder", "points")}
    assert Recipe.from_dict(old) == rough and Recipe.from_dict(kept.as_dict()) == kept


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"head": "0"}, "another run: head fc2,fc3 is not 0"),
        ({"precision": "fp32"}, "another run: precision int8 is not fp32"),
        ({"seed": 4}, "another run: seed 0 is not 4"),
    ],
)
def test_an_option_of_another_run_is_named_as_it_was_given(given, said):
    """Also where it would not go together with what the checkpoint has."""
    with pytest.raises(ValueError, match=f"c.pt: a checkpoint of {said}$"):
        ckpt.merge(given, {"recipe": Recipe(precision="int8")}, "c.pt")
    clouds = {"recipe": Recipe(model="pointnet", points=16)}
    with pytest.raises(ValueError, match="another run: model pointnet is not lenet5$"):
        ckpt.merge({"model": "lenet5"}, clouds, "c.pt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(train, tmp_path, monkeypatch, number):
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    before = signal.getsignal(signal.SIGINT)
    train("--checkpoint", whole)
    take_step = Run._take_step

    def interrupted(run, x, y):
        if run.step == 4:
            os.kill(os.getpid(), number)
        take_step(run, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_take_step", interrupted)
        code, out, err = train("--checkpoint", part, "--json", tmp_path / "a.json")
    # The step in which it arrived is finished, and nothing is said of accuracy.
    assert code == 128 + number and "stopped after step 5 of 14" in err and f"--resume {part}" in err
    assert "accuracy" not in out and not (tmp_path / "a.json").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert train("--resume", part, "--checkpoint", part)[0] == 0
    assert same_state(ckpt.read(whole), ckpt.read(part))


def test_ctrl_c_without_a_checkpoint_option_keeps_the_run(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "train", lambda run, *a: os.kill(os.getpid(), signal.SIGINT) or False)
    code, _, err = train()
    assert code == 130 and "ezo-interrupted.pt" in err
    assert ckpt.read(tmp_path / "ezo-interrupted.pt")["step"] == 0


def test_a_process_takes_ctrl_c(tmp_path, folder):
    """The same from outside, through a real signal to a real process."""
    argv = [
        "train",
        "--data-dir",
        folder,
        "--noise",
        "clt4",
        "--batch",
        16,
        "--epochs",
        100_000,
        "--checkpoint",
        "a.pt",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "ezo_kernels.cli", *map(str, argv)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("epoch 1/")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "go on with: ezo train --resume a.pt" in err and "Traceback" not in err
    assert ckpt.read(tmp_path / "a.pt")["step"] >= 7

"""The program, run in this process on small files that the tests write."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from synthetic_idx import make_arrays, write_idx

from ezo_kernels.cli import checkpoint as ckpt
from ezo_kernels.cli import main
from ezo_kernels.cli import train as train_module
from ezo_kernels.cli.recipe import METHODS, PRECISIONS, Recipe
from ezo_kernels.cli.run import Run
from ezo_kernels.data.files import PARTS
from ezo_kernels.ops._strategy import strategy_hash

download_module = sys.modules["ezo_kernels.data.download"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """117 training images (7 steps of 16), 11 for validation, 40 for the test."""
    return write_idx(tmp_path_factory.mktemp("data"), make_arrays(train=128))


@pytest.fixture
def ezo(capsys):
    """Run a command line: (exit code, stdout, stderr)."""

    def run(*argv):
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def train(ezo, folder):
    """``ezo train`` on the synthetic files; an option given twice counts the last time."""

    def run(*argv):
        return ezo("train", "--data-dir", folder, "--batch", 16, "--epochs", 2, "--noise", "clt4", *argv)

    return run


def refused(result, *said):
    """One line on stderr that says all of ``said``, exit code 2, nothing on stdout."""
    code, out, err = result
    assert code == 2 and out == ""
    assert err.startswith("ezo: error: ") and err.count("\n") == 1 and "Traceback" not in err
    for text in said:
        assert str(text) in err
    return True


def same_state(a, b):
    """Whether two nests of dicts, lists and tensors are equal bit for bit (seconds of the history aside)."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5)) if a.is_floating_point() else torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(k == "seconds" or same_state(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


# ---------------------------------------------------------------------------------------------------------- train


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


# --------------------------------------------------------------------------------------------------------- resume


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
    ],
)
def test_bad_integer_options_are_refused_before_training(ezo, folder, untrained, options, said):
    refused(ezo("train", "--data-dir", folder, *options), said)


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


# --------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def untrained(monkeypatch):
    """Fails the test if a single step is taken."""
    monkeypatch.setattr(Run, "_take_step", lambda *a: pytest.fail("it trains before it complains"))


@pytest.mark.parametrize(
    "options, said",
    [
        (("--model", "resnet"), "invalid choice: 'resnet'"),
        (("--batch", "many"), "invalid int value: 'many'"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
        (("--epoch", "2"), "unrecognized arguments: --epoch 2"),
        (("--data", "digits", "--data-dir", "."), "digits come with scikit-learn"),
        (("--head", "fc9"), "fc9"),
        (("--head", "17"), "17"),
        (("--noise", "pink"), "unknown noise 'pink'"),
        (("--noise", "sparse", "--p-zero", "1"), "p_zero"),
        (("--p-zero", "0.5"), "p_zero=0.5 has no meaning"),
        (("--rounds", "8"), "rounds must be 7 or 10, got 8"),
        (("--eps", "0"), "eps"),
        (("--eps", "nan"), "eps"),
        (("--lr", "-1"), "lr"),
        (("--clip", "-1"), "clip"),
        (("--queries", "0"), "queries is 0"),
        (("--epochs", "0"), "epochs is 0"),
        (("--batch", "0"), "batch is 0"),
        (("--batch", "1000"), "a batch of 1000 out of 117 rows"),
        (("--seed", "-1"), "seed is -1"),
        (("--max-steps", "0"), "--max-steps is 0"),
        (("--capture", "--device", "cpu"), "capture=True"),
        (("--capture", "--method", "bp"), "--capture: no meaning with --method bp"),
        (("--threads", "0"), "--threads is 0"),
        (("--model", "mlp", "--hidden", "a,b"), "hidden is 'a,b'"),
        (("--model", "mlp", "--hidden", "0"), "an MLP takes"),
        (("--method", "bp", "--head", "fc3"), "--head all, not fc3"),
        (("--method", "frozen", "--head", "0"), "train nothing"),
        (("--no-antithetic",), "goes with method elastic and 2 queries or more, not elastic with 1"),
        (("--no-antithetic", "--method", "mezo", "--queries", "4"), "not mezo with 4"),
        (("--no-antithetic", "--precision", "int8"), "2 queries or more"),
        (("--scales", "conv1"), "scales is 'conv1'"),
        (("--scales", "conv1=2,conv1=3"), "each layer once"),
        (("--scales", "conv1=x"), "scales is 'conv1=x'"),
        (("--scales", "conv1=0"), "scales['conv1']"),
        (("--scales", "fc3=2"), "the trunk has nothing named 'fc3'"),
        (("--scales", "conv1=2", "--method", "mezo"), "goes with method elastic, not mezo"),
        (("--scales", "conv1=2", "--precision", "int8"), "scales"),
        (("--resume", "absent.pt"), "absent.pt: no such checkpoint"),
        (("--data-dir", "absent"), "absent: no such file or folder"),
        (("--json", "absent/a.json"), "--json absent/a.json: there is no folder absent"),
        (("--checkpoint", "absent/a.pt"), "--checkpoint absent/a.pt"),
        (("--plot", "absent/a.png"), "--plot absent/a.png"),
        (("--plot", "a.pdf"), "a.pdf: a name that ends in .png"),
        (("--json", "."), "--json .: is a folder"),
        (("--json", "a.png", "--plot", "./a.png"), "--json and --plot name the same file"),
        (("--json", "a", "--checkpoint", "a"), "--json and --checkpoint name the same file"),
    ],
)
def test_bad_options_are_refused_before_training(train, untrained, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(train(*options), said)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(train, untrained, tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_module.outputs.tempfile, "NamedTemporaryFile", full)
    for option in ("--json", "--checkpoint", "--plot"):
        assert refused(train(option, tmp_path / "a.png"), option, "cannot be written: No space left on device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_refused(train, untrained):
    assert refused(train("--device", "cuda"), "finds no CUDA device")


def test_broken_data_is_refused(train, untrained, tmp_path):
    folder = write_idx(tmp_path / "mnist", make_arrays())
    name = PARTS["x_train"][0]
    whole = (folder / name).read_bytes()
    for raw, said in ((whole[:-1], "truncated"), (b"oops" + whole[4:], "wrong magic 6f6f7073")):
        (folder / name).write_bytes(raw)
        assert refused(train("--data-dir", folder), folder / name, said)


def test_broken_checkpoints_are_refused(train, ezo, tmp_path, monkeypatch, folder):
    train("--checkpoint", tmp_path / "good.pt", "--max-steps", 2)
    monkeypatch.setattr(Run, "_take_step", lambda *a: pytest.fail("it trains before it complains"))
    bad = tmp_path / "bad.pt"
    whole = (tmp_path / "good.pt").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for raw in (whole[:1000], whole[:-300], b"", b"text", flipped):
        bad.write_bytes(raw)
        assert refused(train("--resume", bad), bad, "corrupt or no checkpoint")
        assert refused(ezo("eval", bad, "--data-dir", folder), bad, "corrupt or no checkpoint")
    torch.save({"weights": torch.zeros(3)}, bad)
    assert refused(train("--resume", bad), bad, "not a checkpoint of the format")

    def changed(**changes):
        contents = torch.load(tmp_path / "good.pt", weights_only=True)
        contents.update(changes)
        torch.save({k: v for k, v in contents.items() if v is not None}, bad)
        return contents

    contents = changed(rng_version="ezo-0/philox4x32-7")
    assert refused(train("--resume", bad), bad, "rng version ezo-0/philox4x32-7 is not ezo-1/philox4x32-7")
    changed(optimizer=None)
    assert refused(train("--resume", bad), bad, "a checkpoint without optimizer")
    changed(recipe={**contents["recipe"], "flavour": 1})
    assert refused(train("--resume", bad), bad, "flavour")
    changed(model={**contents["model"], "fc3.bias": torch.zeros(11)})
    assert refused(train("--resume", bad), bad, "another model: fc3.bias is [11], not [10]")
    changed(model={k: v for k, v in contents["model"].items() if k != "fc3.bias"})
    assert refused(train("--resume", bad), bad, "another model: fc3.bias in only one")
    assert refused(ezo("eval", bad, "--data-dir", folder), bad, "another model")
    changed(genuine=True)
    assert refused(train("--resume", bad), bad, "other data")
    changed(losses=torch.zeros(3))
    assert refused(train("--resume", bad), "other data: 3 steps an epoch, here it is 7")


@pytest.mark.parametrize(
    "option, value", [("--model", "mlp"), ("--head", "fc3"), ("--noise", "uniform"), ("--seed", 1), ("--rounds", 10)]
)
def test_a_checkpoint_of_another_recipe_is_refused(train, tmp_path, option, value):
    train("--checkpoint", tmp_path / "a.pt", "--max-steps", 1)
    assert refused(train("--resume", tmp_path / "a.pt", option, value), "another run", option[2:], value)


def test_a_resumed_run_needs_no_options(ezo, folder, train, tmp_path):
    train("--seed", 5, "--checkpoint", tmp_path / "a.pt", "--max-steps", 1)
    assert ezo("train", "--data-dir", folder, "--resume", tmp_path / "a.pt", "--json", tmp_path / "a.json")[0] == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["seed"], record["recipe"]["batch"], record["steps"]) == (5, 16, 14)


def test_defects_of_ours_keep_their_traceback(train, monkeypatch):
    def broken(*a):
        raise AssertionError("a defect")

    monkeypatch.setattr(Run, "_take_step", broken)
    with pytest.raises(AssertionError, match="a defect"):
        train()


def test_traceback_on_request(ezo, tmp_path):
    code, _, err = ezo("--traceback", "eval", tmp_path / "absent.pt")
    assert code == 2 and "Traceback" in err and err.endswith("absent.pt: no such checkpoint\n")


# -------------------------------------------------------------------------------------------------- data and info


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """An empty cache and no source."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def fetch():
        raise OSError("no route")

    monkeypatch.setattr(download_module, "sources", lambda name: [("the mirror", fetch)])


@pytest.mark.parametrize("options", [(), ("--offline",)])
def test_without_a_network_it_says_so_and_trains_on_digits(ezo, unreachable, tmp_path, options):
    code, out, err = ezo("train", "--max-steps", 2, "--noise", "clt4", "--json", tmp_path / "a.json", *options)
    assert code == 0 and "digits (NOT the genuine MNIST files)" in out
    assert "WARNING" in err and "the results are NOT of mnist" in err
    assert ("no route" in err) == (options == ())
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["genuine"] is False and record["data"] == "digits" and record["data_asked"] == "mnist"


def test_data_fills_the_cache_or_says_why_not(ezo, unreachable, monkeypatch, tmp_path):
    assert main(["data", "mnist"]) == 2
    monkeypatch.setattr(download_module, "sources", lambda name: [("the shelf", lambda: make_arrays())])
    monkeypatch.setattr(download_module, "which_genuine", lambda arrays: "mnist")
    ezo()
    code, out, err = ezo("data", "mnist")
    assert code == 0 and "getting mnist from the shelf" in err
    assert out == f"mnist: genuine, in {tmp_path / 'cache' / 'ezo_kernels' / 'mnist'}\n"
    assert refused(ezo("data", "cifar"), "invalid choice: 'cifar'")


def test_info(ezo):
    code, out, err = ezo("info", "--head", "fc3")
    assert code == 0 and err == ""
    for word in ("python", "torch", "triton", "numba", "cupy", "ezo-1/philox4x32-7", "device", "conv1", "fc2", "fc3"):
        assert word in out
    assert refused(ezo("info", "--head", "fc9"), "fc9")


def test_info_shows_strategies_and_why(ezo):
    code, out, err = ezo(
        "info", "--arch", 90, "--batch", 2048, "--head", 0, "--precision", "bf16", "--noise", "rademacher"
    )
    assert code == 0 and err == "" and "batches of 2048, rademacher, strategies of sm_90" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("conv", "fc"))}
    assert "slab" in rows["conv2"] and "9,600" in rows["conv2"] and "9.6e+08 products a sign, at least" in rows["conv2"]
    assert "fused" in rows["fc1"] and "no slab: 94080 weights, fewer than 1048576" in rows["fc1"]
    assert "workspace of perturbed weights: 9,600 bytes at most" in out
    code, out, _ = ezo("info", "--strategy", "slab", "--model", "pointnet", "--head", 1, "--batch", 3)
    assert code == 0 and out.count("asked for by name") == 7 and "strategies of this device" in out
    code, out, _ = ezo("info", "--precision", "int8")
    assert code == 0 and "workspace of" not in out
    assert refused(ezo("info", "--precision", "int8", "--arch", 90, "--batch", 3), "--batch, --arch: no meaning")
    assert refused(ezo("info", "--batch", 0), "--batch must be at least 1, got 0")
    assert refused(ezo("info", "--arch", -1), "--arch must be at least 0")
    assert refused(ezo("info", "--strategy", "fast"), "strategy must be one of auto, fused")
    assert refused(ezo("info", "--noise", "normal"), "normal")


@pytest.mark.parametrize("model", ["lenet5", "mlp", "pointnet"])
def test_info_of_every_model_in_integers(ezo, model):
    code, out, err = ezo("info", "--precision", "int8", "--model", model)
    assert (code, err) == (0, "") and "integer backward" in out


def test_no_command_is_an_error(ezo):
    assert refused(ezo(), "COMMAND")


def test_help_and_version(capsys):
    for argv, word in ((["train", "--help"], "--p-zero"), (["--help"], "COMMAND"), (["--version"], "ezo-kernels")):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0 and word in capsys.readouterr().out

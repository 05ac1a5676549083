"""What is refused, before a step is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from synthetic_idx import make_arrays, write_idx

from ezo_kernels.cli import train as train_module
from ezo_kernels.cli.run import Run
from ezo_kernels.data.files import PARTS
from tests.cli.outcome import refused

#: options of zeroth order, which the other methods do not read, at their defaults: given is what counts
UNREAD = {
    "noise": "gaussian", "p-zero": "0", "rounds": "7", "queries": "1", "mode": "auto", "eps": "1e-3", "clip": "5", "lr": "1e-4",
}  # fmt: skip


@pytest.mark.parametrize(
    "options, said",
    [
        (("--model", "resnet"), "invalid choice: 'resnet'"),
        (("--batch", "many"), "invalid int value: 'many'"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
        (("--epoch", "2"), "unrecognized arguments: --epoch 2"),
        (("--data", "digits", "--data-dir", "."), "digits come with scikit-learn"),
        (("--head", "fc9"), "fc9"),
        (("--head", " , "), "head is ' , ': names with commas"),
        (("--head", "0", "--head-lr", "1"), "--head-lr: no meaning with --head 0"),
        (("--method", "mezo", "--head-lr", "1"), "--head-lr: no meaning with --head 0"),
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
        (("--nodes", "fc9"), "no layer 'fc9'; the trunk's linear layers are fc1"),
        (("--nodes", "conv1,fc3"), "'conv1' (ZOConv2d) is no nn.Linear of the trunk"),
        (("--nodes", "fc1", "--method", "mezo"), "nodes goes with method elastic, in floats, not mezo"),
        (("--nodes", "fc1", "--precision", "int8"), "nodes goes with method elastic, in floats"),
        (("--nodes", "fc1", "--precision", "bf16"), "only float32 is updated this way"),
        (("--nodes", "fc1", "--node-eps", 0), "eps of node_perturbation must be finite and above 0"),
        (("--nodes", ","), "nodes is ',': names with commas are needed"),
        (("--node-lr", 0.5), "--node-lr: no meaning without --nodes"),
        (("--freeze", "conv9"), "freeze: the model has no layer 'conv9'; it has conv1, conv2"),
        (("--freeze", "conv1", "--method", "bp"), "freeze goes with method elastic"),
        (("--hidden", "3"), "--hidden: no meaning with --model lenet5"),
        (("--hidden", "256,128", "--model", "pointnet"), "--hidden: no meaning with --model pointnet"),
        (("--points", "128"), "--points: no meaning with --model lenet5"),
        (("--queries", "4", "--noise", "clt4", "--method", "bp"), "--noise, --queries: no meaning with --method bp"),
        (("--lr", "0.1", "--method", "bp"), "--lr: no meaning with --method bp (its learning rate is --head-lr)"),
        (("--eps", "0", "--method", "mezo"), "eps must be finite and above 0.0, got 0.0"),
        (("--clip", "-1", "--method", "mezo"), "clip must be finite and above 0.0, got -1.0"),
        (("--noise", "sparse_int8", "--method", "mezo"), "use 'sparse' for float weights"),
        (("--mode", "auto", "--method", "mezo"), "--mode: no meaning with --method mezo"),
        (("--antithetic", "--method", "mezo"), "--antithetic: no meaning with --method mezo"),
        *(
            ((f"--{name}", value, "--method", method), f"--{name}: no meaning with --method {method}")
            for method in ("bp", "frozen")
            for name, value in UNREAD.items()
        ),
        (("--resume", "absent.pt"), "absent.pt: no such checkpoint"),
        (("--data-dir", "absent"), "absent: no such file or folder"),
        (("--json", "absent/a.json"), "--json absent/a.json: there is no folder absent"),
        (("--checkpoint", "absent/a.pt"), "--checkpoint absent/a.pt"),
        (("--plot", "absent/a.png"), "--plot absent/a.png"),
        (("--plot", "a.pdf"), "a.pdf: a name that ends in .png"),
        (("--json", "."), "--json .: is a folder"),
        (("--json", "a.png", "--plot", "./a.png"), "--json and --plot name the same file"),
        (("--json", "a", "--checkpoint", "a"), "--checkpoint and --json name the same file"),
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
    for changes, said in (
        ({"model": [1]}, "model is list, dict expected"),
        ({"model": {"fc3.bias": 1}}, "fc3.bias of its model is int, Tensor expected"),
        ({"losses": [1]}, "losses is list, Tensor expected"),
        ({"step": "a"}, "step is str, int expected"),
        ({"step": -1}, "step is -1: it must not be negative"),
        ({"history": [1]}, "a row of its history is int, dict expected"),
        ({"optimizer": [1]}, "optimizer is list, dict expected"),
        ({"recipe": [1]}, "recipe is list, dict expected"),
        ({"recipe": {**contents["recipe"], "head": 5}}, "its recipe does not fit: head is int, str expected"),
        ({"recipe": {**contents["recipe"], "scales": 5}}, "its recipe does not fit: scales is int, str expected"),
        ({"recipe": {**contents["recipe"], "lr": "a"}}, "its recipe does not fit: lr is str, int or float expected"),
    ):
        changed(**changes)
        assert refused(train("--resume", bad), bad, said)
        assert refused(ezo("eval", bad, "--data-dir", folder), bad, said)
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


def test_what_is_read_is_not_written_over(train, ezo, untrained, tmp_path):
    files = {name: tmp_path / f"{name}.png" for name in ("run", "mnist")}
    for path in files.values():
        path.write_bytes(b"of the user")
    run, images = files.values()
    for option in ("--json", "--plot"):
        assert refused(train("--resume", run, option, run), f"--resume and {option} name the same file")
        assert refused(train("--data-dir", images, option, images), f"--data-dir and {option} name the same file")
        assert refused(ezo("cut", "--data-dir", images, option, images), f"--data-dir and {option} name the same file")
    assert refused(
        train("--data-dir", images, "--checkpoint", images), "--data-dir and --checkpoint name the same file"
    )
    assert refused(ezo("eval", run, "--json", run), "--checkpoint and --json name the same file")
    assert refused(ezo("eval", run, "--data-dir", images, "--json", images), "--data-dir and --json name the same file")
    assert refused(ezo("cut", "--json", run, "--plot", run), "--json and --plot name the same file")
    assert all(path.read_bytes() == b"of the user" for path in files.values())


def test_more_than_memory_is_one_line(train, untrained):
    assert refused(train("--model", "pointnet", "--points", 10**12), "Unable to allocate")


def test_defects_of_ours_keep_their_traceback(train, monkeypatch):
    def broken(*a):
        raise AssertionError("a defect")

    monkeypatch.setattr(Run, "_take_step", broken)
    with pytest.raises(AssertionError, match="a defect"):
        train()


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes that break")
def test_a_reader_that_leaves_is_no_error():
    """As in `ezo info | head -1`, which may end before a line is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "ezo_kernels.cli", "info"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes what it hands on")
def test_nobody_has_to_read():
    command = f"exec '{sys.executable}' -m ezo_kernels.cli info >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_traceback_on_request(ezo, tmp_path):
    code, _, err = ezo("--traceback", "eval", tmp_path / "absent.pt")
    assert code == 2 and "Traceback" in err and err.endswith("absent.pt: no such checkpoint\n")

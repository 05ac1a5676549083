"""``ezo data``, ``ezo info`` and the program itself."""

from __future__ import annotations

import json
import sys

import pytest
from synthetic_idx import make_arrays

from ezo_kernels.cli import main
from tests.cli.outcome import refused

download_module = sys.modules["ezo_kernels.data.download"]


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
    assert refused(ezo("info", "--head", "-1"), "head=-1 is outside 0..5")


def test_info_shows_strategies_and_why(ezo):
    code, out, err = ezo(
        "info", "--arch", 90, "--batch", 2048, "--head", 0, "--precision", "bf16", "--noise", "rademacher"
    )
    assert code == 0 and err == "" and "batches of 2048, rademacher, strategies of sm_90" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(("conv", "fc"))}
    assert "slab" in rows["conv2"] and "9,600" in rows["conv2"] and "9.6e+08 products a sign, at least" in rows["conv2"]
    assert "fused" in rows["fc1"] and "no slab: 1.7e+08 products beyond those of 256 rows" in rows["fc1"]
    assert "workspace of perturbed weights, or of a query's parts: 9,830,400 bytes at most" in out
    code, out, _ = ezo("info", "--strategy", "slab", "--model", "pointnet", "--head", 1, "--batch", 3)
    assert code == 0 and out.count("asked for by name") == 7 and "strategies of this device" in out
    code, out, _ = ezo("info", "--precision", "int8")
    assert code == 0 and "workspace of" not in out
    assert refused(ezo("info", "--precision", "int8", "--arch", 90, "--batch", 3), "--batch, --arch: no meaning")
    assert refused(ezo("info", "--batch", 0), "--batch must be at least 1, got 0")
    assert refused(ezo("info", "--arch", -1), "--arch must be at least 0")
    assert refused(ezo("info", "--strategy", "fast"), "strategy must be one of auto, fused")
    assert refused(ezo("info", "--noise", "normal"), "normal")
    assert refused(ezo("info", "--hidden", "a"), "--hidden: no meaning with --model lenet5")
    assert refused(ezo("info", "--hidden", "a", "--model", "mlp"), "hidden is 'a': widths")


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


def test_info_shows_the_head_that_a_training_has(ezo):
    """PointNet's fc2 and fc3 have a batch norm between them, which no training leaves to the trunk."""
    code, out, _ = ezo("info", "--model", "pointnet")
    assert code == 0 and "pointnet, head 2, " in out
    rows = {line.split()[0]: line.split()[2] for line in out.splitlines() if line.startswith(("bn", "fc"))}
    assert {name: rows[name] for name in ("bn6", "fc2", "bn7", "fc3")} == {
        "bn6": "ZO",
        "fc2": "BP",
        "bn7": "BP",
        "fc3": "BP",
    }

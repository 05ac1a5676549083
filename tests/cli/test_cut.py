"""``ezo cut``: what it writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from synthetic_idx import make_arrays, write_idx

import ezo_kernels as ezo
from ezo_kernels.cli import main


@pytest.fixture
def cut(tmp_path, capsys):
    """``ezo cut`` on a small set of images: (exit code, stdout, stderr)."""
    folder = write_idx(tmp_path, make_arrays(train=128))

    def run(*argv):
        code = main(["cut", "--data-dir", str(folder), "--batch", "16", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


MLP = ("--model", "mlp", "--hidden", "8")


def test_ezo_cut(cut, tmp_path):
    code, out, _ = cut(*MLP, "--json", tmp_path / "cut.json", "--plot", tmp_path / "cut.png")
    assert code == 0 and "of the best allowed gain" in out
    record = json.loads((tmp_path / "cut.json").read_text())
    assert len(record["rows"]) == 3 and (tmp_path / "cut.png").exists()
    assert record["batch"] == 16 and record["signal_rows"] == 117  # all there are: 16 batches would be 256
    assert record["precision"] == "fp32" and record["mode"] == "stacked"


def test_ezo_cut_of_pointnet_sees_clouds(cut, tmp_path):
    code, out, err = cut("--model", "pointnet", "--batch", 4, "--json", tmp_path / "cut.json")
    assert code == 0, err
    record = json.loads((tmp_path / "cut.json").read_text())
    assert len(record["rows"]) == 9 and [s["name"] for s in record["signals"]][-1] == "fc3" and "conv5 on" in out
    assert all(row["seconds"] > 0 for row in record["rows"])


def test_ezo_cut_in_16_bits(cut, tmp_path):
    for precision in ("fp32", "bf16"):
        assert cut(*MLP, "--precision", precision, "--json", tmp_path / f"{precision}.json")[0] == 0
    floats, half = (json.loads((tmp_path / f"{p}.json").read_text())["rows"][0]["bytes"] for p in ("fp32", "bf16"))
    assert 0.45 < half / floats < 0.6


def test_ezo_cut_refuses(cut, tmp_path):
    plan = ezo.memory_plan(ezo.models.MLP(784, 8, 10), (torch.zeros(16, 1, 28, 28), torch.zeros(16, dtype=torch.int64)))
    least = min(parts.total for c in plan.cuts for (_, how), parts in c.bytes.items() if how == "sgd")
    for argv, said in (
        (("--memory", 1000), f"the smallest that one does is {least:,}"),
        (("--time", 1e-9), "the smallest that one does is"),
        (("--batch", 1), "--batch must be at least 2"),
        (("--batch", 100000), "a batch of 100000 out of"),
        (("--precision", "int8"), "plan_int8_step"),
        (("--json", tmp_path / "none" / "x.json"), "there is no folder"),
        (("--model", "lenet5"), "--hidden: no meaning with --model lenet5"),
    ):
        code, out, err = cut(*MLP, *argv)
        assert code == 2 and out == "" and err.count("\n") == 1 and said in err, argv

"""``ezo profile``: its figures, its files, and what it refuses."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from synthetic_idx import make_arrays, write_idx

import ezo_kernels as ezo
from ezo_kernels.cli import main
from ezo_kernels.cli.profile import OperandBytes, _rows, copy_bandwidth, table
from tests.test_step import batch, lenet

ROOFLINE = {"id": "roofline/copy", "case": "copy", "device": "cpu", "unit": "bytes", "a_second": 1e9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp("data"), make_arrays(train=128))


@pytest.fixture
def profile(capsys, folder):
    def run(*argv):
        code = main([str(a) for a in ("profile", "--data-dir", folder, "--batch", 4, "--noise", "clt4", *argv)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_figures_and_files(profile, tmp_path):
    roof = tmp_path / "roof.jsonl"
    roof.write_text(json.dumps(ROOFLINE) + "\n")
    code, out, _ = profile("--steps", 3, "--head", "fc3", "--out", tmp_path, "--roofline", roof)
    assert code == 0
    record = json.loads((tmp_path / "profile.json").read_text())
    rows = {row["name"]: row for row in record["operators"]}
    # LeNet-5 with two groups: two convolutions, two hidden layers, one update; nothing else multiplies weights by noise.
    calls = {"ezo::conv2d": 2, "ezo::linear": 2, "ezo::update_": 1, "ezo::fold_key": 1}
    assert {name: rows[name]["calls"] for name in calls} == calls
    for row in record["operators"]:
        assert row["us"] > 0
        if row["bytes"]:
            assert row["roof"] == pytest.approx(row["bytes"] / (row["us"] * 1e-6) / 1e9)
    trunk = sum(p.numel() for n, p in lenet().named_parameters() if not n.startswith("fc3"))
    assert rows["ezo::update_"]["bytes"] == 2 * 4 * trunk + 4 * 1 + 4 * 2  # weights read and written, coef, key
    assert record["kernels"] == [] and record["steps"] == 3 and record["device"] == "cpu"
    assert record["step_us"] > 0 and record["copy_bytes_a_second"] == 1e9
    order = [row["us"] for row in record["operators"]]
    assert order == sorted(order, reverse=True) and record["operators"][0]["name"] in out
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert sum(e.get("name") == "ezo::update_" for e in trace["traceEvents"]) == 3


def test_integers_and_no_files(profile, capsys):
    code = main(["profile", "--data", "digits", "--precision", "int8", "--batch", "4", "--steps", "2", "--top", "3"])
    out, _ = capsys.readouterr()
    assert code == 0 and "noise sparse_int8" in out and "ezo::int8_" in out and "of roof" in out
    assert len([line for line in out.splitlines() if line.rstrip().endswith("more)")]) == 1


def test_rows_that_are_drawn(profile):
    code, out, err = profile("--importance-rows", 2, "--batch", 4, "--steps", 1)
    assert code == 0 and "ezo::importance_rows" in out, err


def test_a_model_of_clouds_gets_clouds(profile):
    code, out, err = profile("--model", "pointnet", "--steps", 1)
    assert code == 0, err
    assert out.startswith("pointnet")


def test_operand_bytes():
    a, b = torch.ones(8), torch.ones(8)
    with OperandBytes() as counter:
        a + b  # two read, one written
        a.add_(b)  # one read, one read and written
        a.copy_(b)
        a.view(2, 4)
        b.expand(100, 8).clone()
        torch.sum(a)
    assert counter.total == {
        "aten::add": 96,
        "aten::add_": 96,
        "aten::copy_": 64,
        "aten::clone": 32 + 3200,
        "aten::sum": 36,
    }


def test_counting_bytes_does_not_change_a_step():
    runs = []
    for counted in (False, True):
        opt = ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]))
        opt.train_step(*batch(4))
        if counted:
            with OperandBytes():
                runs.append(opt.train_step(*batch(4, 2)))
        else:
            runs.append(opt.train_step(*batch(4, 2)))
    assert torch.equal(*runs)


def test_rows_and_table():
    def event(key, us, count):
        return SimpleNamespace(key=key, self_device_time_total=us, count=count)

    events = [event("slow", 300.0, 6), event("fast", 30.0, 3), event("none", 0.0, 3), event("ProfilerStep*", 9.0, 3)]
    rows = _rows(events, lambda e: e.self_device_time_total, 3, {"slow": 2000}, 1e9)
    assert [(r.name, r.us, r.calls, r.bytes) for r in rows] == [("slow", 100.0, 2.0, 2000), ("fast", 10.0, 1.0, None)]
    assert rows[0].roof == pytest.approx(0.02) and rows[1].roof is None
    text = table(rows, 1, "kernel").splitlines()
    assert text[1].split() == ["100.0", "90.9%", "2.0", "50.00", "2.0", "0.02", "2%", "slow"]
    assert text[2].split() == ["10.0", "9.1%", "1.0", "(1", "more)"]


def test_rooflines(tmp_path):
    path = tmp_path / "roof.json"
    path.write_text(
        json.dumps({"suite": "roofline", "cases": [ROOFLINE, {**ROOFLINE, "case": "read", "a_second": 5.0}]})
    )
    assert copy_bandwidth(path, "cpu") == 1e9
    with pytest.raises(ValueError, match="measured on cuda"):
        copy_bandwidth(path, "cuda")
    path.write_text("[not json")
    with pytest.raises(ValueError, match="bench roofline"):
        copy_bandwidth(path, "cpu")
    for raw in (b"\xff\xfe", b'{"cases": null}', b'{"cases": [1]}'):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="roof.json: not a file of python -m bench roofline"):
            copy_bandwidth(path, "cpu")
    for rate in (0, -1.0, None, "fast", True, float("inf"), float("nan")):
        path.write_text(json.dumps({**ROOFLINE, "a_second": rate}))
        with pytest.raises(ValueError, match=f"roof.json: its copy bandwidth is {rate!r}, bytes a second above 0"):
            copy_bandwidth(path, "cpu")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", 0], "--steps is 0"),
        (["--top", 0], "--top is 0"),
        (["--threads", 0], "--threads is 0"),
        (["--out", __file__], "cannot be made: there is a file of that name"),
        (["--bits", "1"], "--bits: no meaning"),
        (["--hidden", "3"], "--hidden: no meaning with --model lenet5"),
        (["--method", "bp"], "--noise: no meaning with --method bp"),
        (["--roofline", "nothing.json"], "nothing.json"),
        (["--max-steps", 3], "--max-steps"),
    ],
)
def test_refusals(profile, options, said):
    code, out, err = profile(*options)
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err


def test_its_folder_is_made_and_its_files_are_checked_first(profile, tmp_path, monkeypatch):
    monkeypatch.setattr("ezo_kernels.cli.profile.measure", lambda *a: pytest.fail("it measures before it complains"))
    own = tmp_path / "a" / "profile.json"
    assert "fc9" in profile("--out", own.parent, "--head", "fc9")[2] and not own.parent.exists()
    (tmp_path / "b" / "trace.json").mkdir(parents=True)
    assert "trace.json: is a folder" in profile("--out", tmp_path / "b")[2]
    own.parent.mkdir()
    own.write_text(json.dumps(ROOFLINE))
    assert "--roofline and --out name the same file" in profile("--out", own.parent, "--roofline", own)[2]
    monkeypatch.undo()
    code, _, err = profile("--out", tmp_path / "new" / "er", "--steps", 1)
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "new" / "er").iterdir()) == ["profile.json", "trace.json"]

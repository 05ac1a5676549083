"""The committed tables are what the committed result files say."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from bench import memory, plots, report, static, targets
from bench.derivative import cosine


def test_tables_are_generated(capsys):
    assert report.run(argparse.Namespace(check=True)) == 0, capsys.readouterr().out


def test_bytes_of_an_integer_step_are_those_of_the_file():
    rows = json.loads((report.RESULTS / "memory.json").read_text())["rows"]
    for row in (row for row in rows if row["batch"] == 32):
        found = memory.int8_bytes(32, row["strategy"])
        assert {name: row[name] for name in found} == found, row["strategy"]


def test_a_stale_table_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for name in report.TABLES:
        text = (report.ROOT / name).read_text()
        (tmp_path / name).write_text(text.replace("| mnist |", "| other |").replace("CPU, one thread", "nothing"))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.run(argparse.Namespace(check=True)) == 1
    assert report.run(argparse.Namespace(check=False)) == 0
    assert report.run(argparse.Namespace(check=True)) == 0


def test_missing_markers_are_an_error():
    with pytest.raises(ValueError, match="markers"):
        report.between("no markers", "results", "table")


def test_goals_say_the_worst_figure_and_whether_it_is_enough(tmp_path, monkeypatch):
    shape = dict(n=4096, k=4096, rows=2048, dtype="bfloat16", by="graph")
    cases = [
        {"id": "a::two", "case": "two plain", "us": 90.0, **shape},
        {"id": "a::one", "case": "one plain", "us": 80.0, **shape},
        {"id": "a::h", "case": "fused", "noise": "hadamard", "strategy": "auto", "us": 80.0, **shape},
        {"id": "a::g", "case": "fused", "noise": "gaussian", "strategy": "auto", "us": 160.0, **shape},
    ]
    record = {
        "suite": "linear",
        "status": "partial",
        "environment": {"gpu": "Some GPU"},
        "cases": cases,
        "not_run": [1],
    }
    assert "| linear, 2048 rows, every noise | 0.8 | 0.92 | not measured |" in report.goals()
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "gpu_linear.json").write_text(json.dumps(record))
    table = report.goals()
    assert "| linear, 2048 rows, every noise | 0.8 | 0.92 | 0.5 to 1 (2): missed |" in table
    assert "Measured on Some GPU" in table and table.count("not measured") == len(targets.TARGETS) - 1
    assert "| g | 160.0 | graph |" in report.speed() and "linear: partial, 1 cases not run" in report.speed()
    assert plots.draw({"linear": cases}, tmp_path) == ["linear.svg"]
    assert "gaussian" in (tmp_path / "linear.svg").read_text() and plots.draw({}, tmp_path) == []


def test_a_lower_time_is_the_better_one():
    row = next(t for t in targets.TARGETS if t.lower and t.must == 80)
    cases = [{"case": "captured", "head": "pure ZO", "us": us} for us in (85.0, 79.0)]
    assert targets.cell(row, {"step": cases}) == "79: reached"
    assert targets.cell(row, {"step": cases[:1]}) == "85: missed"


def test_a_cosine_and_an_efficiency_for_each_strategy():
    shape = dict(c=64, o=64, size=32, dtype="bfloat16")
    cases = [
        {"case": "two plain", "us": 40.0, **shape},
        {"case": "fused", "strategy": "fused", "us": 160.0, "cosine": 0.98, **shape},
        {"case": "fused", "strategy": "auto", "us": 50.0, "cosine": 0.999, **shape},
    ]
    results = {"conv2d": cases, "linear": [{"strategy": "auto", "cosine": 0.995, "dtype": "bfloat16"}]}
    rows = {row.work: targets.cell(row, results) for row in targets.TARGETS}
    assert rows["conv2d, 64 to 256 channels, 32x32 and 56x56, batch 128"] == "0.8: missed"
    assert rows["the same, no workspace"] == "0.25"
    assert rows["cosine of the measured derivative, eps 1e-3: by auto"] == "0.995 to 0.999 (2): reached"
    assert rows["the same, fused"] == "0.98: missed" and rows["the same, slab"] == "not measured"
    x, z = torch.randn(3, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    plain, along = torch.randn(3, 4, dtype=torch.float64), x @ z.T
    assert cosine(torch.cat([plain + along, plain - along]), along[:2]) == pytest.approx(1.0)
    assert cosine(torch.cat([plain - along, plain + along]), along) == pytest.approx(-1.0)


def test_the_static_reports_are_of_what_there_is_and_of_one_compiler_run():
    """The table's file and the six whole ones: every variant that there is, and where both have one the same counts."""
    pytest.importorskip("triton")
    counts = ("registers", "spill_bytes", "local_bytes", "shared_bytes", "matrix_instructions", "instructions")
    table = {
        (row["variant"], row["arch"]): row for row in json.loads((report.RESULTS / "static.json").read_text())["rows"]
    }
    assert set(table) == set(static.tested())
    for arch in static.ARCHS:
        rows = {
            row["variant"]: row for row in json.loads((report.RESULTS / f"static_sm{arch}.json").read_text())["rows"]
        }
        assert set(rows) == {name for name, variant in static.variants().items() if arch in variant.archs}
        for name, row in rows.items():
            other = table.get((name, arch), row)
            assert {k: row[k] for k in counts} == {k: other[k] for k in counts}, (name, arch)

"""The committed tables are what the committed result files say."""

from __future__ import annotations

import argparse

import pytest

from bench import report


def test_tables_are_generated(capsys):
    assert report.run(argparse.Namespace(check=True)) == 0, capsys.readouterr().out


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

"""The machinery that measures: order, shares of time, resuming, suites that die; roofline, timing and the suites on a CPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import conftest, gpu, report, roofline
from bench.conftest import read_lines
from bench.gpu import Suite
from bench.mezo_graph import GraphMeZO
from bench.timing import copies, launches, rotate, rounds_for
from ezo_kernels.optim.baselines import MeZO

CASES = """
import os, pathlib, time, pytest
@pytest.mark.parametrize("case", ["first", "second", "third"])
def test_case(benchmark, case):
    calls = pathlib.Path(__file__).with_suffix(".calls")
    calls.write_text((calls.read_text() if calls.exists() else "") + case + " ")
    {act}
    benchmark.extra_info.update(case=case, device="cpu")
    benchmark.pedantic(lambda: None, rounds=2)
"""


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    """A child of a worker of xdist is no worker: pytest-benchmark would time nothing in it."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


def suite(folder, name: str, act: str = "pass", share: float = 1.0) -> Suite:
    path = folder / f"bench_{name}.py"
    path.write_text(CASES.format(act=act))
    return Suite(name, share, ("pytest", str(path), "-p", "bench.conftest"))


def first_tests(folder, passes: bool = True) -> Suite:
    path = folder / "test_first.py"
    path.write_text(f"def test_first():\n    assert {passes}\n")
    return Suite("tests", 1, ("pytest", str(path)))


def drive(out, suites, first, limit: float = 300.0, keep_going: bool = False):
    args = argparse.Namespace(out=out, limit=limit, suites=None, device="cpu", quick=True, keep_going=keep_going)
    return gpu.run(args, suites, first)


def result(out, name: str) -> dict:
    return json.loads((out / f"cpu_{name}.json").read_text())


def calls(folder, name: str) -> list[str]:
    return (folder / f"bench_{name}.calls").read_text().split()


def test_a_run_writes_its_files_and_a_second_measures_nothing_again(tmp_path, capsys, monkeypatch):
    out, suites = tmp_path / "out", [suite(tmp_path, "one")]
    assert drive(out, suites, first_tests(tmp_path)) == 0
    record = result(out, "one")
    assert record["status"] == "finished" and record["not_run"] == []
    assert [c["case"] for c in record["cases"]] == ["first", "second", "third"]
    assert all(c["us"] > 0 and c["by"] == "wall clock" and c["device"] == "cpu" for c in record["cases"])
    here = record["environment"]
    # a wheel of the registry has its CUDA in torch.__version__ alone
    assert here["device"] == "cpu" and torch.__version__.startswith(here["torch"])
    assert {"commit", "sources", "triton", "cupy", "cuda", "python"} <= set(here)
    assert sorted(p.name for p in out.iterdir()) == ["cpu_one.json", "cpu_tests.json"]
    assert drive(out, suites, first_tests(tmp_path)) == 0
    assert "one: finished before" in capsys.readouterr().out and len(calls(tmp_path, "one")) == 3
    monkeypatch.setattr(gpu, "sources", lambda: "others")  # other sources: the figures are of something else
    assert drive(out, suites, first_tests(tmp_path)) == 0
    assert len(calls(tmp_path, "one")) == 6


def test_red_tests_stop_everything(tmp_path, capsys):
    out = tmp_path / "out"
    assert drive(out, [suite(tmp_path, "one")], first_tests(tmp_path, passes=False)) == 1
    assert "nothing is timed" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["cpu_tests.json"] and result(out, "tests")["status"] == "failed"


def test_red_tests_are_on_record_if_it_is_to_keep_going(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert drive(out, [suite(tmp_path, "one")], first_tests(tmp_path, passes=False), keep_going=True) == 1
    assert "not green: it goes on" in capsys.readouterr().err
    record = result(out, "one")
    assert record["status"] == "finished" and len(record["cases"]) == 3 and record["tests"] == "not green"
    record["environment"]["gpu"] = "a GPU"
    monkeypatch.setattr(report, "gpu_records", lambda: [record])
    assert "not green before one" in report.goals()
    assert drive(tmp_path / "green", [suite(tmp_path, "two")], first_tests(tmp_path), keep_going=True) == 0
    assert "tests" not in result(tmp_path / "green", "two")


def test_a_suite_that_dies_keeps_its_cases_and_the_next_one_runs(tmp_path):
    died = tmp_path / "died"
    act = f"died = pathlib.Path({str(died)!r})"
    act += '; case == "second" and not died.exists() and (died.touch(), os.kill(os.getpid(), 9))'
    out, suites = tmp_path / "out", [suite(tmp_path, "one", act), suite(tmp_path, "two")]
    assert drive(out, suites, first_tests(tmp_path)) == 3
    assert result(out, "one")["status"] == "killed" and [c["case"] for c in result(out, "one")["cases"]] == ["first"]
    assert [(r["id"][-8:], r["outcome"]) for r in result(out, "one")["not_run"]] == [("[second]", "begun")]
    assert result(out, "two")["status"] == "finished"
    assert drive(out, suites, first_tests(tmp_path)) == 0  # goes on where it was killed
    assert calls(tmp_path, "one") == ["first", "second", "third", "second"] and len(calls(tmp_path, "two")) == 3
    assert len(result(out, "one")["cases"]) == 3 and result(out, "one")["not_run"] == []


def test_what_finds_no_time_is_recorded_as_not_run(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    one = suite(tmp_path, "one", 'time.sleep(4 if case == "second" else 0)')
    here = gpu.environment("cpu")
    record = gpu.run_suite(one, out / "cpu_one.json", here, 3.0, 60.0, "cpu", True)
    assert record["status"] == "partial"
    assert [(r["reason"], r["id"][-7:]) for r in record["not_run"]] == [("no time left", "[third]")]
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    hangs = suite(tmp_path, "hangs", "time.sleep(600)")
    assert gpu.run_suite(hangs, out / "cpu_hangs.json", here, 2.0, 2.0, "cpu", True)["status"] == "killed"
    assert drive(tmp_path / "none", [one], first_tests(tmp_path), limit=gpu.LEAST - 1) == 3
    assert result(tmp_path / "none", "one")["status"] == "not run" == result(tmp_path / "none", "tests")["status"]


def test_a_failing_case_is_named_and_the_others_are_measured(tmp_path):
    out = tmp_path / "out"
    assert drive(out, [suite(tmp_path, "one", 'assert case != "second", "wrong numbers"')], first_tests(tmp_path)) == 3
    record = result(out, "one")
    assert record["status"] == "failed" and len(record["cases"]) == 2
    assert record["not_run"][0]["outcome"] == "failed" and "wrong numbers" in record["not_run"][0]["reason"]


def test_a_case_that_loses_the_device_ends_its_suite_and_is_tried_last(tmp_path):
    """After an illegal access nothing runs in the process: the others are for the next one."""
    act = """
    def lost():
        raise RuntimeError("CUDA error")
    if case == "second":
        import torch
        torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost
        lost()
"""
    out, suites = tmp_path / "out", [suite(tmp_path, "one", act), suite(tmp_path, "two")]
    for found in (1, 2):
        assert drive(out, suites, first_tests(tmp_path)) == 3
        assert len(result(out, "one")["cases"]) == found and result(out, "two")["status"] == "finished"
        assert [r["outcome"] for r in result(out, "one")["not_run"]] == ["failed"]
    assert calls(tmp_path, "one") == ["first", "second", "third", "second"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_figures_of_a_cpu_stay_out_of_the_results(capsys):
    before = sorted(gpu.RESULTS.iterdir())
    for device, out in (("cpu", None), ("cuda", None)):
        assert (
            gpu.run(argparse.Namespace(out=out, limit=9.0, suites=None, device=device, quick=False, keep_going=False))
            == 2
        )
    errors = capsys.readouterr().err
    assert "name a folder with --out" in errors and "needs a CUDA device" in errors
    assert sorted(gpu.RESULTS.iterdir()) == before


def test_every_suite_has_its_file_and_time_for_all_is_under_nine_minutes():
    for s in gpu.SUITES:
        assert s.command[0] == "bench" or (gpu.ROOT / s.command[1]).exists(), s.name
    parser = argparse.ArgumentParser()
    gpu.configure(parser)
    assert parser.parse_args([]).limit < 540


def test_a_suite_of_the_library_runs_on_a_cpu(tmp_path):
    lines = tmp_path / "lines"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/bench_embedding.py", "bench/bench_lm.py", "-q", "-p", "no:cacheprovider",
         "--benchmark-only", "--device", "cpu", "--lines", str(lines), *gpu.QUICK,
         "-k", "embedding and (plain or hadamard) or lm and (plain or sequential and hadamard)"],
        cwd=gpu.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    records = {(r["id"].split("::")[0][6:], r["case"]): r for r in read_lines(lines)}
    assert set(records) == {
        ("bench_embedding.py", "two plain"), ("bench_embedding.py", "one plain"), ("bench_embedding.py", "fused"),
        ("bench_lm.py", "two plain"), ("bench_lm.py", "one plain"), ("bench_lm.py", "sequential"),
    }  # fmt: skip
    assert records["bench_lm.py", "sequential"]["parameters"] == 2 * 12 * 32**2 + 2 * 13 * 32 + (96 + 16 + 2) * 32
    assert all(r["us"] > 0 for r in records.values())


def test_roofline_measures_every_roof_of_a_cpu():
    records = {r["case"]: r for r in roofline.measure("cpu", (1 << 16, 32))}
    assert set(records) == {"copy", "read", "bf16", "fp16", "fp32", "int8"}
    assert records["copy"]["a_second"] == pytest.approx(1e6 * 2 * (1 << 16) / records["copy"]["us"])
    assert records["fp32"]["unit"] == "operations" and records["read"]["unit"] == "bytes"


def test_roofline_refuses_a_wrong_product(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.float() @ b.float()).int() + 1)
    with pytest.raises(AssertionError, match="int8 product"):
        list(roofline.measure("cpu", (1 << 12, 32)))


def test_mezo_of_a_graph_is_mezo():
    """Its loop without the host: the same weights after three steps, drawn or kept."""
    x, y = torch.randn(8, 12, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

    zo = dict(lr=1e-2, eps=1e-2, seed=5, clip=2.0)
    for keep in (False, True):
        ours, theirs = GraphMeZO(model(), keep_z=keep, **zo), MeZO(model(), **zo)
        for _ in range(3):
            assert ours.train_step(x, y).item() == pytest.approx(theirs.train_step(x, y).item(), rel=1e-5)
        for a, b in zip(ours.params, theirs.trunk, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_rotation_goes_round_and_rounds_fit_the_time():
    seen = []
    run = rotate(seen.append, [1, 2, 3])
    for _ in range(4):
        run()
    assert seen == [1, 2, 3, 1] and run.turns == 3 and copies(torch.zeros(9)) == 1
    assert rounds_for(1.0) == 5 and rounds_for(1e-6) == 100 and rounds_for(0.01) == 30


def test_copies_fill_200_mb_as_long_as_a_graph_of_them_is_not_endless():
    def on_a_gpu(size):
        return SimpleNamespace(is_cuda=True, numel=lambda: size // 2, element_size=lambda: 2)

    assert copies(on_a_gpu(1 << 25)) == 7 and copies(on_a_gpu(2400)) == 600


def test_launches_are_kernels_and_no_spans_of_an_optimizer(monkeypatch):
    def event(name, device=DeviceType.CUDA, annotation=False):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    events = [event("kernel"), event("Memcpy DtoD"), event("Optimizer.step#MeZO.step", annotation=True)]
    seen = SimpleNamespace(events=lambda: [*events, event("aten::mm", DeviceType.CPU)])
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(seen))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert launches(lambda: None) == 1


def test_fp32_of_a_suite_is_not_tf32(monkeypatch):
    """TF32 in MeZO's convolutions moves the losses of five steps by up to 4e-3, where they are compared to 1e-4."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    conftest.pytest_configure(SimpleNamespace(stash={}))
    assert not torch.backends.cudnn.allow_tf32


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"id": "a", "outcome": "measured"}\n{"id": "b", "outc')
    assert [r["id"] for r in read_lines(path)] == ["a"] and read_lines(tmp_path / "none") == []


def test_what_cannot_be_measured_or_written_is_refused_first(monkeypatch, capsys, tmp_path):
    from bench import __main__ as program

    for name in ("memory", "estimate", "cpu", "roofline"):
        monkeypatch.setattr(program.COMMANDS[name], "run", lambda args: pytest.fail("it measures before it complains"))
    for name, option in (("memory", "--json"), ("estimate", "--json"), ("cpu", "--json"), ("roofline", "--lines")):
        with pytest.raises(SystemExit) as end:
            program.main([name, option, str(tmp_path / "no" / "a.json")])
        assert end.value.code == 2 and f"{option} {tmp_path}/no/a.json: there is no folder" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["roofline", "--device", "cuda"]) == 2 and "none is visible" in capsys.readouterr().err

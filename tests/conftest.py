"""Fixtures and rules of every test: counted skips, poisoned outputs, the device."""

from __future__ import annotations

import collections
import sys

import offline
import pytest
import torch

NO_GPU = "needs a CUDA device, and torch.cuda is not available"


def pytest_collection_modifyitems(items):
    # minutes each: begun last, one of them would run alone at the end
    items.sort(key=lambda item: item.get_closest_marker("interpret") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter):
    """How many tests did not run, and why: a skip that nobody counts is a test that nobody has."""
    reasons = collections.Counter()
    for report in terminalreporter.stats.get("skipped", []):
        where = report.longrepr
        reasons[where[2].removeprefix("Skipped: ") if isinstance(where, tuple) else str(where)] += 1
    terminalreporter.section("skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5d}  {reason}")
    if not reasons:
        terminalreporter.line("    0  nothing was skipped")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test reaches beyond this machine."""
    offline.guard(monkeypatch)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill uninitialised memory with NaN, or with bytes 0x7f for integers, so that an element never written shows."""
    if t.device.type == "meta" or type(t) is not torch.Tensor or not t.numel():
        return t
    if t.is_floating_point() or t.is_complex():
        return t.fill_(float("nan"))
    return t.fill_(int.from_bytes(b"\x7f" * t.element_size(), "little") if t.dtype != torch.bool else True)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """``torch.empty`` and its kin, when the library calls them, return poison instead of whatever was there."""

    def wrap(owner, name):
        original = getattr(owner, name)

        def empty(*args, **kwargs):
            t = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return poison(t) if caller.split(".")[0] == "ezo_kernels" else t

        monkeypatch.setattr(owner, name, empty)

    for name in ("empty", "empty_like", "empty_strided"):
        wrap(torch, name)
    wrap(torch.Tensor, "new_empty")
    wrap(torch.Tensor, "new_empty_strided")


@pytest.fixture
def quick(tmp_path, capsys):
    """``ezo experiment NAME --quick`` into a folder of the test's: (exit code, stdout, stderr)."""

    from ezo_kernels.cli import main

    def run(name, *argv):
        code = main([str(arg) for arg in ("experiment", name, "--quick", "--out", tmp_path, *argv)])
        return code, *capsys.readouterr()

    return run

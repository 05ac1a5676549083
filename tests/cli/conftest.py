"""The program, run in this process on small files that the tests write."""

from __future__ import annotations

import pytest
from synthetic_idx import make_arrays, write_idx

from ezo_kernels.cli import main
from ezo_kernels.cli.run import Run


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
        # neither method reads a noise, and a resumed run knows its own
        noise = () if {"bp", "frozen", "--resume"} & set(argv) else ("--noise", "clt4")
        return ezo("train", "--data-dir", folder, "--batch", 16, "--epochs", 2, *noise, *argv)

    return run


@pytest.fixture
def untrained(monkeypatch):
    """Fails the test if a single step is taken."""
    monkeypatch.setattr(Run, "_take_step", lambda *a: pytest.fail("it trains before it complains"))

"""Runs tests/interpret in Triton's interpreter, which is chosen when triton is imported: a process of its own."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

FOLDER = pathlib.Path(__file__).parent / "interpret"


@pytest.mark.interpret
def test_kernels_in_the_interpreter(record_property):
    """Every test there passes, none is skipped, and there are some in each file."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(FOLDER)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parent.parent,
        capture_output=True,
        text=True,
    )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped|xfailed)", run.stdout)}
    record_property("interpreter", counts)
    print(counts)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert set(counts) == {"passed"}
    for path in FOLDER.glob("test_*.py"):
        assert re.search(rf"PASSED \S*{path.name}::", run.stdout), f"nothing in {path.name} ran"

"""The kernels on the CPU, each of two ways in a process of its own, which chooses it when triton is imported.

In Triton's interpreter, tests/interpret; and compiled for sm_90, their PTX carried out by tests/ptx: tests/compiled, and of
tests/interpret what is listed here. Any file of either folder runs in the second way with EZO_TESTS_PTX=90 (or 80) and a
TRITON_CACHE_DIR of its own, in the first with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from bench import csrc  # noqa: E402

FOLDER = pathlib.Path(__file__).parent
#: of tests/interpret what runs as it is compiled, which is as quick and shows more
COMPILED = ("batch_norm", "coefficients", "conv2d", "cross_entropy", "dropout", "int8", "int8_signs", "int8_step")
#: what the interpreter's products are made by: of OpenBLAS's kernels for x86 one that gives a row the same bits wherever it
#: lies, as a tensor core does; those of Haswell, which it takes where there is no AVX-512, do not
SAME_ROWS = "Nehalem"


def run(files: list[pathlib.Path], record_property, name: str, *options: str, **environment: str) -> None:
    """Every test of these files passes, none is skipped, and there are some in each."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *options, *map(str, files)],
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
    )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped|xfailed)", done.stdout)}
    record_property(name, counts)
    print(counts)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert set(counts) == {"passed"}
    for path in files:
        assert re.search(rf"PASSED \S*{path.parent.name}/{path.name}::", done.stdout), f"nothing in {path.name} ran"


@pytest.mark.interpret
def test_kernels_in_the_interpreter(record_property):
    compiled = {f"test_{name}.py" for name in COMPILED}
    files = [path for path in sorted((FOLDER / "interpret").glob("test_*.py")) if path.name not in compiled]
    run(files, record_property, "interpreter", TRITON_INTERPRET="1", OPENBLAS_CORETYPE=SAME_ROWS)


AS_COMPILED = {"EZO_TESTS_PTX": "90"}
CUDA = FOLDER / "compiled" / "test_cuda_update.py"


@pytest.mark.interpret
def test_kernels_as_they_are_compiled(record_property, tmp_path):
    files = [FOLDER / "interpret" / f"test_{name}.py" for name in COMPILED]
    files += [path for path in sorted(CUDA.parent.glob("test_*.py")) if path != CUDA]
    run(files, record_property, "compiled", TRITON_CACHE_DIR=str(tmp_path), **AS_COMPILED)


@pytest.mark.interpret
@pytest.mark.skipif(csrc.nvrtc() is None, reason="needs NVRTC")
def test_cuda_as_it_is_compiled(record_property, tmp_path):
    run([CUDA], record_property, "compiled CUDA", TRITON_CACHE_DIR=str(tmp_path), **AS_COMPILED)


@pytest.mark.interpret
def test_tests_of_a_gpu_run_without_one(record_property, tmp_path):
    """A few of them; for all, which take long, see tests/ptx/as_gpu.py."""
    options = ("-p", "tests.ptx.as_gpu", "-m", "gpu", "-k", "coefficients or keys or squared_error")
    files = [FOLDER / f"test_{name}.py" for name in ("gpu", "int8_losses")]
    run(files, record_property, "as a GPU", *options, TRITON_CACHE_DIR=str(tmp_path), **AS_COMPILED)

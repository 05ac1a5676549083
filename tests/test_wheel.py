"""What a user installs: one top-level name, the files that are no modules, and the version."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ezo_kernels

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, built in a copy of it: what an earlier build left in build/ cannot get in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("ezo_kernels", "bench", "tests", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.splitlines()[-1])


def test_the_wheel_has_one_top_level_name(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"ezo_kernels", f"ezo_kernels-{ezo_kernels.__version__}.dist-info"}


def test_the_wheel_has_every_file_of_the_package(wheel):
    names = set(wheel.namelist())
    package = ROOT / "ezo_kernels"
    wanted = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert {"ezo_kernels/py.typed", "ezo_kernels/data/mnist_validation.txt"} <= wanted
    assert {f"ezo_kernels/ops/csrc/{name}" for name in ("ezo_noise.cuh", "ezo_update.cuh", "update.cu")} <= wanted
    assert wanted - names == set()


def test_the_wheel_says_what_it_needs(wheel):
    info = f"ezo_kernels-{ezo_kernels.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    for line in (
        "Name: ezo-kernels",
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
        "Requires-Dist: torch>=2.8",
        *(f"Provides-Extra: {extra}" for extra in ("cuda12", "cuda13", "bench", "dev")),
    ):
        assert line in metadata.splitlines(), line
    assert "ezo = ezo_kernels.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def test_the_version_is_said_once():
    assert importlib.metadata.version("ezo-kernels") == ezo_kernels.__version__


def test_the_constraints_fit_the_requirements():
    """The tested set is one that the library's own bounds allow, and torch's triton is its own."""
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {
        r.name: next(iter(r.specifier)).version
        for r in map(Requirement, filter(bool, [x for x in lines if x[0] != "#"]))
    }
    assert pinned["torch"] == "2.13.0" and pinned["triton"] == "3.7.1" and pinned["numpy"].startswith("2.4.")
    needed = [Requirement(text) for text in importlib.metadata.requires("ezo-kernels")]
    for requirement in needed:
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement

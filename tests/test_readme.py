"""The README: its examples run, its commands exist, its map is of this tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^### (.+?)$.*?^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_no_example_is_missed():
    assert len(BLOCKS) == README.count("```python\n") == 6


@pytest.mark.parametrize("title, code", BLOCKS, ids=[title for title, _ in BLOCKS])
def test_examples_run(title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Where it stands in the file, so that a traceback shows the line of the README.
    line = README[: README.index(code)].count("\n")
    names: dict = {}
    exec(compile("\n" * line + code, str(ROOT / "README.md"), "exec"), names)
    assert names["opt"].skipped.item() == 0 and names["opt"].step_count.item() > 0


def test_the_first_words_are_the_two_commands():
    goals = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE)) == {"train", "test"} <= goals


def test_the_layout_is_of_this_tree():
    layout = README.split("## Layout")[1].split("```")[1]
    folder = ""
    for line in layout.strip("\n").splitlines():
        name = line.split()[0]
        if line[0] != " ":
            folder = name if name.endswith("/") else ""
            assert (ROOT / name).exists(), name
        else:
            assert (ROOT / folder / name).is_dir(), folder + name
    for word in ("ezo_kernels", "ops", "models", "bench", "tests", "pyproject.toml", "README.md"):
        assert word in layout


def test_links_and_files_named_exist():
    for text in (README, CONTRIBUTING):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / target).exists(), target
    for name in re.findall(r"(?:ezo_kernels|bench|tests|tools|docs|ops)/[\w/.*]+", CONTRIBUTING):
        assert any(ROOT.glob(name)) or any(ROOT.glob(f"ezo_kernels/{name}")) or "NAME" in name, name
    for goal in re.findall(r"^make (\w+)", CONTRIBUTING, re.MULTILINE):
        assert re.search(rf"^{goal}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), goal

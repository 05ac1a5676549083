"""Do the tests notice? Applies named one-line bugs to a copy of the repository, one at a time, and runs a few tests on each.

    python tools/mutants.py                 all of them
    python tools/mutants.py sign eps        those whose name holds one of the words
    python tools/mutants.py --list

Exit status 0: every mutant was killed. 1: one survived. 2: the table is out of date (a line is not found exactly once), the
tests fail without any mutant, or a run broke before it reached a test. The working tree is never written.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mutant_table import MUTANTS, Mutant  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 600


class TableError(Exception):
    """The table does not fit the code."""


@dataclass(frozen=True)
class Verdict:
    mutant: str
    outcome: str  # killed, SURVIVED, BROKEN
    seconds: float
    detail: str


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The file's text with the bug in it."""
    path = root / mutant.file
    if not path.exists():
        raise TableError(f"{mutant.name}: there is no {mutant.file}")
    text = path.read_text()
    count = text.count(mutant.old)
    if count != 1:
        raise TableError(f"{mutant.name}: found {count} times in {mutant.file}, not once:\n    {mutant.old}")
    if mutant.old == mutant.new:
        raise TableError(f"{mutant.name}: changes nothing")
    return text.replace(mutant.old, mutant.new)


def copy_repository(to: Path) -> Path:
    """Everything that git knows or does not ignore, and compiled CPU kernels that are still valid for it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    caches = (str(p.relative_to(ROOT)) for p in ROOT.glob("ezo_kernels/**/__pycache__/*.nb*"))
    for name in {*filter(None, listed), *caches}:
        with contextlib.suppress(FileNotFoundError):  # deleted, and not yet so in the index
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def run_tests(where: Path, tests: str) -> tuple[int, str]:
    """pytest's exit status and output in a copy; the copy's own package is what it imports.

    Kernels run interpreted, or as they are compiled for sm_90.
    """
    environment = {**os.environ, "PYTHONPATH": str(where), "PYTHONDONTWRITEBYTECODE": "1"}
    if tests.startswith("tests/interpret/"):
        environment["TRITON_INTERPRET"] = "1"
    if tests.startswith("tests/compiled/"):
        environment |= {"EZO_TESTS_PTX": "90", "TRITON_CACHE_DIR": str(where / ".triton")}
    check = f"import ezo_kernels, sys; sys.exit(not ezo_kernels.__file__.startswith({str(where)!r}))"
    subprocess.run([sys.executable, "-c", check], cwd=where, env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-x", *shlex.split(tests)]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    return done.returncode, done.stdout + done.stderr


def judge(mutant: Mutant, where: Path) -> Verdict:
    start, path = time.monotonic(), where / mutant.file
    sound = path.read_text()
    try:
        path.write_text(mutated(mutant, where))
        status, output = run_tests(where, mutant.tests)
    except subprocess.TimeoutExpired:
        status, output = -1, f"no end after {LIMIT_S} s"
    finally:
        path.write_text(sound)
    seconds = time.monotonic() - start
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if status == 1 and failed:
        return Verdict(mutant.name, "killed", seconds, failed[0].rpartition("/")[2])
    if status == 0:
        return Verdict(mutant.name, "SURVIVED", seconds, mutant.tests)
    return Verdict(mutant.name, "BROKEN", seconds, output.strip().splitlines()[-1] if output.strip() else str(status))


class Copies:
    """Copies of the repository, each used by one task at a time."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.pool = concurrent.futures.ThreadPoolExecutor(jobs)
        self.free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(jobs):
            self.free.put(copy_repository(folder / str(job)))

    def map(self, task, items) -> list:
        """``task(item, copy)`` of every item."""

        def one(item):
            where = self.free.get()
            try:
                return task(item, where)
            finally:
                self.free.put(where)

        return list(self.pool.map(one, items))


def report(verdict: Verdict) -> Verdict:
    print(f"{verdict.outcome:8s} {verdict.seconds:5.0f} s  {verdict.mutant:40s} {verdict.detail}", flush=True)
    return verdict


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose name holds one of these words")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    arguments = parser.parse_args(argv)
    mutants = [m for m in MUTANTS if not arguments.words or any(w in m.name for w in arguments.words)]
    try:
        if len({m.name for m in MUTANTS}) != len(MUTANTS) or not mutants:
            raise TableError("no such mutant" if not mutants else "two mutants have one name")
        for mutant in mutants:
            mutated(mutant)
    except TableError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(f"{m.name:44s} {m.file}" for m in mutants))
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = Copies(Path(folder), arguments.jobs)
        selections = sorted({m.tests for m in mutants})
        sound = copies.map(lambda tests, where: run_tests(where, tests), selections)
        for tests, (status, output) in zip(selections, sound, strict=True):
            if status:
                print(f"{output}\n{tests} fails without any mutant: nothing can be said.", file=sys.stderr)
                return 2
        print(f"{len(mutants)} mutants; their tests pass without them", flush=True)
        verdicts = copies.map(lambda mutant, where: report(judge(mutant, where)), mutants)
    count = {outcome: sum(v.outcome == outcome for v in verdicts) for outcome in ("killed", "SURVIVED", "BROKEN")}
    print(f"\n{count['killed']} killed, {count['SURVIVED']} survived, {count['BROKEN']} broken, of {len(verdicts)}")
    return 2 if count["BROKEN"] else 1 if count["SURVIVED"] else 0


if __name__ == "__main__":
    sys.exit(main())

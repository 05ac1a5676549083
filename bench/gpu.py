"""Everything that needs a GPU: its tests first, then every suite in order of importance; one JSON a suite.

    python -m bench gpu                                                    writes bench/results/gpu_<suite>.json
    python -m bench gpu --device cpu --quick --out DIR --suites update     the same machinery where there is no GPU

Nothing is timed unless the tests are green: a wrong kernel has no speed. With --keep-going what follows is timed all the same,
if a case's own comparison with the reference holds, and its record says that the tests were not green. Each suite runs in a
process of its own and has a share of the time; what a suite leaves is the others'. A case that finds no time left, and a suite
that was killed, are recorded as such. A second run goes on: what was measured with the same sources on the same machine is not
measured again, and a case that failed or did not end is tried after the others.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.conftest import read_lines

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
#: Seconds below which a suite is not begun, and that a suite has to end by itself when its time is over.
LEAST, GRACE = 15.0, 20.0
#: Processes of the tests: each has a context on the GPU, of about half a GiB.
MOST_PROCESSES = 16
#: pytest-benchmark's wall clock, as short as it goes: the cases are run, the figures are worth little.
QUICK = ("--benchmark-max-time=0.001", "--benchmark-min-rounds=2", "--benchmark-min-time=0.000001")


@dataclass(frozen=True)
class Suite:
    """A name, a share of what time is left, and the arguments of ``python -m``."""

    name: str
    share: float
    command: tuple[str, ...]

    @classmethod
    def of_file(cls, name: str, share: float) -> Suite:
        return cls(name, share, ("pytest", f"bench/bench_{name}.py", "--benchmark-only"))


#: What has to be green, by device. On a CPU the few that say that the reference works.
TESTS = {
    "cuda": Suite("tests", 4, ("pytest", "tests", "-m", "gpu")),
    "cpu": Suite("tests", 4, ("pytest", "tests/test_losses.py", "-m", "not gpu")),
}
#: In order of importance: the first ones are measured if time is short.
SUITES = (
    Suite("roofline", 0.5, ("bench", "roofline")),
    Suite.of_file("linear", 4),
    Suite.of_file("step", 1.5),
    Suite.of_file("update", 0.7),
    Suite.of_file("noise", 0.5),
    Suite.of_file("ladder", 0.3),
    Suite.of_file("conv2d", 1.5),
    Suite.of_file("lm", 2.5),
    Suite.of_file("int8", 1.5),
    Suite.of_file("embedding", 0.3),
    Suite.of_file("compiled", 2),
    Suite.of_file("peers", 0.3),
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results; none for a CPU)")
    parser.add_argument("--limit", type=float, default=530.0, help="seconds for everything")
    parser.add_argument("--suites", nargs="+", choices=[s.name for s in SUITES], help="only these, after the tests")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--keep-going", action="store_true", help="time what follows even if a test fails")
    parser.add_argument("--quick", action="store_true", help="CPU: as few rounds as can be; proves the machinery")


def sources() -> str:
    """A hash of the code that the figures depend on, for a tree that has no commit or differs from it."""
    digest = hashlib.sha256()
    for folder in ("ezo_kernels", "bench", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h") or path.suffix == ".json" and folder == "ezo_kernels":
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def environment(device: str) -> dict:
    """What the figures depend on, part by part."""
    import torch

    from bench.cpu import _model_name
    from ezo_kernels.cli.system import versions

    found = {"device": device, "cpu": _model_name(), **versions(), "commit": _output("git", "rev-parse", "HEAD")}
    found["sources"] = sources()
    if device == "cuda":
        asked = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            asked: _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"),
        }
    return found


def write(path: Path, record: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def read(path: Path, here: dict) -> dict:
    """What the file says, or nothing if it is of another machine or other sources."""
    record = json.loads(path.read_text()) if path.exists() else {}
    # The commit may move without the sources, when results are committed.
    same = {k: v for k, v in record.get("environment", {}).items() if k != "commit"}
    return record if same == {k: v for k, v in here.items() if k != "commit"} else {}


def execute(command: list[str], log: Path, seconds: float) -> int | None:
    """Exit status of a command whose output goes to ``log``; None if it and its children had to be killed."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run_suite(
    suite: Suite, path: Path, here: dict, seconds: float, most: float, device: str, quick: bool, green: bool = True
) -> dict:
    """Run what is missing of a suite for about ``seconds``, at most ``most``; returns the record, and writes it.

    ``green``: whether the tests before it were.
    """
    lines, log = path.with_suffix(".lines"), path.with_suffix(".log")
    old = read(path, here)
    tried = [r for r in old.get("not_run", ()) if r["outcome"] in ("failed", "begun")]
    lines.write_text("".join(json.dumps(case) + "\n" for case in (*old.get("cases", ()), *tried)))
    command = [sys.executable, "-m", *suite.command]
    if suite.command[0] == "pytest":
        command += ["-q", "-p", "no:cacheprovider"]
    if suite.name == "tests" and importlib.util.find_spec("xdist"):
        # A test of a GPU mostly waits for ptxas: one process would take longer than all there is.
        command += ["--numprocesses", str(min(MOST_PROCESSES, os.cpu_count() or 1))]
    if suite.name != "tests":
        command += ["--device", device, "--lines", str(lines)]
        if suite.command[0] == "pytest":
            command += ["--seconds", str(seconds), *(QUICK if quick else ())]
    start = time.monotonic()
    code = execute(command, log, min(most, seconds + GRACE))
    found = read_lines(lines)
    cases = [r for r in found if r["outcome"] == "measured"]
    others = [r for r in found if r["outcome"] != "measured"]
    missing = any(r.get("reason") == "no time left" for r in others)
    if code is None or code < 0:
        status = "killed"
    elif code not in (0, 5):  # 5: pytest had nothing to run, because all of it was measured before
        status = "failed"
    else:
        status = "partial" if missing else "finished"
    record = {
        "suite": suite.name,
        "status": status,
        "seconds": round(old.get("seconds", 0) + time.monotonic() - start, 1),
        "environment": here,
        "cases": cases,
        "not_run": others,
        **({} if green else {"tests": "not green"}),
        "tail": log.read_text(errors="replace")[-3000:],
    }
    write(path, record)
    lines.unlink()
    log.unlink()
    return record


def run(args: argparse.Namespace, suites=SUITES, tests=None) -> int:
    """0: all suites are finished; 1: the tests are not green; 2: it cannot run here; 3: run it again for what is missing."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("python -m bench gpu needs a CUDA device: none is visible", file=sys.stderr)
        return 2
    if args.device == "cuda" and args.quick:
        print("--quick is for --device cpu: figures of a GPU are worth their time", file=sys.stderr)
        return 2
    out = args.out or (RESULTS if args.device == "cuda" else None)
    if out is None:
        print("figures of a CPU do not go into bench/results: name a folder with --out", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    prefix = "gpu" if args.device == "cuda" else "cpu"
    here, deadline = environment(args.device), time.monotonic() + args.limit
    todo = [tests or TESTS[args.device], *(s for s in suites if not args.suites or s.name in args.suites)]
    unfinished, green = False, True
    while todo:
        suite, path = todo[0], out / f"{prefix}_{todo[0].name}.json"
        left = deadline - time.monotonic()
        share = left * suite.share / sum(s.share for s in todo)
        todo.pop(0)
        old = read(path, here)
        if old.get("status") == "finished":
            print(f"{suite.name}: finished before")
            continue
        if left < LEAST:
            print(f"{suite.name}: not run, no time left")
            if not old:
                write(path, {"suite": suite.name, "status": "not run", "seconds": 0, "environment": here, "cases": [],
                             "not_run": [{"id": suite.name, "outcome": "skipped", "reason": "no time left"}]})  # fmt: skip
            unfinished = True
            continue
        # The tests have all the time there is: without them nothing is worth running.
        alone = suite.name == "tests" and not args.keep_going
        seconds, most = (left - GRACE, left) if alone else (share, share + GRACE if suite.name == "tests" else left)
        record = run_suite(suite, path, here, seconds, most, args.device, args.quick, green)
        print(
            f"{suite.name}: {record['status']}, {len(record['cases'])} cases, {len(record['not_run'])} not run, "
            f"{record['seconds']:.0f} s",
            flush=True,
        )
        if record["status"] != "finished":
            print(record["tail"], file=sys.stderr)
            if suite.name == "tests":
                print(
                    f"the tests are not green: {'it goes on' if args.keep_going else 'nothing is timed'}",
                    file=sys.stderr,
                )
                if not args.keep_going:
                    return 1
                green = False
                continue
            unfinished = True
    if not green:
        return 1
    if unfinished:
        print("run the command again to go on", file=sys.stderr)
        return 3
    return 0

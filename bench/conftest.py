"""What every suite can be told, and one line of JSON a case as soon as it is known: a suite that is killed keeps the others.

pytest bench/bench_linear.py --device cuda --seconds 60 --lines out.jsonl
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--device", choices=("cpu", "cuda"), help="run the cases of this device only")
    group.addoption("--lines", type=Path, help="append one line of JSON a case; cases measured in it are left out")
    group.addoption("--seconds", type=float, help="begin no case after so many")


def pytest_configure(config):
    config.stash[BEGIN] = time.monotonic()


BEGIN = pytest.StashKey[float]()


def read_lines(path: Path | None) -> list[dict]:
    """Records of a file of lines; a last line that a kill cut short is dropped."""
    records = []
    for line in path.read_text().splitlines() if path and path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def pytest_collection_modifyitems(config, items):
    device = config.getoption("--device")
    measured = {r["id"] for r in read_lines(config.getoption("--lines")) if r["outcome"] == "measured"}
    kept, left = [], []
    for item in items:
        own = getattr(item, "callspec", None)
        other = device and own and own.params.get("device", device) != device
        (left if other or item.nodeid in measured else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def pytest_runtest_setup(item):
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - item.config.stash[BEGIN] > seconds:
        pytest.skip("no time left")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    path = item.config.getoption("--lines")
    if path is None or report.outcome == "passed" and call.when != "call":
        return
    record = {"id": item.nodeid, "outcome": report.outcome}
    if report.outcome == "passed":
        benchmark = item.funcargs.get("benchmark")
        if benchmark is None or benchmark.stats is None:
            return
        record |= {"outcome": "measured", **benchmark.extra_info, "wall_us": 1e6 * benchmark.stats.stats.median}
        how = next((k for k in ("graph_us", "device_us") if k in record), "wall_us")
        record |= {"us": record[how], "by": {"graph_us": "graph", "device_us": "events"}.get(how, "wall clock")}
    elif report.outcome == "skipped":
        record["reason"] = str(call.excinfo.value).removeprefix("Skipped: ")
    else:
        record["reason"] = f"{call.excinfo.typename}: {call.excinfo.value}"[:500]
    with path.open("a") as lines:
        lines.write(json.dumps(record) + "\n")

"""What every suite can be told, and one line of JSON a case as soon as it is known: a suite that is killed keeps the others.

pytest bench/bench_linear.py --device cuda --seconds 60 --lines out.jsonl

A case that ended badly before, by failing or by never ending, comes last: what it does to the device is not done to others.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--device", choices=("cpu", "cuda"), help="run the cases of this device only")
    group.addoption("--lines", type=Path, help="append one line of JSON a case; cases measured in it are left out")
    group.addoption("--seconds", type=float, help="begin no case after so many")


def pytest_configure(config):
    config.stash[BEGIN] = time.monotonic()
    # fp32 is fp32 on both sides: cuDNN would take TF32 for it, while torch's precision of products, ours too, is "highest".
    torch.backends.cudnn.allow_tf32 = False


BEGIN = pytest.StashKey[float]()


def read_lines(path: Path | None) -> list[dict]:
    """The last record of each case of a file of lines; a last line that a kill cut short is dropped."""
    records = {}
    for line in path.read_text().splitlines() if path and path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        records[record["id"]] = record
    return list(records.values())


def pytest_collection_modifyitems(config, items):
    device = config.getoption("--device")
    outcome = {r["id"]: r["outcome"] for r in read_lines(config.getoption("--lines"))}
    kept, left = [], []
    for item in items:
        own = getattr(item, "callspec", None)
        other = device and own and own.params.get("device", device) != device
        (left if other or outcome.get(item.nodeid) == "measured" else kept).append(item)
    items[:] = sorted(kept, key=lambda item: outcome.get(item.nodeid) in ("failed", "begun"))
    config.hook.pytest_deselected(items=left)


def pytest_runtest_setup(item):
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - item.config.stash[BEGIN] > seconds:
        pytest.skip("no time left")
    write_line(item, {"id": item.nodeid, "outcome": "begun", "reason": "it did not end"})


def write_line(item, record: dict) -> None:
    if path := item.config.getoption("--lines"):
        with path.open("a") as lines:
            lines.write(json.dumps(record) + "\n")


def device_is_lost() -> bool:
    """Whether a kernel has broken the process's context, in which nothing runs any more."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.outcome == "passed" and call.when != "call":
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
        if device_is_lost():
            item.session.shouldstop = f"the device is lost since {item.nodeid}"
    write_line(item, record)

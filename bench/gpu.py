"""Everything that needs a GPU: its tests first, then every benchmark; one JSON a part, so that it can be resumed.

    python -m bench gpu --out bench/results

A part whose file is there already is not run again. Nothing is timed unless the tests are green: a wrong kernel has no speed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

#: Part -> arguments of pytest. Benchmarks run in one process, so that nothing else is on the device.
PARTS = {
    "tests": [
        "tests/test_gpu.py",
        "tests/test_gpu_int8.py",
        "tests/test_int8_ops.py",
        "tests/test_int8_arithmetic.py",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-q",
    ],
    "linear": ["bench/bench_linear.py", "--benchmark-only", "-q", "-k", "cuda"],
    "step": ["bench/bench_step.py", "--benchmark-only", "-q", "-k", "cuda"],
    "int8": ["bench/bench_int8.py", "--benchmark-only", "-q", "-k", "cuda"],
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all parts")
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=list(PARTS))


def environment() -> dict:
    """What the figures depend on."""
    import torch
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "driver and clocks": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": commit,
    }


def run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        print("python -m bench gpu needs a CUDA device: none is visible", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.limit
    name = torch.cuda.get_device_name().replace(" ", "_")
    for part in args.parts:
        path = args.out / f"gpu_{name}_{part}.json"
        if path.exists():
            print(f"{part}: {path} is there already")
            if part == "tests" and json.loads(path.read_text())["exit"] != 0:
                print("its tests were red: nothing is timed", file=sys.stderr)
                return 1
            continue
        left = deadline - time.monotonic()
        if left < 30:
            print(f"{part}: no time left; run the command again to go on", file=sys.stderr)
            return 3
        report = args.out / f".{part}.json"
        option = [] if part == "tests" else [f"--benchmark-json={report}"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *PARTS[part], *option],
                capture_output=True, text=True, timeout=left, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{part}: not finished in the time left; run the command again", file=sys.stderr)
            return 3
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n")
        record = {"part": part, "environment": environment(), "exit": done.returncode, "tail": done.stdout[-4000:]}
        if report.exists():
            record["benchmarks"] = json.loads(report.read_text())["benchmarks"]
            report.unlink()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, path)
        if part == "tests" and done.returncode != 0:
            print("tests are red: nothing is timed", file=sys.stderr)
            return 1
    return 0

"""The roof of this machine, measured: bytes a second of copies and reads, operations a second of matrix products.

python -m bench roofline --device cpu
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from bench.timing import device_time, rounds_for

#: device -> bytes of a copy, rows of a square product. A copy on a GPU is larger than any cache.
SIZES = {"cpu": (1 << 24, 256), "cuda": (1 << 30, 8192)}
GEMMS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "int8": torch.int8,
}


def wall_time(run) -> float:
    """Median microseconds of ``run()`` on the CPU."""
    run()
    start = time.perf_counter()
    run()
    times = []
    for _ in range(rounds_for(time.perf_counter() - start)):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def bandwidth(kind: str, device: str, size: int) -> tuple:
    """A call, and the bytes that it moves. Reads are those of a sum: nothing is written."""
    source = torch.ones(size // 4, device=device)
    if kind == "read":
        return source.sum, size
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def product(name: str, device: str, n: int) -> tuple:
    """A call, and its operations: 2 n^3. Its result is compared with fp64 in a few rows first."""
    generator = torch.Generator(device).manual_seed(0)
    if name == "int8":
        a, b = (
            torch.randint(-127, 128, (n, n), generator=generator, dtype=torch.int8, device=device) for _ in range(2)
        )
        b = b.t()

        def run():
            return torch._int_mm(a, b)
    else:
        a, b = (torch.randn(n, n, generator=generator, device=device).to(GEMMS[name]) for _ in range(2))
        out = torch.empty_like(a)

        def run():
            return torch.mm(a, b, out=out)

    truth = a[:4].double() @ b.double()
    error = float((run()[:4].double() - truth).abs().max() / truth.abs().max())
    limit = {"int8": 0.0, "fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}[name]
    if error > limit:
        raise AssertionError(f"{name} product of torch: relative error {error:.2g} above {limit}")
    return run, 2 * n**3


def measure(device: str, sizes: tuple[int, int] | None = None):
    """Yield a record a figure: ``{"id", "outcome", "us", "unit", "a_second"}``.

    Args:
        device: cpu (wall clock) or cuda (events).
        sizes: bytes of a copy and rows of a product; :data:`SIZES` by default.
    """
    size, n = sizes or SIZES[device]
    timer = device_time if device == "cuda" else wall_time
    before = torch.get_float32_matmul_precision()
    for name in ("copy", "read", *GEMMS):
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        try:
            if name == "tf32" and device == "cpu":
                continue
            run, work = bandwidth(name, device, size) if name in ("copy", "read") else product(name, device, n)
            for _ in range(3):
                run()
            us = timer(run)
        finally:
            torch.set_float32_matmul_precision(before)
        unit = "bytes" if name in ("copy", "read") else "operations"
        by = "events" if device == "cuda" else "wall clock"
        yield {"id": f"roofline/{name}", "outcome": "measured", "case": name, "device": device, "us": us, "by": by,
               "unit": unit, "a_second": 1e6 * work / us}  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lines", type=Path, help="append one line of JSON a figure")


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        print("python -m bench roofline --device cuda needs a CUDA device: none is visible", file=sys.stderr)
        return 2
    for record in measure(args.device):
        print(f"{record['case']}: {record['a_second']:.3g} {record['unit']} a second")
        if args.lines:
            with args.lines.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
    return 0

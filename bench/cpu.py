"""The CPU backend as ratios: two things timed in turn in one process, so that what else runs falls on both.

python -m bench cpu --json bench/results/cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import ezo_kernels as ezo
from ezo_kernels.optim.baselines import MeZO


def interleaved(first, second, rounds: int, calls: int) -> dict:
    """Median over rounds of the time of ``calls`` calls of each, and of the ratio first / second of a round.

    ``least_ratio`` is that of the least times: what else a machine does only adds to them, and to caches, not alike to both.
    """
    times = []
    for run in (first, second):
        run()
    for _ in range(rounds):
        pair = []
        for run in (first, second):
            start = time.process_time()
            for _ in range(calls):
                run()
            pair.append((time.process_time() - start) / calls)
        times.append(pair)
    a, b = zip(*times, strict=True)
    return {
        "first_us": 1e6 * statistics.median(a),
        "second_us": 1e6 * statistics.median(b),
        "ratio": statistics.median(x / y for x, y in times),
        "least_ratio": min(a) / min(b),
        "rounds": rounds,
    }


def noise_against_randn(noise: str = "gaussian", rows: int = 256, columns: int = 1024, rounds: int = 15) -> dict:
    """Time of our normals over that of torch.randn, the same number of them, one thread."""
    from ezo_kernels.ops import _noise_cpu

    out = np.empty((rows, columns), np.float32)
    ids = np.arange(rows, dtype=np.uint32)
    fill, u32 = getattr(_noise_cpu, noise), np.uint32

    def randn():
        return torch.randn(rows, columns)

    result = interleaved(lambda: fill(out, u32(1), u32(2), u32(3), u32(0), ids, 7), randn, rounds, 20)
    return {**result, "normals_per_second": 1e6 * rows * columns / result["first_us"]}


def step_against_mezo(head=0, noise: str | None = None, rows: int = 32, rounds: int = 9) -> dict:
    """Time of a LeNet-5 ElasticZO step over that of the eager in-place MeZO with the same head; torch's z unless named."""

    def lenet():
        return ezo.models.LeNet5(generator=torch.Generator().manual_seed(0))

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, 1, 28, 28, generator=generator), torch.randint(0, 10, (rows,), generator=generator)
    zo = {"lr": 1e-4, "eps": 1e-3, "clip": 5.0}
    ours = ezo.ElasticZO(ezo.convert_(lenet(), head=head), **zo, noise=noise or "gaussian")
    theirs = MeZO(lenet(), head=head, **zo, noise=noise)
    return interleaved(lambda: ours.train_step(x, y), lambda: theirs.train_step(x, y), rounds, 5)


def int8_step_against_fp32(head=0, strategy: str = "auto", rows: int = 32, rounds: int = 9) -> dict:
    """Time of a LeNet-5 step of ElasticZO-INT8 over that of ElasticZO in fp32 with the same head."""

    def lenet():
        return ezo.models.LeNet5(generator=torch.Generator().manual_seed(0))

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(rows, 1, 28, 28, generator=generator), torch.randint(0, 10, (rows,), generator=generator)
    small = ezo.quantize(x)
    ours = ezo.ElasticZOInt8(ezo.convert_(lenet(), head=head, precision="int8"), strategy=strategy)
    theirs = ezo.ElasticZO(ezo.convert_(lenet(), head=head), clip=5.0)
    return interleaved(lambda: ours.train_step(small, y), lambda: theirs.train_step(x, y), rounds, 5)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, required=True)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    record = {
        "environment": {"torch": torch.__version__, "threads": 1, "cpu": _model_name()},
        "noise against torch.randn": {
            n: noise_against_randn(n) for n in ("gaussian", "clt4", "hadamard", "rademacher")
        },
        "LeNet-5 step against eager MeZO": {
            "pure ZO": step_against_mezo(0),
            "head fc2+fc3": step_against_mezo(["fc2", "fc3"]),
        },
        "LeNet-5 int8 step against fp32": {
            "pure ZO, twice": int8_step_against_fp32(0),
            "pure ZO, buffer": int8_step_against_fp32(0, "buffer"),
            "head fc2+fc3, twice": int8_step_against_fp32(["fc2", "fc3"]),
            "head fc2+fc3, buffer": int8_step_against_fp32(["fc2", "fc3"], "buffer"),
        },
    }
    temporary = args.json.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, args.json)
    for title, cases in record.items():
        if title != "environment":
            for name, case in cases.items():
                print(f"{title}, {name}: {case['first_us']:.0f} us, ratio {case['ratio']:.2f}")
    return 0


def _model_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"

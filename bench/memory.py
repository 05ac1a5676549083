"""Bytes of a step of LeNet-5: int8 by its arena, fp32 as measured, and the paper's tally.

    python -m bench memory --json bench/results/memory.json

The tally of the ElasticZO paper (arXiv 2501.04287) has every buffer at once, none released. What is measured in fp32 is the
most that lives at one time of the storages that a stacked step allocates, with its parameters; in int8 arena and parameters.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

import ezo_kernels as ezo
from ezo_kernels.planning import paper_tally
from ezo_kernels.planning.live import LiveBytes


def fp32_bytes(batch: int) -> int:
    """The most that lives at one time in a stacked step of LeNet-5 in fp32, pure zeroth order, with its parameters."""
    model = ezo.convert_(ezo.models.LeNet5(generator=torch.Generator().manual_seed(0)), head=0)
    opt = ezo.ElasticZO(model)
    x, y = torch.zeros(batch, 1, 28, 28), torch.zeros(batch, dtype=torch.int64)
    opt.train_step(x, y)  # the first one checks the model, with passes of its own
    with LiveBytes([x, y, *model.parameters()]) as live:
        opt.train_step(x, y)
    return live.peak + sum(4 * p.numel() for p in model.parameters())


def int8_bytes(batch: int, strategy: str) -> dict[str, int]:
    """What :meth:`ezo_kernels.ElasticZOInt8.memory` says after two such steps in integers."""
    model = ezo.models.LeNet5(generator=torch.Generator().manual_seed(0))
    opt = ezo.ElasticZOInt8(ezo.convert_(model, head=0, precision="int8"), strategy=strategy)
    x = ezo.quantize(torch.rand(batch, 1, 28, 28))
    for _ in range(2):
        opt.train_step(x, torch.zeros(batch, dtype=torch.int64))
    return opt.memory()


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, required=True)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    rows = []
    for batch in (32, 256):
        model, x = ezo.models.LeNet5(), torch.zeros(batch, 1, 28, 28)
        full, small = (paper_tally(model, x, integer=integer)[0] for integer in (False, True))
        measured = fp32_bytes(batch)
        for strategy in ("auto", "buffer"):
            own = int8_bytes(batch, strategy)
            total = own["measured_bytes"] + own["parameter_bytes"]
            row = {"batch": batch, "strategy": strategy, **own, "fp32_bytes": measured, "ratio": measured / total}
            rows.append({**row, "tally_fp32_bytes": full, "tally_int8_bytes": small, "tally_ratio": full / small})
            ratios = f"{measured / total:.2f} (tally {full / small:.3f})"
            print(f"batch {batch}, {strategy}: int8 {total:,} bytes, fp32 {measured:,}: {ratios}")
    temporary = args.json.with_suffix(".tmp")
    temporary.write_text(json.dumps({"environment": {"torch": torch.__version__}, "rows": rows}, indent=1) + "\n")
    os.replace(temporary, args.json)
    return 0

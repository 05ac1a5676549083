"""Bytes of a step of LeNet-5: int8 by its arena, fp32 as measured, and the paper's tally.

    python -m bench memory --json bench/results/memory.json

The tally of the ElasticZO paper (arXiv 2501.04287) has every buffer at once, none released. What is measured in fp32 is the
most that lives at one time of the storages that a stacked step allocates, with its parameters; in int8 arena and parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import weakref
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ezo_kernels as ezo


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside and are alive: ``now``, and at most ``peak``."""

    def __init__(self, known=()) -> None:
        super().__init__()
        self.refs, self.known = {}, {t.untyped_storage()._cdata for t in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if not isinstance(t, torch.Tensor) or t.is_meta:
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.known or key in self.refs:
                continue

            def gone(_, key=key, size=size):
                self.now -= size
                del self.refs[key]

            self.refs[key] = weakref.ref(storage, gone)
            self.now += size
            self.peak = max(self.peak, self.now)
        return out


def paper_tally(model: nn.Module, sample: torch.Tensor, batch: int) -> tuple[int, int]:
    """Bytes of Full ZO in fp32 and in int8, 4 (P + B A) and P + B A + 4 B A32.

    P counts parameters; A32 the outputs of the weight layers for one sample, which int8 also keeps in int32; A those, the
    output of a ReLU after each of them but the last, and that of a pooling where the next weight layer takes less than that.
    The input counts as nothing.

    Args:
        model: weight layers one after the other, in floats.
        sample: one row of input, [1, ...].
        batch: B.
    """
    seen: list[tuple[int, int]] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_hook(lambda m, x, y: seen.append((x[0].numel(), y.numel()))) for m in layers]
    try:
        with torch.no_grad():
            model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    accumulators = sum(out for _, out in seen)
    relus = sum(out for _, out in seen[:-1])
    pools = sum(taken for (_, out), (taken, _) in zip(seen, seen[1:], strict=False) if taken != out)
    parameters, activations = sum(p.numel() for p in model.parameters()), accumulators + relus + pools
    return 4 * (parameters + batch * activations), parameters + batch * activations + 4 * batch * accumulators


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
        full, small = paper_tally(ezo.models.LeNet5(), torch.zeros(1, 1, 28, 28), batch)
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

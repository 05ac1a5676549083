"""Other libraries on the same work, where they are installed: ``pytest bench/bench_peers.py``.

| peer | is |
|---|---|
| torchzero 0.4 | MeZO of its modules: LeNet-5, batch 32 |

A peer that is absent is skipped, and the skip counted. Others' code that is in no package (Pie's kernel, say) is not run.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.bench_step import ROWS, ZO, batch, lenet
from bench.timing import devices, time_case


@pytest.mark.parametrize("device", devices())
def test_torchzero(benchmark, device):
    tz = pytest.importorskip("torchzero", reason="torchzero is not installed")
    model, (x, y) = lenet(device), batch(device)
    with torch.no_grad():
        before = F.cross_entropy(model(x), y)
    opt = tz.Optimizer(model.parameters(), tz.m.MeZO(h=ZO["eps"], distribution="gaussian"), tz.m.LR(ZO["lr"]))

    def closure(backward=False):
        return F.cross_entropy(model(x), y)

    @torch.no_grad()
    def run():
        return opt.step(closure)

    run()
    with torch.no_grad():  # it is a step of that size, not another: the loss moves, and by little
        after = F.cross_entropy(model(x), y)
    assert after != before and abs(after - before) < 0.1 * before
    time_case(benchmark, run, device, graph=False, case="torchzero", head="pure ZO", noise="gaussian", rows=ROWS)

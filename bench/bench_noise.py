"""Values of each noise a second: ``pytest bench/bench_noise.py``.

| case | is |
|---|---|
| in a kernel | an update of 16 directions: 16 values are made for each weight read and written, so that memory does not count |
| written | :func:`materialize`, four bytes a value: what memory allows |
| torch | ``torch.randn`` |

``values`` is how many are made by a call.
"""

from __future__ import annotations

import pytest
import torch

from bench.bench_update import NOISY, check
from bench.timing import devices, time_case
from ezo_kernels.ops import Noise, UpdatePlan, materialize, update_
from ezo_kernels.ops.noise import key_tensor

SHAPES = {"cpu": (256, 512), "cuda": (8192, 8192)}
QUERIES = 16


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize(("device", "noise"), NOISY)
def test_in_a_kernel(benchmark, device, noise, rounds):
    check(device, torch.float32, noise, QUERIES)
    w, spec = torch.zeros(SHAPES[device], device=device), Noise(noise, rounds)
    plan = UpdatePlan.build([w], (3,), ("matrix",), spec)
    key, coef = key_tensor(1, 2, device), torch.full((QUERIES,), 1e-6, device=device)
    time_case(
        benchmark,
        lambda: update_([w], key, coef, sites=(3,), layouts=("matrix",), noise=spec, plan=plan),
        device, case="in a kernel", noise=noise, rounds=rounds, values=QUERIES * w.numel(),
    )  # fmt: skip


@pytest.mark.parametrize(("device", "noise"), NOISY)
def test_written(benchmark, device, noise):
    shape = SHAPES[device]
    few = materialize((4, shape[1]), seed=1, step=2, site=3, noise=noise, device=device)
    if Noise(noise).portable:
        truth = materialize((4, shape[1]), seed=1, step=2, site=3, noise=noise)
        assert torch.equal(few.cpu(), truth)
    run = lambda: materialize(shape, seed=1, step=2, site=3, noise=noise, device=device)  # noqa: E731
    # the seed is folded on the host, and its words are copied to the device: not for a graph
    time_case(benchmark, run, device, graph=False, case="written", noise=noise, values=shape[0] * shape[1])


@pytest.mark.parametrize("device", devices())
def test_torch(benchmark, device):
    shape = SHAPES[device]
    time_case(benchmark, lambda: torch.randn(shape, device=device), device, case="torch", values=shape[0] * shape[1])

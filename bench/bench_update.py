"""The update against a copy of the same bytes, and noise made in a kernel: ``pytest bench/bench_update.py``.

| case | is |
|---|---|
| copy | every parameter copied: as many bytes read and written as an update |
| update | :func:`update_`: W read and written once, z made again, stochastic rounding of 16-bit weights |
| update, cuda | the same by the kernel in CUDA C++, where CuPy is; ``FASTER_IN_CUDA`` of ops/update.py goes by these two |

``share`` is the time of the copy over that of the update. The parameters are larger than the caches of a GPU.
"""

from __future__ import annotations

import pytest
import torch

from bench.timing import devices, time_case
from ezo_kernels.ops import Noise, UpdatePlan, _cuda, update_
from ezo_kernels.ops.noise import key_tensor
from tests import materialised
from tests.tolerance import assert_within_torch_error

#: device -> shapes of the parameters
SHAPES = {"cpu": [(256, 1024)], "cuda": [(4096, 4096)] * 8}
NOISES = {
    "cpu": ["gaussian", "clt4", "hadamard", "rademacher"],
    "cuda": ["gaussian", "clt4", "rademacher", "gaussian_fast", "hadamard"],
}
DTYPES = [torch.bfloat16, torch.float32]
NOISY = [pytest.param(d, n, id=f"{d}-{n}") for d in devices() for n in NOISES[d]]
SEED, STEP, SITE = 1, 2, 3


def names(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(device: str, dtype, noise: str, queries: int, strategy: str | None = None) -> None:
    """A small update against fp64; an update that is wrong is not timed."""
    w = materialised.randn(40, 130, device=device, dtype=dtype)
    p = materialised.Pass(torch.device(device), SEED, STEP, noise=noise)
    coef = torch.linspace(0.01, 0.02, queries)
    ours = w.clone()
    update_(
        [ours], p.p.key, coef.to(device), sites=[SITE], noise=Noise(noise), stochastic_rounding=False, strategy=strategy
    )
    if not Noise(noise).portable:  # its bits are those of this GPU: the difference is a direction of unit variance
        moved = (w - ours).double().cpu() / coef.norm()
        assert 0.9 < float(moved.std()) < 1.1 and abs(float(moved.mean())) < 0.1
        return
    same = materialised.update(w, coef.tolist(), p, site=SITE).to(dtype)
    z = [p.z(w.shape, SITE, q).double() for q in range(queries)]
    truth = w.double().cpu() - sum(float(c) * d for c, d in zip(coef, z, strict=True))
    assert_within_torch_error(ours.cpu(), same, truth, "bench")


def parameters(device: str, dtype) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in SHAPES[device]]


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("device", devices())
def test_copy(benchmark, device, dtype):
    params = parameters(device, dtype)
    targets = [torch.empty_like(p) for p in params]
    moved = 2 * sum(p.numel() * p.element_size() for p in params)
    time_case(
        benchmark, lambda: torch._foreach_copy_(targets, params), device, case="copy", dtype=names(dtype), bytes=moved
    )


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("device", "noise"), NOISY)
def test_update(benchmark, device, noise, dtype, queries):
    measure(benchmark, device, noise, dtype, queries, "update", "triton" if device == "cuda" else None)


@pytest.mark.skipif(not _cuda.available(), reason="needs CuPy: pip install ezo-kernels[cuda12]")
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("noise", ["gaussian", "clt4", "rademacher"])
@pytest.mark.parametrize("device", [d for d in devices() if d == "cuda"])
def test_update_in_cuda(benchmark, device, noise, dtype):
    measure(benchmark, device, noise, dtype, 1, "update, cuda", "cuda")


def measure(benchmark, device, noise, dtype, queries, case, strategy) -> None:
    check(device, dtype, noise, queries, strategy)
    params, spec = parameters(device, dtype), Noise(noise)
    sites = tuple(range(len(params)))
    plan = UpdatePlan.build(params, sites, ("matrix",) * len(params), spec, strategy)
    key, coef = key_tensor(SEED, STEP, device), torch.full((queries,), 1e-6, device=device)
    time_case(
        benchmark,
        lambda: update_(
            params, key, coef, sites=sites, layouts=("matrix",) * len(params), noise=spec, plan=plan
        ),
        device,
        case=case,
        noise=noise,
        dtype=names(dtype),
        queries=queries,
        bytes=2 * sum(p.numel() * p.element_size() for p in params),
    )  # fmt: skip

"""What torch.compile makes of the same work, on a GPU only: ``pytest bench/bench_compiled.py``. Its autotuning takes minutes.

| case | is |
|---|---|
| two plain, one plain | the plain forward under torch.compile(mode="max-autotune-no-cudagraphs"), put into a graph by us |
| compiled noise | torch's own normals fused into both perturbed weights by Inductor, then two products |
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench import bench_linear, bench_lm
from bench.lm import loss_fn
from bench.timing import devices, rotate, time_case

MODE = "max-autotune-no-cudagraphs"
LINEAR = [(rows, 4096, 4096, torch.bfloat16) for rows in (16, 512, 2048, 8192)]
CASES = [pytest.param("cuda", *s, id=f"cuda-{'x'.join(map(str, s[:3]))}") for s in LINEAR if "cuda" in devices()]


@pytest.fixture(autouse=True)
def fresh():
    """A case is compiled by itself: shapes of another would make it dynamic."""
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("parts", [2, 1], ids=["two plain", "one plain"])
@pytest.mark.parametrize(("device", "rows", "n", "k", "dtype"), CASES)
def test_linear_plain(benchmark, device, rows, n, k, dtype, parts):
    x, weights, _ = bench_linear.operands(device, rows, n, k, dtype)
    product = torch.compile(F.linear, mode=MODE, dynamic=False)

    def once(w):
        return [product(part, w) for part in x.chunk(parts)]

    truth = F.linear(x[:16].double(), weights[0].double())
    bench_linear.assert_within_torch_error(once(weights[0])[0][:16], F.linear(x[:16], weights[0]), truth, "compiled")
    case = "two plain" if parts == 2 else "one plain"
    time_case(
        benchmark, rotate(once, weights), device, case=case, op="linear", compiled=True, rows=rows, n=n, k=k,
        dtype=str(dtype)[6:],
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("device", "rows", "n", "k", "dtype"), CASES)
def test_compiled_noise(benchmark, device, rows, n, k, dtype):
    x, weights, p = bench_linear.operands(device, rows, n, k, dtype)

    def eager(w, z):
        step, (plus, minus) = z * p.eps, x.chunk(2)
        return torch.cat([F.linear(plus, (w + step).to(w.dtype)), F.linear(minus, (w - step).to(w.dtype))])

    drawn = torch.compile(lambda w: eager(w, torch.randn(w.shape, device=w.device)))
    z = torch.randn(weights[0].shape, device=device)
    ours, theirs = torch.compile(eager)(weights[0], z), eager(weights[0], z)
    assert torch.allclose(ours.float(), theirs.float(), atol=0.1, rtol=0.05)  # z of its own: only the same arithmetic
    time_case(
        benchmark, rotate(drawn, weights), device, case="compiled noise", rows=rows, n=n, k=k, dtype=str(dtype)[6:]
    )


@torch.no_grad()
@pytest.mark.parametrize(("device", "sequences"), [c for c in bench_lm.CASES if c.values[0] == "cuda"])
def test_lm_plain(benchmark, device, sequences):
    model, (x, y) = bench_lm.decoder(device), bench_lm.batch(device, sequences)
    wanted = loss_fn(model(x), y).item()
    forward = torch.compile(model, mode=MODE)

    def run():
        return [loss_fn(forward(x), y) for _ in range(2)]

    assert run()[0].item() == pytest.approx(wanted, rel=1e-2)
    time_case(
        benchmark, run, device, case="two plain", op="lm", compiled=True, **bench_lm.about(device, sequences, model)
    )

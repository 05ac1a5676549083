"""The CUDA C++ on a GPU: the reference's bits, those of Triton, torch's stream, CuPy's arrays. Marked ``gpu``."""

from __future__ import annotations

import pytest
import torch

from ezo_kernels import ops
from ezo_kernels.ops.noise import NOISES, key_tensor

cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install ezo-kernels[cuda12]")
pytestmark = pytest.mark.gpu

FLOAT = [name for name in NOISES if name != "sparse_int8"]
SHAPES = [(5,), (3, 129), (130, 31), (7, 3, 5, 5), (16, 8, 3, 3), (2, 3, 40), (70, 304), (257, 1024)]


def weights(dtype):
    torch.manual_seed(0)
    return [torch.randn(s).cuda().to(dtype) for s in SHAPES]


def spec_of(noise):
    return ops.Noise(noise, p_zero=0.75 if noise == "sparse" else 0.0)


@pytest.mark.parametrize("coef", [[[1e-2]], [[1e-2, -3e-3], [0.0, 0.0], [2e-3, 0.0]]], ids=["one", "steps"])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("noise", FLOAT)
def test_the_update_is_the_references_and_tritons_bit_for_bit(noise, dtype, coef, rounded):
    keys = torch.stack([key_tensor(5, 6 + i) for i in range(len(coef))])
    coef, spec = torch.tensor(coef), spec_of(noise)
    how = dict(sites=list(range(len(SHAPES))), noise=spec, query=3)
    how["z_dtypes"] = [str(dtype).removeprefix("torch.") if rounded and i % 3 else "float32" for i in how["sites"]]
    after = {}
    for strategy in ("cuda", "triton"):
        after[strategy] = weights(dtype)
        ops.update_(after[strategy], keys.cuda(), coef.cuda(), strategy=strategy, **how)
    if spec.portable:
        after["cpu"] = [w.cpu() for w in weights(dtype)]
        ops.update_(after["cpu"], keys, coef, **how)
    for name in set(after) - {"cuda"}:
        for ours, theirs in zip(after["cuda"], after[name], strict=True):
            assert torch.equal(ours.cpu(), theirs.cpu()), name


@pytest.mark.parametrize("coef", [1e-40, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_subnormals_are_not_flushed(dtype, coef):
    """CuPy compiles with -ftz=true."""
    key, of, after = key_tensor(1, 2), torch.tensor([coef]), {}
    for device, how in (("cpu", {}), ("cuda", {"strategy": "cuda"})):
        w = torch.full((8, 64), 3e-39).to(device, dtype)
        ops.update_([w], key.to(device), of.to(device), sites=[3], noise=ops.Noise("rademacher"), **how)
        after[device] = w.cpu()
    assert torch.equal(after["cpu"], after["cuda"])


def test_the_launch_is_on_torchs_stream_and_can_be_captured():
    key, coef = key_tensor(1, 2, "cuda"), torch.tensor([0.25], device="cuda")
    w, want = torch.zeros(64, 256, device="cuda"), torch.zeros(64, 256, device="cuda")
    plan = ops.UpdatePlan.build([w], [7], ["matrix"], ops.Noise(), "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # w and key are made there
    with torch.cuda.stream(side):
        ops.update_([w], key, coef, sites=[7], plan=plan)  # compiled and loaded before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.update_([w], key, coef, sites=[7], plan=plan)
    graph.replay()
    for _ in range(2):
        ops.update_([want], key, coef, sites=[7], strategy="triton")
    assert torch.equal(w, want)


def test_arrays_of_cupy_go_in_and_out():
    w = cupy.zeros((33, 70), cupy.float32)
    ops.update_([w], key_tensor(1, 2, "cuda"), torch.tensor([-1.0], device="cuda"), sites=[3])
    z = cupy.from_dlpack(ops.materialize((33, 70), seed=1, step=2, site=3, device="cuda"))
    assert bool((w == z).all())

"""Integer linear layer, convolution and step against what they replace: ``pytest bench/bench_int8.py``.

| case | is |
|---|---|
| int_mm | torch's own int8 product, twice (linear only): what the pair is held against |
| plain | the same operator without noise, on the batch of both groups |
| buffer, twice | the perturbed pair by either strategy, requantised |
| buffer fused | (GPU) the first with its weights perturbed in the tile, whatever ``auto`` takes |
| fp32 | (step) the same step in floating point |
| captured int8, captured fp32 | (step) both replayed as one CUDA graph (GPU) |

Outputs are compared with the CPU reference, bit for bit, before anything is timed. On a GPU weights rotate over 200 MB.
"""

from __future__ import annotations

import pytest
import torch

import ezo_kernels as ezo
from bench import bench_step
from bench.timing import copies, devices, rotate, time_case
from ezo_kernels.ops import Int8Tensor, IntegerPerturbation, Noise, int8_conv2d, int8_linear
from ezo_kernels.ops.noise import key_tensor

NOISE = Noise("sparse_int8", p_zero=0.9, r_max=15)
#: device -> rows a sign, outputs, inputs
LINEAR = {
    "cpu": [(32, 120, 784), (32, 1024, 1024)],
    "cuda": [(rows, 4096, 4096) for rows in (1, 16, 64, 512, 2048, 8192)] + [(32, 120, 784)],
}
#: device -> images a sign, input and output channels, height
CONV = {
    "cpu": [(32, 6, 16, 14)],
    "cuda": [(128, 64, 64, 56), (128, 128, 128, 32), (128, 256, 256, 32), (32, 6, 16, 14)],
}
CASES = ["plain", "buffer", "twice", *(["buffer fused"] if "cuda" in devices() else [])]
LINEAR_CASES = [pytest.param(d, *s, id=f"{d}-{'x'.join(map(str, s))}") for d in devices() for s in LINEAR[d]]
CONV_CASES = [pytest.param(d, *s, id=f"{d}-{'x'.join(map(str, s))}") for d in devices() for s in CONV[d]]


def integers(shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(device)


def exponent(device, groups=1, value=-7):
    return torch.full((groups,), value, dtype=torch.int32, device=device)


def pass_(device):
    return IntegerPerturbation(key_tensor(1, 2, device), NOISE)


def check(run, x, w, p, **options):
    """The same on the CPU gives the same bits; a case that is wrong is not timed."""
    if not x.is_cuda or w.numel() * x.shape[0] > 1 << 31:
        return
    some = IntegerPerturbation(p.key.cpu(), p.noise)
    options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ours, theirs = run(x, w, p), run.func(x.to("cpu"), w.cpu(), None, some, **options)
    assert torch.equal(ours.values.cpu(), theirs.values) and torch.equal(ours.exponent.cpu(), theirs.exponent)


def named(case: str) -> dict[str, str]:
    """The strategy of a case, and where its weights are made."""
    return {
        "strategy": "twice" if case == "twice" else "buffer",
        "weights": "fused" if case.endswith("fused") else "auto",
    }


class Operation:
    """An operator with its options, called with x, w and the pass."""

    def __init__(self, func, **options) -> None:
        self.func, self.options = func, options

    def __call__(self, x, w, p):
        return self.func(x, w, None, p, **self.options)


@pytest.mark.parametrize(("device", "rows", "n", "k"), LINEAR_CASES)
def test_int_mm(benchmark, device, rows, n, k):
    if device == "cuda" and rows <= 16:
        pytest.skip("torch._int_mm wants more than 16 rows on CUDA")
    x, w = integers((rows, k), device), integers((n, k), device, 1)
    run = rotate(lambda w: [torch._int_mm(x, w.t()) for _ in range(2)], [w.clone() for _ in range(copies(w))])
    time_case(benchmark, run, device, case="int_mm", op="linear", rows=rows, n=n, k=k)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("device", "rows", "n", "k"), LINEAR_CASES)
def test_linear(benchmark, device, rows, n, k, case):
    x, w = Int8Tensor(integers((2 * rows, k), device), exponent(device, 2)), integers((n, k), device, 1)
    options = {"weight_exponent": exponent(device), **named(case)}
    p = pass_(device) if case != "plain" else None
    operation = Operation(int8_linear, **options)
    if p is not None:
        check(operation, x, w, p, **options)
    run = rotate(lambda w: operation(x, w, p), [w.clone() for _ in range(copies(w))])
    time_case(benchmark, run, device, case=case, op="linear", rows=rows, n=n, k=k)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("device", "images", "c", "o", "size"), CONV_CASES)
def test_conv2d(benchmark, device, images, c, o, size, case):
    kernel = 5 if c == 6 else 3
    x = Int8Tensor(integers((2 * images, c, size, size), device), exponent(device, 2))
    w = integers((o, c, kernel, kernel), device, 1)
    options = {"weight_exponent": exponent(device), "padding": kernel // 2, **named(case)}
    p = pass_(device) if case != "plain" else None
    operation = Operation(int8_conv2d, **options)
    if p is not None:
        check(operation, x, w, p, **options)
    run = rotate(lambda w: operation(x, w, p), [w.clone() for _ in range(copies(w))])
    time_case(benchmark, run, device, case=case, op="conv2d", rows=images, n=o, k=c * kernel**2, size=size)


HEADS = {"pure ZO": 0, "fc3": ["fc3"], "fc2+fc3": ["fc2", "fc3"]}


def lenet_step(case: str, head: str, device: str):
    model = ezo.models.LeNet5(generator=torch.Generator().manual_seed(0)).to(device)
    y = torch.arange(32, device=device) % 10
    capture = case.startswith("captured")
    if case.endswith("fp32"):
        opt = ezo.ElasticZO(ezo.convert_(model, head=HEADS[head]), clip=5.0, capture=capture)
        x = torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device)
    else:
        opt = ezo.ElasticZOInt8(
            ezo.convert_(model, head=HEADS[head], precision="int8"),
            strategy="auto" if capture else case,
            capture=capture,
        )
        x = Int8Tensor(integers((32, 1, 28, 28), device) >> 1, exponent(device, value=-5))
    return opt, lambda: opt.train_step(x, y)


def check_step(opt, head: str) -> None:
    """Five steps of the reference, by the other strategy, leave the same weights; a step that is wrong is not timed."""
    theirs, run = lenet_step("twice", head, "cpu")
    for _ in range(5):
        run()
    for ours, wanted in zip(opt.model.state_dict().values(), theirs.model.state_dict().values(), strict=True):
        assert torch.equal(ours.cpu(), wanted)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", ["captured int8", "captured fp32", "auto", "buffer", "fp32"])
def test_step(benchmark, device, head, case):
    if device == "cpu" and case.startswith("captured"):
        pytest.skip("a CUDA graph needs a GPU")
    if case.endswith("fp32"):
        bench_step.check(HEADS[head], "gaussian", device, capture=case.startswith("captured"))
    opt, run = lenet_step(case, head, device)
    for _ in range(5):  # a graph is made after a few eager steps
        run()
    if not case.endswith("fp32"):
        check_step(opt, head)
    if not case.endswith("fp32"):
        benchmark.extra_info.update(opt.memory())
    time_case(benchmark, run, device, graph=False, case=case, head=head, rows=32)

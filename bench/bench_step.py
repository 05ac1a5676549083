"""A training step of LeNet-5 against what it replaces: ``pytest bench/bench_step.py``.

| case | is |
|---|---|
| two plain | two forwards of the plain model without autograd: the floor of any zeroth-order step |
| one plain | one forward of the stacked batch |
| fused | ElasticZO: one stacked pass, z made inside the layers, one update |
| captured | the same, replayed as one CUDA graph (GPU) |
| materialised | MeZO as its authors wrote it, with the noise contract's z in memory |
| randn | the same with torch's generator |
| MeZO in a graph | MeZO with every scalar on the device, replayed as one CUDA graph; z made four times, or kept |
| backprop | every parameter by backpropagation and SGD |
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ezo_kernels as ezo
from bench.mezo_graph import GraphMeZO
from bench.timing import captured, devices, time_case
from ezo_kernels.optim.baselines import BackpropSGD, MeZO

ROWS = 32
HEADS = {"pure ZO": 0, "fc3": ["fc3"], "fc2+fc3": ["fc2", "fc3"]}
NOISES = ["gaussian", "clt4", "hadamard", "rademacher"]
ZO = dict(lr=1e-4, eps=1e-3, clip=5.0, seed=7)


@pytest.fixture(params=devices())
def device(request):
    return request.param


def lenet(device):
    return ezo.models.LeNet5(generator=torch.Generator().manual_seed(0)).to(device)


def batch(device):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 1, 28, 28, generator=generator)
    return x.to(device), torch.randint(0, 10, (ROWS,), generator=generator).to(device)


def check(head, noise, device, **options):
    """Five steps of both give the same losses: a step that is wrong is not timed."""
    model, plain = ezo.convert_(lenet(device), head=head), lenet(device)
    ours = ezo.ElasticZO(model, noise=noise, **ZO, **options)
    theirs = MeZO(plain, noise=noise, head=head, **ZO)
    for _ in range(5):
        a, b = ours.train_step(*batch(device)), theirs.train_step(*batch(device))
        assert a.item() == pytest.approx(b.item(), rel=1e-4)
    return ours


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("head", HEADS)
def test_fused(benchmark, device, head, noise):
    opt, (x, y) = check(HEADS[head], noise, device), batch(device)
    time_case(
        benchmark, lambda: opt.train_step(x, y), device, graph=False, case="fused", head=head, noise=noise, rows=ROWS
    )


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("head", HEADS)
def test_captured(benchmark, device, head, noise):
    if device == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    opt, (x, y) = check(HEADS[head], noise, device, capture=True), batch(device)
    time_case(
        benchmark, lambda: opt.train_step(x, y), device, graph=False, case="captured", head=head, noise=noise, rows=ROWS
    )


@pytest.mark.parametrize("noise", [*NOISES, None], ids=lambda noise: noise or "randn")
@pytest.mark.parametrize("head", HEADS)
def test_materialised(benchmark, device, head, noise):
    opt, (x, y) = MeZO(lenet(device), noise=noise, head=HEADS[head], **ZO), batch(device)
    case = "materialised" if noise else "randn"
    time_case(
        benchmark, lambda: opt.train_step(x, y), device, graph=False, case=case, head=head, noise=noise, rows=ROWS
    )


@pytest.mark.parametrize("keep_z", [False, True], ids=["drawn", "kept"])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_mezo_in_a_graph(benchmark, device, noise, keep_z):
    theirs, (x, y) = MeZO(lenet(device), noise=noise, **ZO), batch(device)
    opt = GraphMeZO(lenet(device), noise=noise, keep_z=keep_z, **ZO)
    for _ in range(3):
        assert opt.train_step(x, y).item() == pytest.approx(theirs.train_step(x, y).item(), rel=1e-4)
    replay = captured(lambda: opt.train_step(x, y)).replay if device == "cuda" else None
    time_case(
        benchmark, lambda: opt.train_step(x, y), device, graph=False, replay=replay, case="MeZO in a graph", head="pure ZO",
        noise=noise, keep_z=keep_z, rows=ROWS,
    )  # fmt: skip


def test_backprop(benchmark, device):
    opt, (x, y) = BackpropSGD(lenet(device), lr=0.01), batch(device)
    time_case(benchmark, lambda: opt.train_step(x, y), device, graph=False, case="backprop", rows=ROWS)


@pytest.mark.parametrize("memory", ["contiguous", "channels_last"])
@pytest.mark.parametrize("stacked", [False, True], ids=["two plain", "one plain"])
def test_plain(benchmark, device, stacked, memory):
    model, (x, y) = lenet(device), batch(device)
    if memory == "channels_last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    xs, ys = ([torch.cat([x, x])], [torch.cat([y, y])]) if stacked else ([x, x], [y, y])

    @torch.no_grad()
    def run():
        return [F.cross_entropy(model(a), b) for a, b in zip(xs, ys, strict=True)]

    time_case(benchmark, run, device, case="one plain" if stacked else "two plain", memory=memory, rows=ROWS)

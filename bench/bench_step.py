"""A training step of LeNet-5 against what it replaces: ``pytest bench/bench_step.py``.

| case | is |
|---|---|
| two plain | two forwards of the plain model without autograd: the floor of any zeroth-order step |
| one plain | one forward of the stacked batch |
| fused | ElasticZO: one stacked pass, z made inside the layers, one update |
| materialised | MeZO as its authors wrote it, with the noise contract's z in memory |
| randn | the same with torch's generator |
| backprop | every parameter by backpropagation and SGD |
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ezo_kernels as ezo
from bench.timing import devices, time_case
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


def check(head, noise, device):
    """Three steps of both give the same losses: a step that is wrong is not timed."""
    model, plain = ezo.convert_(lenet(device), head=head), lenet(device)
    ours = ezo.ElasticZO(model, noise=noise, **ZO)
    theirs = MeZO(plain, noise=noise, head=head, **ZO)
    for _ in range(3):
        a, b = ours.train_step(*batch(device)), theirs.train_step(*batch(device))
        assert a.item() == pytest.approx(b.item(), rel=1e-4)
    return ours


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("head", HEADS)
def test_fused(benchmark, device, head, noise):
    opt, (x, y) = check(HEADS[head], noise, device), batch(device)
    time_case(benchmark, lambda: opt.train_step(x, y), device, case="fused", head=head, noise=noise, rows=ROWS)


@pytest.mark.parametrize("noise", [*NOISES, None], ids=lambda noise: noise or "randn")
@pytest.mark.parametrize("head", HEADS)
def test_materialised(benchmark, device, head, noise):
    opt, (x, y) = MeZO(lenet(device), noise=noise, head=HEADS[head], **ZO), batch(device)
    case = "materialised" if noise else "randn"
    time_case(benchmark, lambda: opt.train_step(x, y), device, case=case, head=head, noise=noise, rows=ROWS)


def test_backprop(benchmark, device):
    opt, (x, y) = BackpropSGD(lenet(device), lr=0.01), batch(device)
    time_case(benchmark, lambda: opt.train_step(x, y), device, case="backprop", rows=ROWS)


@pytest.mark.parametrize("stacked", [False, True], ids=["two plain", "one plain"])
def test_plain(benchmark, device, stacked):
    model, (x, y) = lenet(device), batch(device)
    xs, ys = ([torch.cat([x, x])], [torch.cat([y, y])]) if stacked else ([x, x], [y, y])

    @torch.no_grad()
    def run():
        return [F.cross_entropy(model(a), b) for a, b in zip(xs, ys, strict=True)]

    time_case(benchmark, run, device, case="one plain" if stacked else "two plain", rows=ROWS)

"""A step of a decoder of 1.3e9 random bf16 weights against what it replaces: ``pytest bench/bench_lm.py``.

| case | is |
|---|---|
| two plain, one plain | forwards and losses without autograd: two batches of B sequences, or one of 2 B |
| paired, sequential | ElasticZO with head=0: all groups stacked, or one by one at the memory of inference |
| captured | paired, replayed as one CUDA graph (GPU) |
| MeZO | the eager loop with torch's generator |
| MeZO in a graph | the same with every scalar on the device |
| backprop | every parameter by backpropagation and SGD |
| noise of all weights | what a step makes of z, written to memory |

Efficiency of a step is the time of the fastest plain one over that of the step. On a CPU the model is tiny, and fp32.
"""

from __future__ import annotations

import pytest
import torch

import ezo_kernels as ezo
from bench.lm import SIZES, Decoder, loss_fn
from bench.mezo_graph import GraphMeZO
from bench.timing import captured, devices, time_case
from ezo_kernels.ops import materialize
from ezo_kernels.optim.baselines import BackpropSGD, MeZO

#: device -> sequences of a batch
BATCHES = {"cpu": [1], "cuda": [1, 8]}
NOISES = {"cpu": ["gaussian", "hadamard"], "cuda": ["hadamard", "gaussian", "clt4"]}
ZO = dict(lr=1e-7, eps=1e-3, seed=7)
CASES = [pytest.param(d, b, id=f"{d}-{b}x{SIZES[d].length}") for d in devices() for b in BATCHES[d]]
NOISY = [pytest.param(*c.values, n, id=f"{c.id}-{n}") for c in CASES for n in NOISES[c.values[0]]]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def decoder(device):
    return Decoder(SIZES[device], device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


def batch(device, sequences):
    size, generator = SIZES[device], torch.Generator(device).manual_seed(1)
    ids = torch.randint(0, size.vocabulary, (sequences, size.length + 1), generator=generator, device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def about(device, sequences, model) -> dict:
    size, unique = SIZES[device], {id(p): p.numel() for p in model.parameters()}
    return dict(sequences=sequences, length=size.length, layers=size.layers, width=size.width,
                parameters=sum(unique.values()))  # fmt: skip


def check(device, noise, mode) -> None:
    """Losses at +-eps of one step against those of a plain model whose weights were moved by z in memory."""
    model, (x, y), eps = decoder(device), batch(device, 1), 0.02  # as far as a weight is large: losses differ
    opt = ezo.ElasticZO(ezo.convert_(model, head=0), noise=noise, mode=mode, lr=0.0, eps=eps, seed=7)
    opt.train_step(x, y, loss_fn)
    ours, sites = opt.losses.tolist(), model._ezo.manifest
    del opt, model
    wanted = []
    for sign in (1, -1):
        plain = decoder(device)
        named = dict(plain.named_parameters())
        with torch.no_grad():
            for s in sites:
                z = materialize(s.shape, seed=7, step=0, site=s.site, noise=noise, device=device, layout=s.layout)
                p = named[s.names[0]]
                p.copy_((p.float() + sign * eps * z).to(p.dtype))
            wanted.append(loss_fn(plain(x), y).item())
        dtype = p.dtype
        del plain, named
    assert ours == pytest.approx(wanted, rel=TOLERANCE[dtype]), (noise, mode)


@pytest.mark.parametrize("parts", [2, 1], ids=["two plain", "one plain"])
@pytest.mark.parametrize(("device", "sequences"), CASES)
def test_plain(benchmark, device, sequences, parts):
    model, (x, y) = decoder(device), batch(device, 2 * sequences)

    @torch.no_grad()
    def run():
        return [loss_fn(model(a), b) for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)]

    case = "two plain" if parts == 2 else "one plain"
    time_case(benchmark, run, device, case=case, **about(device, sequences, model))


@torch.no_grad()
@pytest.mark.parametrize("case", ["captured", "paired", "sequential"])
@pytest.mark.parametrize(("device", "sequences", "noise"), NOISY)
def test_step(benchmark, device, sequences, noise, case):
    options = {}
    if case == "captured":
        if device == "cpu":
            pytest.skip("a CUDA graph needs a GPU")
        options = {"capture": True}
    mode = "sequential" if case == "sequential" else "stacked"
    check(device, noise, mode)
    model, (x, y) = decoder(device), batch(device, sequences)
    opt = ezo.ElasticZO(ezo.convert_(model, head=0), noise=noise, mode=mode, **ZO, **options)
    for _ in range(5 if case == "captured" else 1):  # the graph is made after a few eager steps
        opt.train_step(x, y, loss_fn)
    run = lambda: opt.train_step(x, y, loss_fn)  # noqa: E731
    time_case(benchmark, run, device, graph=False, case=case, noise=noise, **about(device, sequences, model))


@pytest.mark.parametrize(("device", "sequences"), CASES)
def test_mezo(benchmark, device, sequences):
    model, (x, y) = decoder(device), batch(device, sequences)
    opt = MeZO(model, noise=None, **ZO)
    run = lambda: opt.train_step(x, y, loss_fn)  # noqa: E731
    time_case(benchmark, run, device, graph=False, case="MeZO", **about(device, sequences, model))


@pytest.mark.parametrize(("device", "sequences"), CASES)
def test_backprop(benchmark, device, sequences):
    model, (x, y) = decoder(device), batch(device, sequences)
    opt = BackpropSGD(model, lr=1e-6)
    run = lambda: opt.train_step(x, y, loss_fn)  # noqa: E731
    time_case(benchmark, run, device, graph=False, case="backprop", **about(device, sequences, model))


@pytest.mark.parametrize(("device", "sequences"), CASES)
def test_mezo_in_a_graph(benchmark, device, sequences):
    model, (x, y) = decoder(device), batch(device, sequences)
    opt = GraphMeZO(model, noise="gaussian", loss_fn=loss_fn, **ZO)
    with torch.no_grad():
        loss = loss_fn(model(x), y).item()
    assert opt.train_step(x, y).item() == pytest.approx(loss, rel=1e-2)
    replay = captured(lambda: opt.train_step(x, y)).replay if device == "cuda" else None
    time_case(
        benchmark, lambda: opt.train_step(x, y), device, graph=False, replay=replay, case="MeZO in a graph",
        **about(device, sequences, model),
    )  # fmt: skip


@pytest.mark.parametrize("noise", ["gaussian", "hadamard"])
@pytest.mark.parametrize("device", devices())
def test_noise_of_all_weights(benchmark, device, noise):
    model = decoder(device)
    shapes = {id(p): p.shape for p in model.parameters()}.values()

    def run():
        for site, shape in enumerate(shapes):
            materialize(shape, seed=1, step=2, site=site, noise=noise, device=device)

    time_case(benchmark, run, device, graph=False, case="noise of all weights", noise=noise, **about(device, 0, model))

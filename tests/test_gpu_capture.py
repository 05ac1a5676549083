"""The captured step on a GPU: replays against eager steps, bit for bit, and a host that never waits. Marked ``gpu``."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import ezo_kernels as ezo
from ezo_kernels.optim.capture import WARM_UP
from tests.test_gpu import batch, bits, lenet, same

pytestmark = pytest.mark.gpu

HEADS = {
    "none": (0, None),
    "sgd": (["fc3"], functools.partial(torch.optim.SGD, lr=0.05, fused=True)),
    "momentum": (["fc2", "fc3"], functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True)),
    "adam": (["fc3"], functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)),
    "all": ("all", functools.partial(torch.optim.SGD, lr=0.05, fused=True)),
}


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def pair(head="sgd", dtype=torch.float32, **kwargs):
    names, make = HEADS[head]
    return [
        ezo.ElasticZO(ezo.convert_(lenet().to(dtype), head=names), head_optimizer=make, capture=on, **kwargs)
        for on in (True, False)
    ]


def loss_fn(out, y):
    return F.cross_entropy(out.float(), y)


def together(ours, theirs, batches):
    for x, y in batches:
        a, b = (opt.train_step(x, y, loss_fn) for opt in (ours, theirs))
        assert torch.equal(a, b) or (a.isnan() and b.isnan())
    assert same(bits(ours.model), bits(theirs.model)) and torch.equal(ours.step_count, theirs.step_count)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("head", HEADS)
def test_a_hundred_replays_equal_a_hundred_eager_steps(head, mode):
    ours, theirs = pair(head, mode=mode, clip=5.0, queries=2)
    data = [batch(32, i) for i in range(8)]
    together(ours, theirs, [data[i % 8] for i in range(100 + WARM_UP + 1)])
    assert ours.capture_counters["captures"] == 1 and ours.capture_counters["replays"] >= 100


@pytest.mark.parametrize("noise", ["gaussian_fast", "hadamard", "rademacher"])
def test_16_bit_weights_round_alike(noise):
    ours, theirs = pair("sgd", torch.bfloat16, noise=noise)
    together(ours, theirs, [(x.bfloat16(), y) for x, y in (batch(32, i) for i in range(20))])


def test_schedules_move_lr_and_eps():
    ours, theirs = pair("adam")
    schedules = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.7) for opt in (ours, theirs)]
    moved = []
    for i in range(12):
        before = bits(ours.model)
        together(ours, theirs, [batch(32, i)])
        moved.append((ours.model.fc3.weight - before["fc3.weight"]).abs().max().item())
        for opt, schedule in zip((ours, theirs), schedules, strict=True):
            schedule.step()
            opt.param_groups[0]["eps"] *= 1.1
    assert moved[-1] < moved[WARM_UP] / 5 and ours.capture_counters["captures"] == 1


def test_a_short_batch():
    ours, theirs = pair("momentum")
    rows = [32] * 8 + [7] + [32] * 4 + [7] + [32] * 3
    together(ours, theirs, [batch(n, i) for i, n in enumerate(rows)])
    assert ours.capture_counters == {"captures": 1, "replays": len(rows) - 6, "eager_steps": 6}


def test_a_step_that_is_not_finite():
    ours, theirs = pair("momentum")
    together(
        ours,
        theirs,
        [(x * math.inf if i in (0, 7) else x, y) for i, (x, y) in enumerate(batch(32, i) for i in range(10))],
    )
    assert ours.skipped.item() == 2 and ours.step_count.item() == 8


def test_what_moved_is_captured_again():
    ours, theirs = pair("sgd")
    together(ours, theirs, [batch(32, i) for i in range(6)])
    for opt in (ours, theirs):
        for p in opt.model.parameters():
            p.data = p.data.clone()
    together(ours, theirs, [batch(32, i) for i in range(6)])
    assert ours.capture_counters["captures"] == 2


@pytest.mark.parametrize("head", ["none", "momentum"])
def test_replays_never_wait_and_memory_does_not_grow(head):
    ours, _ = pair(head, clip=5.0)
    x, y = batch(32)
    for _ in range(WARM_UP + 4):
        ours.train_step(x, y, loss_fn)
    torch.cuda.synchronize()
    allocated, calls = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            ours.train_step(x, y, loss_fn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_stats()["num_device_alloc"] == calls


def waiting(out, y):
    return F.cross_entropy(out, y) + 0.0 * out.max().item()


def test_a_loss_that_waits_fails_at_the_capture_and_changes_nothing():
    ours, theirs = pair("sgd")
    for i in range(WARM_UP):
        for opt in (ours, theirs):
            opt.train_step(*batch(32, i), waiting)
    before = bits(ours.model)
    with pytest.raises(RuntimeError, match="could not be captured"):
        ours.train_step(*batch(32), waiting)
    assert same(before, bits(ours.model))
    torch.cuda.empty_cache()  # torch's allocator does not go on capturing, and its generator gives numbers
    torch.randn(3, device="cuda")
    together(ours, theirs, [batch(32, i) for i in range(6)])
    assert ours.capture_counters["captures"] == 1


@pytest.mark.parametrize("head", [0, ["fc3"]])
def test_integer_steps(head):
    runs = [
        ezo.ElasticZOInt8(ezo.convert_(lenet(), head=head, precision="int8"), capture=on, seed=1)
        for on in (True, False)
    ]
    for i in range(30):
        x, y = batch(32 if i != 9 else 7, i)
        a, b = (opt.train_step(ezo.quantize(x), y) for opt in runs)
        assert torch.equal(a, b)
    assert same(bits(runs[0].model), bits(runs[1].model)) and runs[0].capture_counters["captures"] == 1


def test_the_command_line_captures(tmp_path):
    """A captured run ends with the weights of an eager one, the short last batch of an epoch included."""
    from synthetic_idx import make_arrays, write_idx

    from ezo_kernels.cli import checkpoint as ckpt
    from ezo_kernels.cli import main

    folder = write_idx(tmp_path / "data", make_arrays(train=128))
    common = ["train", "--data-dir", str(folder), "--batch", "16", "--epochs", "2", "--device", "cuda", "--head", "0"]
    models = []
    for options in ([], ["--capture"]):
        path = tmp_path / f"run{len(options)}.pt"
        assert main([*common, *options, "--checkpoint", str(path)]) == 0
        models.append(ckpt.read(path)["model"])
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name

"""NVTX ranges: exactly the documented names when on, balanced after an error too, and nothing when off."""

from __future__ import annotations

import sys

import pytest
import torch
from recording_graphs import RecordingGraphs

import ezo_kernels as ezo
from ezo_kernels import _nvtx
from tests.test_step import batch, lenet

LAYERS = ["trunk conv1", "trunk conv2", "trunk fc1", "trunk fc2", "head fc3"]
STEP = ["forward", *LAYERS, "loss", "head backward", "g", "head update", "update"]


@pytest.fixture
def seen(monkeypatch):
    """What was pushed, in order; the end of a test checks that all of it was popped, last first."""
    import nvtx

    names, stack = [], []

    def push(name, domain):
        assert domain == _nvtx.DOMAIN
        names.append(name)
        stack.append(name)

    def pop(domain):
        assert domain == _nvtx.DOMAIN
        stack.pop()

    monkeypatch.setattr(nvtx, "push_range", push)
    monkeypatch.setattr(nvtx, "pop_range", pop)
    yield names
    assert stack == []


def optimizer(head=("fc3",), **kwargs):
    return ezo.ElasticZO(ezo.convert_(lenet(), head=list(head) or 0), **kwargs)


def second_step(opt, x, y, seen):
    """The first one runs the model more often, to check it."""
    opt.train_step(x, y)
    seen.clear()
    opt.train_step(x, y)


def test_off_pushes_nothing(seen, monkeypatch):
    opt = optimizer()
    for p in _nvtx.PHASES:
        assert opt._phase(p) is opt._phase.layers(opt.model, None)  # the one context that does nothing
    second_step(opt, *batch(8), seen)
    assert seen == []


def test_a_stacked_step(seen):
    second_step(optimizer(nvtx=True), *batch(8), seen)
    assert seen == STEP


def test_a_step_one_group_at_a_time(seen):
    second_step(optimizer(nvtx=True, mode="sequential", queries=2), *batch(8), seen)
    assert seen == ["forward", *LAYERS, "head backward"] * 4 + ["g", "head update", "update"]


def test_a_step_on_drawn_rows(seen):
    second_step(optimizer(nvtx=True, importance_rows=4), *batch(8), seen)
    assert seen == ["rows", *LAYERS, *STEP]


def test_a_step_with_perturbed_outputs(seen):
    second_step(optimizer(nvtx=True, node_perturbation=ezo.NodePerturbation(["fc1"])), *batch(8), seen)
    at = STEP.index("g")
    assert seen == [*STEP[:at], "nodes", *STEP[at:]]


def test_pure_zeroth_order_and_pure_backpropagation(seen):
    second_step(optimizer((), nvtx=True), *batch(8), seen)
    assert seen == ["forward", *LAYERS[:4], "trunk fc3", "loss", "g", "update"]
    model = ezo.convert_(lenet(), head="all")
    second_step(ezo.ElasticZO(model, nvtx=True), *batch(8), seen)
    assert seen == ["forward", *(f"head {n.split()[1]}" for n in LAYERS), "head backward", "g", "head update"]


def test_an_integer_step(seen):
    model = ezo.convert_(lenet(), head=["fc3"], precision="int8")
    opt = ezo.ElasticZOInt8(model, nvtx=True)
    x, y = batch(8)
    second_step(opt, ezo.quantize(x), y, seen)
    assert seen == [*STEP[:-2], "update", "head update"]


@pytest.mark.parametrize("fails", ["model", "loss"])
def test_an_error_leaves_the_ranges_balanced(seen, fails):
    opt = optimizer(nvtx=True)
    x, y = batch(8)
    opt.train_step(x, y)
    seen.clear()

    def loss(out, y):
        raise RuntimeError("loss")

    with pytest.raises((RuntimeError, ValueError)):
        opt.train_step(x[:, :, :5] if fails == "model" else x, y, *([] if fails == "model" else [loss]))
    assert seen[0] == "forward" and ("loss" in seen) == (fails == "loss")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in opt.model.modules())


def test_a_replay_is_one_range(seen, monkeypatch):
    monkeypatch.setattr("ezo_kernels.optim.elastic_zo.graphs_for", RecordingGraphs)
    opt = optimizer(nvtx=True, capture=True)
    for _ in range(4):
        opt.train_step(*batch(8))
    seen.clear()
    opt.train_step(*batch(8))
    assert seen == ["replay"]


def test_without_the_package_ranges_are_torchs_or_none(seen, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _nvtx._backend() is None
    second_step(optimizer(nvtx=True), *batch(8), seen)
    pushed = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", pushed.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: pushed.append("pop"))
    with _nvtx.Ranges(True)("g"):
        assert pushed == ["g"]
    assert pushed == ["g", "pop"] and seen == []

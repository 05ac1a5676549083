"""The captured step: settings of modules, steps that are not captured yet, and what is left behind by one that failed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from tests.int8_models import tiny, tiny_batch
from tests.test_capture import pair, recording, together  # noqa: F401
from tests.test_step import batch


class Settings(nn.Module):
    """What a forward reads from its modules beside tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.drop, self.o = (
            nn.Linear(784, 16),
            nn.BatchNorm1d(16),
            nn.Dropout(0.2),
            nn.Linear(16, 10),
        )
        self.steps = 0

    def forward(self, x):
        self.steps += 1  # a user's own counter, which no graph sees
        return self.o(self.drop(self.norm(self.a(x.flatten(1)))))


@pytest.mark.parametrize("change", ["p", "momentum", "eps", "ignore_index"])
def test_what_modules_are_set_to_is_baked_in(change):
    opts = []
    for on in (True, False):
        torch.manual_seed(0)
        model = ezo.convert_(Settings(), head=["o"])
        opts.append(ezo.ElasticZO(model, lr=1e-3, capture=on))
    loss_fn = nn.CrossEntropyLoss()
    together(*opts, [batch(4, i) for i in range(6)], loss_fn=loss_fn)
    for opt in opts:
        owner = {"p": opt.model.drop, "ignore_index": loss_fn}.get(change, opt.model.norm)
        setattr(owner, change, {"p": 0.7, "momentum": 0.9, "eps": 0.5, "ignore_index": 3}[change])
    together(*opts, [batch(4, i) for i in range(6)], loss_fn=loss_fn)
    assert opts[0].capture_counters == {"captures": 2, "replays": 6, "eager_steps": 6}


class Counted(nn.Module):
    """A user's own, with a parameter of the trunk: it runs as a class of ours, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.ones(784)), 0

    def forward(self, x):
        self.calls += 1
        return x * self.w


class CountedHead(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_what_a_users_module_counts_is_no_setting():
    model = nn.Sequential(nn.Flatten(), Counted(), nn.Linear(784, 16), CountedHead(16, 10))
    opt = ezo.ElasticZO(ezo.convert_(model, head=["3"]), capture=True)
    for i in range(8):
        opt.train_step(*batch(4, i))
    assert opt.capture_counters == {"captures": 1, "replays": 5, "eager_steps": 3}


def test_first_steps_that_are_not_finite_are_skipped_and_nothing_is_captured():
    """The check of the rows of a batch, which looks at values, has not passed yet."""
    ours, theirs = pair("sgd")
    batches = [batch(4, i) for i in range(9)]
    together(ours, theirs, [(x * math.inf if i < 5 else x, y) for i, (x, y) in enumerate(batches)])
    assert ours.skipped.item() == 5 and ours.capture_counters == {"captures": 1, "replays": 3, "eager_steps": 6}


def test_the_memory_that_an_integer_graph_writes_to_lives_as_long_as_it():
    opt = ezo.ElasticZOInt8(tiny(("fc2",)), capture=True)
    for i in range(5):
        opt.train_step(*tiny_batch(i))
    assert any(held is opt.arena.buffer for held in opt._captured._kept)


def test_assigned_integers_are_refused_and_never_replayed():
    opt = ezo.ElasticZOInt8(tiny(("fc2",)), capture=True)
    for i in range(5):
        opt.train_step(*tiny_batch(i))
    opt.model.load_state_dict({n: v.clone() for n, v in opt.model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="was replaced"):
        opt.train_step(*tiny_batch())
    assert opt.capture_counters["replays"] and opt.step_count.item() == 5


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_a_replaced_layer_is_refused_and_never_replayed(precision):
    opt, take = pair("sgd")[0], batch
    if precision == "int8":
        opt, take = ezo.ElasticZOInt8(tiny(("fc2",)), capture=True), tiny_batch
    for _ in range(6):
        opt.train_step(*take(4))
    assert opt.capture_counters["replays"]
    name = "conv" if precision == "int8" else "conv1"
    setattr(opt.model, name, copy.deepcopy(getattr(opt.model, name)))
    with pytest.raises(ValueError, match="was replaced by another Parameter"):
        opt.train_step(*take(4))
    assert opt.step_count.item() == 6


def test_a_failed_capture_is_told_as_it_was_whatever_it_left_behind():
    """A buffer that cannot be put back, as none can while a stream is in a broken capture, hides no reason."""
    ours, _ = pair("all")
    ours.model.register_buffer("seen", torch.zeros(1))

    class Broken(torch.Tensor):
        def copy_(self, other):
            raise RuntimeError("previous error during capture")

    def fails(output, y):
        ours._buffers = [(Broken(1), torch.zeros(1))]
        raise RuntimeError("the reason")

    with pytest.raises(RuntimeError, match="the reason"):
        ours._eager(*batch(4), fails, {})
    assert ours._losses is None and ours._buffers == []

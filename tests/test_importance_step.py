"""Steps of ElasticZO on rows drawn by importance: the formula, what stays as it was, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from recording_graphs import RecordingGraphs
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import materialize
from ezo_kernels.ops.importance import importance_rows
from ezo_kernels.ops.noise import key_tensor
from ezo_kernels.optim.capture import may_be_left_out
from tests.test_step import batch, bits, lenet, same


def optimizer(head=("fc3",), **kwargs):
    return ezo.ElasticZO(ezo.convert_(lenet(), head=list(head)), importance_rows=6, **{"seed": 5, **kwargs})


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_step_is_the_formula_on_the_drawn_rows(mode, antithetic):
    opt = optimizer(lr=1e-3, eps=1e-3, queries=2, antithetic=antithetic, mode=mode, head_lr=0.1)
    model, before, (x, y) = opt.model, bits(opt.model), batch(20)
    rows, weight = importance_rows(lenet()(x).detach(), y, 6, key_tensor(5, 0))
    opt.train_step(x, y)
    z = {
        s.names[0]: [materialize(s.shape, seed=5, step=0, site=s.site, query=q, layout=s.layout) for q in range(2)]
        for s in model._ezo.manifest
    }
    losses, gradients = [], []
    for q in range(2):
        for sign in (1, -1) if antithetic else (1,):
            twin = lenet()
            with torch.no_grad():
                for name, each in z.items():
                    twin.get_parameter(name).add_(sign * 1e-3 * each[q])
            loss = (F.cross_entropy(twin(x[rows]), y[rows], reduction="none") * weight).mean()
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, twin.fc3.weight)[0])
    torch.testing.assert_close(opt.losses, torch.tensor(losses), rtol=1e-5, atol=1e-6)
    for name, each in z.items():
        step = sum(g * v for g, v in zip(opt.g, each, strict=True)) / 2
        torch.testing.assert_close(model.state_dict()[name], before[name] - 1e-3 * step, rtol=1e-5, atol=1e-6)
    moved = (before["fc3.weight"] - model.fc3.weight.detach()) / 0.1
    torch.testing.assert_close(moved, torch.stack(gradients).mean(0), rtol=1e-4, atol=1e-5)


def test_a_batch_that_is_no_larger_is_taken_whole():
    ours, theirs = optimizer(), ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), seed=5)
    for rows in (6, 3):
        for opt in (ours, theirs):
            opt.train_step(*batch(rows))
    assert same(bits(ours.model), bits(theirs.model))


def test_draws_of_steps_and_of_micro_batches_differ(monkeypatch):
    drawn = []

    def spy(*args, **kwargs):
        drawn.append(importance_rows(*args, **kwargs)[0].tolist())
        return importance_rows(*args, **kwargs)

    monkeypatch.setattr("ezo_kernels.optim.importance.importance_rows", spy)
    opt = optimizer(lr=0.0, head_lr=0.0)
    for update in (False, True, True):
        opt.train_step(*batch(40), update=update)
    assert len({tuple(rows) for rows in drawn}) == 3


class Wide(nn.Module):
    """Takes arguments of which some are of no rows."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop, self.out = nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3)

    def forward(self, x, y, table=None, mixed=False, masked=False):
        h = torch.relu(self.inner(x) + (0 if table is None else table.sum(0)))
        h = self.drop(h)
        logits = self.out(h - h.mean(0) if mixed else h)
        return logits.index_fill(1, torch.tensor([2]), -math.inf) if masked else logits


def wide(p=0.0):
    torch.manual_seed(0)
    model = Wide()
    model.drop.p = p
    x = {"x": torch.randn(12, 5), "y": torch.zeros(2)}
    return ezo.ElasticZO(ezo.convert_(model, head=["out"]), importance_rows=4), x, torch.randint(2, (12,))


@pytest.mark.parametrize("mode", ["auto", "sequential"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "a class without a chance"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dicts_and_arguments_that_are_no_batch(p, masked, mode):
    opt, x, y = wide(p)
    opt.train_step(x, y, table=torch.ones(5, 7), masked=masked)
    assert opt.step_count == 1 and opt.skipped == 0
    before = bits(opt.model)
    for kwargs in ({"table": torch.ones(12, 7), "masked": masked}, {"mixed": True, "masked": masked}):
        opt, x, y = wide(p)
        opt.mode = opt.requested_mode = mode
        with pytest.raises(ValueError, match="a row's logits are others when it is drawn"):
            opt.train_step(x, y, **kwargs)
        assert opt.step_count == 0 and not same(bits(opt.model), before)


def test_dropouts_are_the_contracts():
    """The plain forward draws nothing from torch, and both ways of running the groups have the same masks."""
    state, runs = torch.get_rng_state(), []
    for mode in ("stacked", "sequential"):
        opt, x, y = wide(0.5)
        opt.mode = mode
        torch.set_rng_state(state)
        for _ in range(3):
            opt.train_step(x, y)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(opt.losses)
    assert torch.equal(*runs)


def test_a_copy_goes_on_and_another_state_is_refused():
    opt = optimizer(lr=1e-3, queries=2)
    opt.train_step(*batch(20))
    state, held = copy.deepcopy(opt.state_dict()), bits(opt.model)
    opt.train_step(*batch(20))
    again = optimizer(lr=1e-3, queries=2)
    again.model.load_state_dict(held)
    again.load_state_dict(state)
    again.train_step(*batch(20))
    assert same(bits(again.model), bits(opt.model))
    whole = ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), lr=1e-3, queries=2)
    with pytest.raises(ValueError, match="importance_rows=6, this run of None"):
        whole.load_state_dict(state)


def masked(module, args, logits):
    return logits.index_fill(1, torch.tensor([7]), -math.inf)


@pytest.mark.parametrize("hidden", [False, True], ids=["", "a class without a chance"])
@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_captured_step_draws_anew(monkeypatch, mode, hidden):
    monkeypatch.setattr("ezo_kernels.optim.elastic_zo.graphs_for", RecordingGraphs)
    ours, theirs = (
        optimizer(lr=1e-3, mode=mode, capture=on, head_optimizer=lambda p: torch.optim.SGD(p, lr=0.05, fused=True))
        for on in (True, False)
    )
    for opt in (ours, theirs) if hidden else ():
        opt.model.fc3.register_forward_hook(may_be_left_out(masked))
    for i in range(8):
        for opt in (ours, theirs):
            x, y = batch(20, i % 2)
            opt.train_step(x, y % 7)
    assert ours.capture_counters["replays"] > 3
    assert same(bits(ours.model), bits(theirs.model)) and torch.equal(ours.losses, theirs.losses)


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def test_refusals():
    for value, error, text in (
        (0, ValueError, "at least 1, got 0"), (4097, ValueError, "4097"), (2.0, TypeError, "int"), (True, TypeError, "int"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), importance_rows=value)
    with pytest.raises(ValueError, match="no parameter is trained by zeroth order"):
        ezo.ElasticZO(ezo.convert_(lenet(), head="all"), importance_rows=4)
    opt = optimizer()
    with pytest.raises(ValueError, match=r"step\(closure\) does not see the batch"):
        opt.step(lambda: torch.zeros(()))
    model = Normed()
    opt, x, y = ezo.ElasticZO(ezo.convert_(model, head=1), importance_rows=4), torch.randn(9, 4), torch.randint(3, (9,))
    before = bits(model)
    for loss_fn in (nn.CrossEntropyLoss(label_smoothing=0.1), lambda output, target: output.sum()):
        with pytest.raises(NotImplementedError, match=r"plain cross-entropy.*'1' would take batch statistics"):
            opt.train_step(x, y, loss_fn=loss_fn)
    assert same(bits(model), before) and opt.step_count == 0
    model[1].eval()
    opt.train_step(x, y, loss_fn=nn.CrossEntropyLoss())
    for change, error, text in (
        ((x, y[:5]), ValueError, r"got \(9, 3\), \(5,\)"),
        ((x, y.tolist()), TypeError, "target must be a torch.Tensor, got list"),
        ((x.repeat(500, 1), y.repeat(500)), ValueError, "1 to 4096 rows are drawn out of as many, got 4 out of 4500"),
    ):
        with pytest.raises(error, match=text):
            opt.train_step(*change)
    assert opt.step_count == 1


class OfSteps(nn.Module):
    """[time, batch, features]: its first dimension is no batch."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.out(torch.relu(self.inner(x)).sum(0))


def test_logits_that_are_not_of_the_batchs_rows():
    opt = ezo.ElasticZO(ezo.convert_(OfSteps(), head=["out"]), importance_rows=6, mode="sequential")
    with pytest.raises(ValueError, match=r"logits \[20, classes\] of a batch of 20 rows, got \(6, 3\)"):
        opt.train_step(torch.randn(20, 6, 5), torch.arange(6) % 3)
    assert opt.step_count == 0


class Counting(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.Linear(6, 3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_a_first_step_that_fails_leaves_the_buffers():
    model = ezo.convert_(Counting(), head=1)
    opt, before = ezo.ElasticZO(model, importance_rows=4), bits(model)
    with pytest.raises(ValueError, match="buffers written by the forward: 'calls'"):
        opt.train_step(torch.randn(9, 4), torch.randint(3, (9,)))
    assert same(bits(model), before)


def test_logits_that_are_not_finite_skip_the_step():
    opt = optimizer()
    x, y = batch(20)
    x[3] = float("nan")
    before = bits(opt.model)
    opt.train_step(x, y)
    assert opt.skipped == 1 and same(bits(opt.model), before)
    opt.train_step(*batch(20))
    assert opt.skipped == 1 and opt.step_count == 1

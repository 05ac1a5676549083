"""The captured step, with graphs that record and repeat operators on the CPU (tests/recording_graphs.py)."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from recording_graphs import RecordingGraphs
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.optim.capture import WARM_UP
from tests.test_step import batch, bits, lenet, same


@pytest.fixture(autouse=True)
def recording(monkeypatch):
    monkeypatch.setattr("ezo_kernels.optim.elastic_zo.graphs_for", RecordingGraphs)
    monkeypatch.setattr("ezo_kernels.optim.elastic_zo_int8.graphs_for", RecordingGraphs)


HEADS = {
    "none": (0, None),
    "sgd": (["fc3"], functools.partial(torch.optim.SGD, lr=0.05, fused=True)),
    "momentum": (["fc2", "fc3"], functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3, fused=True)),
    "adam": (["fc3"], functools.partial(torch.optim.Adam, lr=1e-3, fused=True)),
    "all": ("all", functools.partial(torch.optim.SGD, lr=0.05, fused=True)),
}  # fmt: skip


def pair(head="sgd", **kwargs):
    """The same run, captured and not."""
    names, make = HEADS[head]
    return [
        ezo.ElasticZO(ezo.convert_(lenet(), head=names), head_optimizer=make, capture=on, **kwargs) for on in (True, False)
    ]  # fmt: skip


def together(ours, theirs, batches, **kwargs):
    for x, y in batches:
        a, b = (opt.train_step(x, y, **kwargs) for opt in (ours, theirs))
        assert torch.equal(a, b) or (a.isnan() and b.isnan())
        assert a.shape == () and torch.equal(ours.g.nan_to_num(7.0), theirs.g.nan_to_num(7.0))
        assert torch.equal(ours.losses.nan_to_num(7.0), theirs.losses.nan_to_num(7.0))
    assert same(bits(ours.model), bits(theirs.model))
    assert torch.equal(ours.step_count, theirs.step_count) and torch.equal(ours.skipped, theirs.skipped)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("head", HEADS)
def test_replays_equal_eager_steps_bitwise(head, mode):
    if head == "all" and mode == "sequential":
        pytest.skip("pure backpropagation has one group")
    ours, theirs = pair(head, mode=mode, clip=5.0, queries=2, seed=3)
    steps = 100 if (head, mode) in (("none", "stacked"), ("sgd", "stacked")) else 12
    together(ours, theirs, [batch(4, i) for i in range(steps)])
    counts = ours.capture_counters
    assert counts["captures"] == 1 and counts["replays"] + counts["eager_steps"] == steps
    # A head with state makes it in the first step: what the graph will read has moved, so the warm-up begins again.
    assert counts["eager_steps"] == WARM_UP + (head in ("momentum", "adam"))
    assert theirs.capture_counters is None


def test_schedules_move_the_learning_rates_of_both_and_eps():
    ours, theirs = pair("adam")
    moves = [
        torch.optim.lr_scheduler.ExponentialLR(ours, 0.5),
        torch.optim.lr_scheduler.ExponentialLR(theirs, 0.5),
    ]
    for i in range(10):
        together(ours, theirs, [batch(4, i)])
        for opt, schedule in zip((ours, theirs), moves, strict=True):
            schedule.step()
            opt.param_groups[0]["eps"] *= 1.25
    assert ours.capture_counters["captures"] == 1 and ours.capture_counters["replays"] == 6
    assert ours._lr.item() == pytest.approx(1e-4 * 0.5**9) and isinstance(ours.param_groups[1]["lr"], float)
    assert ours.head_optimizer._lrs[0].item() == pytest.approx(1e-3 * 0.5**9)


def test_scalars_are_written_only_when_they_change():
    ours, _ = pair("sgd")
    for i in range(6):
        ours.train_step(*batch(4, i))
    versions = [t._version for t in (ours._lr, ours._eps, ours.head_optimizer._lrs[0])]
    ours.train_step(*batch(4))
    assert versions == [t._version for t in (ours._lr, ours._eps, ours.head_optimizer._lrs[0])]
    ours.param_groups[1]["lr"] = 0.01
    ours.train_step(*batch(4))
    assert ours.head_optimizer._lrs[0]._version == versions[2] + 1 and ours._lr._version == versions[0]
    before = bits(ours.model)
    ours.param_groups[0]["eps"] = -1.0
    with pytest.raises(ValueError, match="eps"):
        ours.train_step(*batch(4))
    assert same(before, bits(ours.model))


def test_a_short_batch_runs_eagerly_and_replays_go_on():
    ours, theirs = pair("momentum")
    rows = [8] * 6 + [3] + [8] * 4 + [3] + [8] * 2
    together(ours, theirs, [batch(n, i) for i, n in enumerate(rows)])
    assert ours.capture_counters == {"captures": 1, "replays": len(rows) - 6, "eager_steps": 6}


def test_a_batch_size_that_stays_is_captured():
    ours, theirs = pair("sgd")
    together(ours, theirs, [batch(8 if i < 6 else 5, i) for i in range(12)])
    assert ours.capture_counters["captures"] == 2 and ours._captured._graphs.dropped == 1


@pytest.mark.parametrize("every", [5, 100])
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_a_run_that_is_watched_is_captured(precision, every):
    """The hooks of Diagnostics are there in the first step, and in the one that is captured where every is 5; others refuse."""
    if precision == "int8":
        runs = [
            ezo.ElasticZOInt8(ezo.convert_(lenet(), head=["fc3"], precision="int8"), capture=on) for on in (True, False)
        ]  # fmt: skip
    else:
        runs = pair("sgd")
    watch = ezo.Diagnostics(runs[0], every=every, warn=False)
    for i in range(12):
        x, y = batch(4, i)
        a, b = (opt.train_step(ezo.quantize(x) if precision == "int8" else x, y) for opt in runs)
        assert torch.equal(a, b)
        watch.observe()
    assert same(bits(runs[0].model), bits(runs[1].model)) and runs[0].capture_counters["captures"] == 1
    runs[0].model.fc1.register_forward_hook(lambda *a: None)
    with pytest.raises(NotImplementedError, match="^this step cannot be captured: 'fc1' has hooks, [^;]*$"):
        runs[0].train_step(x[:3] if precision == "float" else ezo.quantize(x[:3]), y[:3])


def test_a_users_batch_and_loss_are_not_kept():
    ours, theirs = pair("none")
    x, y = batch(4)
    losses, copies = [], []
    for i in range(8):
        x.copy_(batch(4, i)[0])  # one buffer that the user fills again and again
        losses.append(ours.train_step(x, y))
        copies.append(losses[-1].clone())
        assert torch.equal(theirs.train_step(x, y), losses[-1])
    assert all(torch.equal(a, b) for a, b in zip(losses, copies, strict=True))
    assert len({loss.data_ptr() for loss in losses}) == 8


def move_by_data(opt):
    for p in opt.model.parameters():
        p.data = p.data.clone()


def move_by_load(opt):
    state = opt.state_dict()
    opt.head_optimizer.optimizer.load_state_dict(
        copy.deepcopy(state["head"])
    )  # torch's own replaces the state's tensors


@pytest.mark.parametrize("move", [move_by_data, move_by_load])
def test_what_moved_is_captured_again(move):
    ours, theirs = pair("momentum")
    together(ours, theirs, [batch(4, i) for i in range(6)])
    for opt in (ours, theirs):
        move(opt)
    together(ours, theirs, [batch(4, i) for i in range(7)])
    assert ours.capture_counters["captures"] == 2 and ours._captured._graphs.dropped == 1


def test_a_dtype_change_is_captured_again():
    ours, _ = pair("sgd")
    for i in range(5):
        ours.train_step(*batch(4, i))
    ours.model.to(torch.bfloat16)
    x, y = batch(4)
    for _ in range(5):
        assert torch.isfinite(ours.train_step(x.bfloat16(), y))
    assert ours.capture_counters["captures"] == 2


def test_assigned_parameters_are_refused_and_never_replayed():
    ours, _ = pair("sgd")
    for i in range(5):
        ours.train_step(*batch(4, i))
    ours.model.load_state_dict(bits(ours.model), assign=True)
    with pytest.raises(ValueError, match="was replaced"):
        ours.train_step(*batch(4))


@pytest.mark.parametrize("change", ["clip", "weight_decay", "train", "loss"])
def test_what_a_graph_bakes_in_is_captured_again(change):
    ours, theirs = pair("momentum", clip=1.0)
    together(ours, theirs, [batch(4, i) for i in range(6)])
    loss_fn = F.cross_entropy
    for opt in (ours, theirs):
        if change == "clip":
            opt.param_groups[0]["clip"] = 1e-3
        elif change == "weight_decay":
            opt.param_groups[1]["weight_decay"] = 0.5
        elif change == "train":
            opt.model.eval()
        else:
            loss_fn = functools.partial(F.cross_entropy, label_smoothing=0.1)
    together(ours, theirs, [batch(4, i) for i in range(6)], loss_fn=loss_fn)
    assert ours.capture_counters["captures"] == 2


def test_a_loss_made_anew_each_step_is_the_same_loss():
    ours, _ = pair("none")
    for i in range(6):
        ours.train_step(*batch(4, i), loss_fn=lambda out, y: F.cross_entropy(out, y))
    assert ours.capture_counters == {"captures": 1, "replays": 3, "eager_steps": 3}


def test_load_state_dict_goes_into_the_tensors_that_are_there():
    ours, theirs = pair("adam")
    together(ours, theirs, [batch(4, i) for i in range(5)])
    saved, weights = copy.deepcopy(ours.state_dict()), bits(ours.model)
    places = [t.data_ptr() for t in (*ours._held(), ours._seed, ours._step)]
    first = [ours.train_step(*batch(4, i)) for i in range(3)]
    for opt in (ours, theirs):
        opt.load_state_dict(saved)
        opt.model.load_state_dict(weights)
    assert places == [t.data_ptr() for t in (*ours._held(), ours._seed, ours._step)]
    assert all(torch.equal(a, ours.train_step(*batch(4, i))) for i, a in enumerate(first))
    assert ours.capture_counters["captures"] == 1
    for i in range(3):
        theirs.train_step(*batch(4, i))
    assert same(bits(ours.model), bits(theirs.model))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_copy_captures_anew(how, scheduled):
    ours, theirs = pair("momentum", nvtx=False)
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(ours, 0.9)
    together(ours, theirs, [batch(4, i) for i in range(6)])
    twin = how(ours)
    assert twin.capture_counters == {"captures": 0, "replays": 0, "eager_steps": 0}
    assert not {p.data_ptr() for p in twin.trunk} & {p.data_ptr() for p in ours.trunk}
    before = bits(ours.model)
    together(twin, theirs, [batch(4, i) for i in range(6, 12)])
    assert twin.capture_counters["captures"] == 1 and same(before, bits(ours.model))
    assert twin.param_groups[1] is twin.head_optimizer.optimizer.param_groups[0]


@pytest.mark.parametrize("head", ["none", "momentum", "adam", "all"])
@pytest.mark.parametrize("at", [0, 6])
def test_a_step_that_is_not_finite_changes_nothing(head, at):
    ours, theirs = pair(head)
    for i in range(9):
        x, y = batch(4, i)
        before = bits(ours.model)
        together(ours, theirs, [(x * math.inf if i == at else x, y)])
        assert same(before, bits(ours.model)) == (i == at)
    assert ours.skipped.item() == 1 and ours.step_count.item() == 8
    assert ours.capture_counters["replays"] >= 3


def test_a_skipped_fused_step_leaves_no_uninitialised_state():
    model = ezo.convert_(lenet(), head=["fc3"])
    opt = ezo.ElasticZO(model, head_optimizer=HEADS["momentum"][1])
    x, y = batch(4)
    opt.train_step(x * math.nan, y)
    assert opt.head_optimizer.tensors() and not any(t.any() for t in opt.head_optimizer.tensors())


# ------------------------------------------------------------------------------------------------------- other models


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(4, 10)

    def forward(self, x, *, scale=1.0):
        return self.fc(self.drop(torch.relu(self.norm(self.conv(x))).mean((2, 3)))) * scale


def test_batch_norm_dropout_and_keyword_arguments():
    torch.manual_seed(0)
    model = Norms()
    runs = [
        ezo.ElasticZO(ezo.convert_(copy.deepcopy(model), head=["fc"]), head_optimizer=HEADS["sgd"][1], capture=on)
        for on in (True, False)
    ]  # fmt: skip
    for i in range(8):
        x, y = batch(6, i)
        a, b = (opt.train_step(x * (math.inf if i == 6 else 1.0), y, scale=2.0) for opt in runs)
        assert torch.equal(a, b) or (a.isnan() and b.isnan())
    assert same(bits(runs[0].model), bits(runs[1].model)) and runs[0].capture_counters["replays"] == 5
    assert runs[0].model.norm.num_batches_tracked.item() == 7


@pytest.mark.parametrize(
    ("head", "loss", "how"),
    [
        (0, "cross_entropy", {}),
        (["fc3"], "cross_entropy", {}),
        (0, "float_cross_entropy", {}),
        (["fc3"], "float_cross_entropy", {"head_remainder": True}),
        (["fc3"], "cross_entropy", {"head_remainder": True, "mode": "sequential", "head_grad": "plus"}),
        (["fc2", "fc3"], "cross_entropy", {"head_remainder": True, "queries": 2, "antithetic": False}),
    ],
)
def test_integer_steps(head, loss, how):
    runs = []
    for on in (True, False):
        model = ezo.convert_(lenet(), head=head, precision="int8")
        runs.append(ezo.ElasticZOInt8(model, loss=loss, capture=on, seed=1, **how))
    for i in range(9):
        x, y = batch(4 if i != 6 else 3, i)
        for opt in runs:
            opt.param_groups[0]["bits"] = 1 if i < 5 else 2
        a, b = (opt.train_step(ezo.quantize(x), y) for opt in runs)
        assert torch.equal(a, b) and a.dtype == b.dtype and torch.equal(runs[0].g, runs[1].g)
        assert torch.equal(runs[0].mean_loss, runs[1].mean_loss)
    assert same(bits(runs[0].model), bits(runs[1].model))
    ours, theirs = (opt.state_dict()["head_remainder"] for opt in runs)
    assert same(ours, theirs) and bool(ours) == ("head_remainder" in how)
    assert runs[0].capture_counters == {
        "captures": 1,
        "replays": 4,
        "eager_steps": 5,
    }  # the arena comes with the first step


def test_a_remainder_that_moved_is_captured_again():
    opt = ezo.ElasticZOInt8(
        ezo.convert_(lenet(), head=["fc3"], precision="int8"), capture=True, seed=1, head_remainder=True
    )
    for i in range(10):
        if i == 6:
            opt._remainders = {name: r.clone() for name, r in opt._remainders.items()}
        opt.train_step(ezo.quantize(batch(4, i)[0]), batch(4, i)[1])
    assert opt.capture_counters["captures"] == 2

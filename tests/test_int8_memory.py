"""The memory of integer steps: the arena and its plans, bytes that live outside of it, and the paper's tally."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.nn.arena import Arena, ArenaPlan, Interval
from ezo_kernels.ops import Int8Tensor
from ezo_kernels.planning import paper_tally
from ezo_kernels.planning.live import LiveBytes
from tests.int8_models import ints, lenet, lenet_batch, overwrite, same, state, steps, tiny, tiny_batch

# ---- live bytes


def test_live_counts_bytes():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        del b, c
    assert (live.now, live.peak) == (0, 8000)


def test_a_trunk_step_allocates_little_outside_its_arena():
    model = lenet()
    opt = ezo.ElasticZOInt8(model)
    x, y = lenet_batch(64)
    opt.train_step(x, y)
    known = [opt.arena.buffer, x.values, x.exponent, y, *model.parameters(), *model.buffers()]
    with LiveBytes(known) as live:
        opt.train_step(x, y)
    assert live.peak < 2048, "intermediates are the arena's"


@pytest.mark.parametrize("head", [("fc3",), ("fc2", "fc3")], ids=str)
def test_a_head_allocates_its_errors_and_gradients_outside_the_arena(head):
    """int32 gradients of each group and their sum, and errors of a few rows: nothing of the trunk's size."""
    model = lenet(head)
    opt = ezo.ElasticZOInt8(model)
    x, y = lenet_batch(64)
    opt.train_step(x, y)
    known = [opt.arena.buffer, x.values, x.exponent, y, *model.parameters(), *model.buffers()]
    with LiveBytes(known) as live:
        opt.train_step(x, y)
    of_head = sum(p.numel() for p in opt.head)
    assert live.peak < 4 * of_head * (2 + 2 + 1) + 2 * 64 * 120 * (4 + 1) + 8192


def fp32_peak(rows: int) -> int:
    """Live bytes of a stacked fp32 step, and of its parameters."""
    model = ezo.convert_(ezo.models.LeNet5(), head=0)
    opt = ezo.ElasticZO(model)
    x, y = torch.zeros(rows, 1, 28, 28), torch.arange(rows) % 10
    opt.train_step(x, y)
    with LiveBytes([x, y, *model.parameters()]) as live:
        opt.train_step(x, y)
    return live.peak + 4 * sum(p.numel() for p in model.parameters())


def test_memory_is_as_planned_and_below_fp32s():
    opt = ezo.ElasticZOInt8(lenet())
    x, y = lenet_batch(256)
    for _ in range(2):
        opt.train_step(x, y)
    found = opt.memory()
    assert found["planned_bytes"] == found["measured_bytes"] <= found["all_at_once_bytes"]
    assert found["live_bytes"] <= found["planned_bytes"] == opt.arena.buffer.numel()
    assert found["parameter_bytes"] == 107_786
    assert 1.8 * (found["planned_bytes"] + found["parameter_bytes"]) <= fp32_peak(256)


def test_auto_needs_no_more_memory_than_either_strategy():
    planned = {}
    for strategy in ("buffer", "twice", "auto"):
        opt = ezo.ElasticZOInt8(lenet(), strategy=strategy)
        steps(opt, 1, rows=32)
        planned[strategy] = opt.memory()["planned_bytes"]
    assert planned["auto"] <= min(planned["buffer"], planned["twice"]) and planned["twice"] < planned["buffer"]


def test_memory_before_a_step_is_refused():
    with pytest.raises(ValueError, match="no step"):
        ezo.ElasticZOInt8(tiny()).memory()


def test_memory_is_of_the_optimizers_own_passes():
    """Another one of the same model shares its arena."""
    model = tiny()
    large, small = ezo.ElasticZOInt8(model), ezo.ElasticZOInt8(model, mode="sequential")
    steps(large, 1, tiny_batch, 9)
    steps(small, 1, tiny_batch, 3)
    assert small.memory()["measured_bytes"] == small.memory()["planned_bytes"] < large.memory()["measured_bytes"]


def test_passes_of_a_closure_are_not_planned():
    model = tiny()
    opt, (x, y) = ezo.ElasticZOInt8(model), tiny_batch()
    opt.step(lambda: ezo.ops.int8_cross_entropy(model(x), y))
    assert opt.memory()["planned_bytes"] == opt.memory()["measured_bytes"] == 0 < opt.memory()["parameter_bytes"]


@pytest.mark.parametrize(("rows", "ratio"), [(32, 1.598), (256, 1.458)])
def test_the_papers_tally(rows, ratio):
    """P = 107,786, A = 18,058 and A32 = 8,054 from the model's shapes, and the paper's two ratios."""
    model, x = ezo.models.LeNet5(), torch.zeros(rows, 1, 28, 28)
    fp32, int8 = (paper_tally(model, x, integer=integer)[0] for integer in (False, True))
    assert (fp32, int8) == (4 * (107_786 + rows * 18_058), 107_786 + rows * 18_058 + 4 * rows * 8_054)
    assert round(fp32 / int8, 3) == ratio


# ---- plans


def test_arena_plans_never_overlap():
    rng = random.Random(0)
    for _ in range(300):
        intervals = []
        for _ in range(rng.randrange(1, 25)):
            start = rng.randrange(40)
            end = None if rng.random() < 0.1 else start + rng.randrange(1, 15)
            intervals.append(Interval(rng.choice([0, 1, 63, 64, 65, 1000, rng.randrange(5000)]), start, end))
        plan = ArenaPlan.of(intervals)
        assert plan.live_bytes <= plan.planned_bytes <= plan.all_at_once_bytes
        for n, a in enumerate(intervals):
            assert a.offset % 64 == 0 and a.offset + a.size <= plan.planned_bytes
            for b in intervals[:n]:
                together = a.start < b.end and b.start < a.end and a.size and b.size
                assert not together or a.offset + a.size <= b.offset or b.offset + b.size <= a.offset


def test_whose_accumulators_live_at_the_peak():
    plan = ArenaPlan.of(
        [Interval(640, 1, 4, "a"), Interval(640, 2, 3, "b"), Interval(640, 4, 9, "c"), Interval(64, 5, 6)]
    )
    assert plan.live_bytes == 1280 and plan.at_the_peak() == {"a", "b"}


def test_arena_plan_of_nothing():
    plan = ArenaPlan.of([])
    assert (plan.planned_bytes, plan.live_bytes, plan.all_at_once_bytes) == (0, 0, 0)


def test_the_arena_hands_out_what_was_recorded_and_counts_what_was_not():
    arena = Arena()

    def run(sizes):
        kept = []
        for size in sizes:
            t, block = arena.allocate((size,), torch.int8)
            kept = [(t, block), *kept[:1]]

    with arena.recording() as found:
        run([100, 200, 300])
    assert found[0].live_bytes == found[0].planned_bytes == 128 + 256 + 320
    zeros = torch.zeros(found[0].counters, dtype=torch.int32)
    with arena.running(found[0], zeros):
        run([100, 200, 300])
    assert found[0].measured_bytes == found[0].planned_bytes
    with arena.running(found[0], zeros):
        run([100, 200, 999])
    assert found[0].measured_bytes == found[0].planned_bytes + 1024
    with pytest.raises(RuntimeError, match="no pass"):
        arena.allocate((1,), torch.int8)


class Changing(nn.Module):
    """Keeps an intermediate longer from its second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.late = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), False

    def forward(self, x):
        h = self.a(x)
        kept = h if self.late else None
        y = self.b(h)
        del h
        y = self.c(y)
        return y if kept is None else y + kept


def test_a_forward_that_changes_stays_correct():
    x, y = Int8Tensor(ints((8, 64), 3), torch.tensor([-5], dtype=torch.int32)), torch.arange(8)
    found = []
    for warm in (False, True):
        model = overwrite(ezo.convert_(Changing(), precision="int8"))
        opt = ezo.ElasticZOInt8(model, bits=-8, rounding="nearest")
        if warm:
            opt.train_step(x, y)
            opt._step.zero_()
        model.late = True
        opt.train_step(x, y)
        found.append(opt.losses.tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("other", ["same shape", "new shape", "optimizer"])
def test_what_a_hook_keeps_of_a_pass_stays_as_it_was(other):
    """Whatever comes then: the trial of a new shape knows nothing of the pass before, and must not forget who holds what."""
    model, kept = tiny(), []
    opt = ezo.ElasticZOInt8(model)
    hook = model.fc1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    opt.train_step(*tiny_batch(rows=8))
    hook.remove()
    seen = kept[-1].values.tolist()
    then = ezo.ElasticZOInt8(model) if other == "optimizer" else opt
    then.train_step(*tiny_batch(1, 3 if other == "new shape" else 8))
    assert kept[-1].values.tolist() == seen
    with pytest.raises(RuntimeError, match=r"compute with a copy .*values.clone\(\)"):
        torch.relu(kept[-1])


class Offset(nn.Module):
    """Adds a constant, on one side or the other; the size is asked for, so that nothing traces it."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.a, self.b, self.left = nn.Linear(64, 64), nn.Linear(64, 8), left
        self.offset = Int8Tensor(ints((8, 64), 5), torch.tensor([-6], dtype=torch.int32))

    def forward(self, x):
        h = self.a(x)
        assert len(x)
        return self.b(torch.relu(self.offset + h if self.left else h + self.offset))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_sum_with_a_constant_lives_in_the_arena(mode):
    x, y = Int8Tensor(ints((8, 64), 3), torch.tensor([-5], dtype=torch.int32)), torch.arange(8)
    found = []
    for left in (False, True):
        opt = ezo.ElasticZOInt8(overwrite(ezo.convert_(Offset(left), precision="int8")), mode=mode)
        opt.train_step(x, y)
        found.append((opt.losses.tolist(), opt.memory()))
    groups = 2 if mode == "stacked" else 1
    assert found[0] == found[1] and found[0][1]["all_at_once_bytes"] == groups * 8 * (3 * 64 + 8)


def test_an_input_of_another_size_gets_a_plan_of_its_own():
    model, plain = lenet(("fc3",)), lenet(("fc3",))
    opt = ezo.ElasticZOInt8(model)
    for i, rows in enumerate((8, 3, 16, 8)):
        opt.train_step(*lenet_batch(rows, i))
        alone = ezo.ElasticZOInt8(plain)
        alone._step.fill_(i)
        alone.train_step(*lenet_batch(rows, i))
    assert same(state(model), state(plain)) and len(opt._plans) == 3
    assert opt.memory()["planned_bytes"] == opt.memory()["measured_bytes"]

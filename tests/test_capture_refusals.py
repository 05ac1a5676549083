"""What a captured step refuses, what it keeps, and what it leaves to the host."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ezo_kernels as ezo
from ezo_kernels.optim import capture
from ezo_kernels.optim.capture import WARM_UP
from tests.test_capture import HEADS, pair, recording, together  # noqa: F401 - the fixture
from tests.test_step import batch, bits, lenet, same


def test_a_cpu_is_refused(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"capture=True.*'cpu'"):
        ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), capture=True)
    with pytest.raises(ValueError, match=r"capture=True.*'cpu'"):
        ezo.ElasticZOInt8(ezo.convert_(lenet(), head=["fc3"], precision="int8"), capture=True)


def test_every_reason_is_listed():
    model = ezo.convert_(lenet(), head=["fc3"])
    model.fc1.register_forward_hook(lambda *a: None)
    model.fc3.weight.register_hook(lambda g: g)
    with pytest.raises(NotImplementedError) as error:
        ezo.ElasticZO(model, capture=True, head_optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    for text in ("fused=True", "'fc1' has hooks", "'fc3.weight' has gradient hooks"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "bake its learning rate"),
        (lambda p: torch.optim.Adam(p, lr=0.1, capturable=False), "bake its learning rate"),
        (lambda p: torch.optim.RMSprop(p, lr=0.1), "bake its learning rate"),
        (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1), fused=True), "tensor as lr"),
    ],
)
def test_head_optimizers_that_cannot_be_captured(make, match):
    with pytest.raises(NotImplementedError, match=match):
        ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), capture=True, head_optimizer=make)


class Counting:
    calls = 0

    def __call__(self, out, y):
        self.calls += 1
        return F.cross_entropy(out, y)


def test_calls_that_cannot_be_captured():
    ours, _ = pair("sgd")
    x, y = batch(4)
    before, smoothing = bits(ours.model), 0.1
    for call, match in (
        (lambda: ours.step(lambda: F.cross_entropy(ours.model(x), y)), "closure"),
        (lambda: ours.train_step(x, y, update=False), "accumulates"),
        (lambda: ours.train_step(x, y, loss_fn=Counting()), "Counting"),
        (lambda: ours.train_step(x, y, loss_fn=lambda o, t: F.cross_entropy(o, t) * smoothing), "smoothing"),
        (lambda: ours.train_step((x, object()), y), "object"),
        (lambda: ours.train_step(x, y.to("meta")), "on meta"),
    ):
        with pytest.raises(NotImplementedError, match=match):
            call()
    with pytest.raises(NotImplementedError, match="cache_enabled"), torch.autocast("cpu"):
        ours.train_step(x, y)
    assert same(before, bits(ours.model)) and ours.step_count.item() == 0


def waiting(out, y):
    return F.cross_entropy(out, y) + 0.0 * out.max().item()


def test_a_loss_that_waits_fails_at_the_capture_and_changes_nothing():
    ours, theirs = pair("momentum")
    for i in range(4):
        together(ours, theirs, [batch(4, i)], loss_fn=waiting)
    before, g = bits(ours.model), ours.g.clone()
    with pytest.raises(RuntimeError, match=r"could not be captured: .*capture=False"):
        ours.train_step(*batch(4), loss_fn=waiting)
    assert same(before, bits(ours.model)) and torch.equal(ours.g, g) and ours.step_count.item() == 4
    together(ours, theirs, [batch(4, i) for i in range(6)])  # and goes on with a loss that does not
    assert ours.capture_counters["captures"] == 1


def test_a_failed_eager_step_changes_nothing():
    ours, _ = pair("sgd")
    x, y = batch(4)
    before = bits(ours.model)
    with pytest.raises(ValueError, match="784 inputs"):
        ours.train_step(x[:, :, :5], y)
    assert same(before, bits(ours.model)) and ours.capture_counters["eager_steps"] == 0


class Names(TorchDispatchMode):
    """Operators in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", ["none", "sgd", "integer"])
def test_what_the_host_does_around_a_replay(head):
    """A replay of LeNet-5 is a few dozen microseconds, and so must all else be: two copies, one of the results, views of it.

    An integer input has an exponent more, and the results of its step lie together, so that the graph need not collect them.
    """
    if integer := head == "integer":
        opt = ezo.ElasticZOInt8(ezo.convert_(lenet(), head=0, precision="int8"), capture=True)
    else:
        opt = pair(head)[0]
    batches = [(ezo.quantize(x, -5) if integer else x, y) for x, y in (batch(4, i) for i in range(WARM_UP + 3))]
    for x, y in batches[:-1]:
        opt.train_step(x, y)
    graph = opt._captured._graph
    names = [func._schema.name.split("::")[1] for func, *_ in graph.operators]
    assert "cat" not in names if integer else names[-1] == "cat"
    graph.replay = lambda: None
    x, y = batches[-1]
    with Names() as seen:
        opt.train_step(x, y)
    views = {"slice", "view", "detach"} if integer else {"split_with_sizes", "view"}
    assert [name for name in seen.names if name not in views | {"_local_scalar_dense"}] == ["copy_"] * (2 + integer) + [
        "clone"
    ]


@pytest.mark.parametrize("integer", [False, True])
def test_a_graph_keeps_the_table_that_it_reads(integer):
    """Parameters that moved away and back left the step another plan; the graph has the address of the first one."""
    model = ezo.convert_(lenet(), head=0, **({"precision": "int8"} if integer else {}))
    opt = (ezo.ElasticZOInt8 if integer else ezo.ElasticZO)(model, capture=True)
    plan = "_update_plan" if integer else "_plan"
    for i in range(WARM_UP + 2):
        x, y = batch(4, i)
        opt.train_step(ezo.quantize(x, -5) if integer else x, y)
    assert opt.capture_counters["replays"]
    table = weakref.ref(getattr(opt, plan))
    setattr(opt, plan, None)
    gc.collect()
    assert table() is not None
    opt._captured.drop()
    gc.collect()
    assert table() is None


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("head", HEADS)
def test_no_part_of_a_captured_run_asks_the_host_for_a_value(head, mode, monkeypatch):
    """Warm-up, capture and replays on fake tensors, which have no value to give (nor an address)."""
    monkeypatch.setattr(capture.CapturedStep, "_where", lambda self, opt: ())
    with FakeTensorMode():
        opt = pair(head, clip=5.0, queries=2, mode=mode)[0]
        for _ in range(WARM_UP + 3):
            opt.train_step(torch.randn(8, 1, 28, 28), torch.zeros(8, dtype=torch.long))
            opt.param_groups[0]["lr"] *= 0.5
    assert opt.capture_counters == {"captures": 1, "replays": 3, "eager_steps": WARM_UP}

"""Bytes planned on fake tensors against bytes measured in real steps, and the paper's tally."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.cli.experiments.probes import allocated_peak
from ezo_kernels.planning import int8_step_bytes, memory_plan, paper_tally, plan_int8_step
from ezo_kernels.planning.live import LiveBytes
from ezo_kernels.planning.memory import MODES, OPTIMIZERS, backprop_bytes, plan_step, step_bytes
from tests.zoo import Encoder, ViT

CASES = {
    "lenet5": (lambda: ezo.models.LeNet5(), (8, 1, 28, 28), 10, 1),
    "mlp": (lambda: ezo.models.MLP(20, 30, 40, 5), (8, 20), 5, 2),
    "transformer": (lambda: Encoder(), (4, 6, 16), 5, 1),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make, shape, classes, queries = CASES[request.param]
    x, y = torch.randn(shape), torch.arange(shape[0]) % classes
    model = make()
    return types.SimpleNamespace(
        model=model, x=x, y=y, queries=queries, plan=memory_plan(model, (x, y), queries=queries)
    )


def test_planned_is_measured_at_every_cut(case):
    """Every part of every cut, byte for byte, in real steps of the same kind."""
    for cut in case.plan.cuts:
        assert set(cut.bytes) == {(mode, optimizer) for mode in MODES for optimizer in OPTIMIZERS}
        for (mode, optimizer), planned in cut.bytes.items():
            model = ezo.convert_(copy.deepcopy(case.model), head=cut.head)
            measured = step_bytes(
                model, case.x, case.y, F.cross_entropy, mode=mode, optimizer=optimizer, queries=case.queries
            )
            assert planned == measured, (cut.layers, mode, optimizer)
    for optimizer, planned in case.plan.backprop.items():
        assert planned == backprop_bytes(
            copy.deepcopy(case.model), case.x, case.y, F.cross_entropy, optimizer=optimizer
        )


def test_the_cuts_are_those_that_convert_takes(case):
    order = [cut.layers for cut in case.plan.cuts]
    assert order == list(range(len(order))) and case.plan.cuts[0].head == () and case.plan.cuts[-1].head == "all"
    for cut in case.plan.cuts[1:-1]:
        by_name = ezo.convert_(copy.deepcopy(case.model), head=cut.head)
        by_number = ezo.convert_(copy.deepcopy(case.model), head=cut.layers, sample=case.x)
        names = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (by_name, by_number)]
        assert names[0] == names[1] != []


def test_backpropagation_against_the_allocator():
    """What the tracker follows is what the allocator gives: a second way to measure, which shares nothing with the first."""
    model, x, y = ezo.models.MLP(64, 128, 96, 10), torch.randn(64, 64), torch.arange(64) % 10
    planned = memory_plan(model, (x, y)).backprop["sgd"]
    opt = torch.optim.SGD(model.parameters())

    def step():
        F.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()

    step()
    assert allocated_peak(step, torch.device("cpu")) == pytest.approx(planned.total - planned.parameters, rel=0.03)


def test_pure_zeroth_order_against_the_allocator():
    """No gradients and no state but scalars; what the CPU reference forms inside of a layer is on top, and said so."""
    model, x, y = ezo.models.MLP(16, 512, 512, 4), torch.randn(256, 16), torch.arange(256) % 4
    planned = memory_plan(model, (x, y)).cuts[0].bytes["sequential", "sgd"]
    assert planned.gradients == 0 and planned.state < 100
    opt = ezo.ElasticZO(ezo.convert_(model, head=0), mode="sequential")
    opt.train_step(x, y)
    inside = 3 * 4 * max(p.numel() for p in model.parameters())
    found = allocated_peak(lambda: opt.train_step(x, y), torch.device("cpu"))
    expected = planned.activations + planned.workspace
    assert 0.97 * expected <= found <= 1.03 * expected + inside


def test_the_papers_ratios():
    """Golden: the abstract's overheads of LeNet-5, to their printed digits (research: paper.md, section 4)."""
    for batch, one, two in ((32, "0.171", "2.44"), (256, "0.072", "1.20")):
        tally = paper_tally(ezo.models.LeNet5(), torch.zeros(batch, 1, 28, 28))
        assert tally[-1] / tally[0] == 2.0
        assert f"{100 * (tally[1] / tally[0] - 1):.3f}" == one
        assert f"{100 * (tally[2] / tally[0] - 1):.2f}" == two
    assert tally[0] == 18_922_536
    assert paper_tally(ezo.models.LeNet5(), torch.zeros(32, 1, 28, 28))[0] == 2_742_568


def test_the_tally_stands_beside_the_plan(case):
    assert tuple(cut.tally for cut in case.plan.cuts) == paper_tally(case.model, case.x)


def test_what_must_be_so_of_any_plan(case):
    first, last = case.plan.cuts[0], case.plan.cuts[-1]
    for cut in case.plan.cuts:
        assert cut.bytes["sequential", "sgd"].total <= cut.bytes["stacked", "sgd"].total
        assert cut.bytes["stacked", "sgd"].total <= cut.bytes["stacked", "adam"].total
    parameters = sum(4 * p.numel() for p in case.model.parameters())
    assert first.bytes["stacked", "sgd"].parameters == parameters
    assert last.bytes["stacked", "adam"].state >= 2 * parameters  # both moments
    assert first.bytes["stacked", "adam"] == first.bytes["stacked", "sgd"]  # no head: nothing to optimise
    assert last.bytes["stacked", "sgd"].gradients > 0 == first.bytes["stacked", "sgd"].gradients
    assert case.plan.backprop["adam"].state >= 2 * parameters


def test_a_billion_parameters_are_planned_without_their_memory():
    code = """
import re, torch
from ezo_kernels.planning import memory_plan
with torch.device("meta"):
    model = torch.nn.Sequential(*[torch.nn.Linear(16384, 16384, bias=False) for _ in range(4)])
cuts = memory_plan(model, (torch.zeros(2, 16384), torch.zeros(2, dtype=torch.int64))).cuts
print(cuts[0].bytes["stacked", "sgd"].total, cuts[-1].bytes["stacked", "adam"].total)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)  # ru_maxrss is the parent's, too
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    totals, peak = done.stdout.splitlines()
    zo, adam = map(int, totals.split())
    weights = 4 * 4 * 16384**2
    assert weights < zo < 1.01 * weights and adam > 4 * weights
    assert int(peak) < 2048, "MiB of this process"


def test_the_model_is_left_as_it_was():
    model = ezo.models.MLP(6, 5, 4)
    model.fc1.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    types_before = [type(m) for m in model.modules()]
    memory_plan(model, torch.randn(3, 6))
    assert [type(m) for m in model.modules()] == types_before and "_ezo" not in model.__dict__
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.mix(self.embed(ids)).mean(1))


def test_a_cut_through_a_tie_is_left_out_and_named():
    plan = memory_plan(Tied(), (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)))
    assert [cut.layers for cut in plan.cuts] == [0, 3]
    assert [head[0] for head, _ in plan.refused] == ["out", "mix"]
    assert all("same parameter" in why for _, why in plan.refused) and "no cut at out" in str(plan)
    shared = 4 * (11 * 8 + 8 * 8 + 8)
    assert plan.cuts[0].bytes["stacked", "sgd"].parameters == shared


class Unused(nn.Module):
    """With a layer that the forward leaves out: a step refuses it in the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.un = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(2, 2)

    def forward(self, x):
        return self.o(torch.relu(self.a(x)))


@pytest.mark.filterwarnings("ignore:the head's 'un.weight'")
def test_a_cut_with_an_unused_layer_in_the_trunk_is_left_out_and_named():
    sample = (torch.randn(8, 6), torch.arange(8) % 4)
    plan = memory_plan(Unused(), sample)
    assert [cut.layers for cut in plan.cuts] == [2] and [head for head, _ in plan.refused] == [(), ("o",)]
    assert all("not visited by the forward" in why and "'un.bias', 'un.weight'" in why for _, why in plan.refused)
    choice = ezo.choose_cut(Unused(), sample, time_step=lambda step: step() or 0.1)
    assert choice.head == "all" and [row.layers for row in choice.rows] == [2]
    assert "no cut at o: not visited by the forward" in str(choice)
    assert [cut.layers for cut in memory_plan(without_unused(), sample).cuts] == [0, 1, 2]


def without_unused():
    model = Unused()
    model.un.requires_grad_(False)
    return model


def test_a_plan_without_a_cut_says_why():
    with pytest.raises(ValueError, match=r"no cut of this model can be trained: .*batch_size \(8\)"):
        memory_plan(without_unused(), (torch.randn(8, 6), torch.arange(3)))


def test_a_model_that_cannot_be_stacked_has_no_stacked_bytes():
    """torchvision's ViT owns parameters above its blocks: ElasticZO runs its groups one by one."""
    model = ViT()
    twin = ezo.convert_(copy.deepcopy(model), head=["heads"])
    assert ezo.ElasticZO(twin).mode == "sequential"
    plan = memory_plan(nn.Sequential(model, nn.Linear(5, 4)), torch.randn(2, 3, 16, 16))
    assert ("stacked", "sgd") not in plan.cuts[1].bytes and ("sequential", "sgd") in plan.cuts[1].bytes
    assert " - " in str(plan)


def test_table_json_and_plot(tmp_path):
    plan = memory_plan(ezo.models.MLP(6, 5, 4), torch.randn(3, 6))
    text = str(plan)
    for word in ("layers", "fc2", "stacked, sgd", "sequential, adam", "all at once (paper)", "torch alone"):
        assert word in text
    loaded = json.loads(json.dumps(plan.to_dict()))
    assert loaded["cuts"][1]["head"] == ["fc2"] and loaded["cuts"][2]["head"] == "all"
    parts = loaded["cuts"][1]["bytes"]["stacked, adam"]
    assert parts["total"] == sum(v for k, v in parts.items() if k != "total")
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input():
    model, x = ezo.models.MLP(6, 5, 4), torch.randn(3, 6)
    with pytest.raises(TypeError, match="Module"):
        memory_plan("lenet5", x)
    with pytest.raises(NotImplementedError, match=r"ScriptModule \(the model\) is refused"):
        memory_plan(torch.jit.trace(model, x), x)
    with pytest.raises(TypeError, match="pair"):
        memory_plan(model, 3)
    with pytest.raises(ValueError, match="3 items"):
        memory_plan(model, (x, x, x))
    with pytest.raises(ValueError, match="empty"):
        memory_plan(model, torch.randn(0, 6))
    with pytest.raises(ValueError, match="queries"):
        memory_plan(model, x, queries=0)
    with pytest.raises(ValueError, match="converted already"):
        memory_plan(ezo.convert_(copy.deepcopy(model), head=1), x)
    with pytest.raises(ValueError, match="frozen"):
        memory_plan(copy.deepcopy(model).requires_grad_(False), x)
    with pytest.raises(ValueError, match="no weight layer"):
        memory_plan(nn.BatchNorm1d(6), x)
    with pytest.raises(ValueError, match=r"\(x, y\)"):
        memory_plan(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), x)


class Deciding(nn.Module):
    """A forward that looks at values, or calls what torch cannot fake: ``how(layers, x)``."""

    def __init__(self, how) -> None:
        super().__init__()
        self.a, self.b, self.o, self.how = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4), how

    def forward(self, x):
        return self.o(self.how(self, x))


OPERATORS = torch.library.Library("ezo_tests", "FRAGMENT")
OPERATORS.define("without_fake(Tensor x) -> Tensor")
OPERATORS.impl("without_fake", torch.clone, "CPU")


@pytest.mark.parametrize(
    ("how", "error", "said", "cause"),
    [
        (lambda m, x: m.a(x) if x.sum() > 0 else m.b(x), ValueError, "for values: aten._local_scalar_dense", "DataDep"),
        (lambda m, x: m.a(x) * x.sum().item(), ValueError, "for values: aten._local_scalar_dense", "DataDependent"),
        (lambda m, x: m.a(x[x[:, 0] > 0]), ValueError, "for values: aten.nonzero", "DynamicOutputShape"),
        (
            lambda m, x: m.a(torch.ops.ezo_tests.without_fake(x)),
            NotImplementedError,
            "without_fake.*register_fake",
            "Unsupported",
        ),
    ],
    ids=["if", "item", "mask", "no fake"],
)
def test_a_forward_that_cannot_be_planned_is_refused(how, error, said, cause):
    model, sample = Deciding(how), (torch.randn(8, 6), torch.arange(8) % 4)
    for call in (memory_plan, ezo.choose_cut, lambda model, sample: paper_tally(model, sample[0])):
        with pytest.raises(error, match=said) as caught:
            call(model, sample)
        assert type(caught.value.__cause__).__name__.startswith(cause)


@pytest.mark.parametrize(
    ("y", "error", "said"),
    [
        (torch.zeros(3), TypeError, r"int64 class ids.*got torch.float32 of \(3,\) for an output of \(3, 4\)"),
        (torch.zeros(3, dtype=torch.int32), TypeError, r"int64 class ids.*got torch.int32 of \(3,\)"),
        (torch.zeros(3, 1), ValueError, r"got torch.float32 of \(3, 1\) for an output of \(3, 4\)"),
    ],
)
def test_targets_that_a_cross_entropy_cannot_take_are_refused(y, error, said):
    model, x = ezo.models.MLP(6, 5, 4), torch.randn(3, 6)
    for call in (memory_plan, ezo.choose_cut):
        with pytest.raises(error, match=said):
            call(model, (x, y))


def test_probabilities_and_other_losses_take_floats():
    model, x = ezo.models.MLP(6, 5, 4), torch.randn(3, 6)
    assert memory_plan(model, (x, torch.full((3, 4), 0.25))).refused == ()
    assert memory_plan(model, (x, torch.zeros(3)), loss_fn=lambda out, y: F.mse_loss(out.sum(1), y)).refused == ()


def test_live_bytes_follow_views_and_frees():
    with LiveBytes() as live:
        a = torch.zeros(100)
        b = a.view(10, 10)[1:]
        assert live.now == 400
        del a
        assert live.now == 400  # the view keeps the storage
        with live.role("workspace"):
            c = torch.ones(5)
        del b
    assert live.now == 20 and live.peak == 420 and c.numel() == 5
    assert live.at_peak("activations") == {"activations": 400, "workspace": 20}


# ---- in integers

INTEGERS = {
    "lenet5": (lambda: ezo.models.LeNet5(), (8, 1, 28, 28), 10, (0, ["fc3"], ["fc2", "fc3"], 3)),
    "pointnet": (lambda: ezo.models.PointNet(10, norm=False), (4, 3, 32), 10, (0, 2)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", INTEGERS)
def test_a_step_in_integers_takes_what_was_planned(name, mode):
    make, shape, classes, heads = INTEGERS[name]
    x, y = ezo.quantize(torch.rand(shape)), torch.arange(shape[0]) % classes
    for head, queries in zip(heads, (2, 1, 2, 1), strict=False):
        model = make()
        before = copy.deepcopy(model.state_dict())
        planned = plan_int8_step(model, x, y, head=head, mode=mode, queries=queries)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and "_ezo" not in model.__dict__
        opt = ezo.ElasticZOInt8(ezo.convert_(model, head=head, precision="int8"), mode=mode, queries=queries)
        assert planned == int8_step_bytes(opt, x, y), (head, queries)
        arena = opt.memory()
        assert planned.total >= arena["planned_bytes"] + arena["parameter_bytes"]


def test_an_integer_head_takes_more_than_the_arena():
    """Its gradients, int32 and of each group: a third of a stacked step of LeNet-5 with fc2 and fc3 by BP."""
    model, x, y = ezo.models.LeNet5(), ezo.quantize(torch.rand(32, 1, 28, 28)), torch.arange(32) % 10
    none, two = (plan_int8_step(model, x, y, head=head) for head in (0, ["fc2", "fc3"]))
    assert two.state <= 16  # losses and g of the step before are gone at the peak; those of a first one would be state
    gradients = 4 * (84 * 121 + 10 * 85)
    assert two.total - none.total >= 2 * gradients
    kept = plan_int8_step(model, x, y, head=["fc2", "fc3"], head_remainder=True)
    assert kept.total - two.total == kept.state - two.state == gradients // 4


def test_a_regression_in_integers_is_planned():
    model, x = ezo.models.MLP(6, 8, 1), ezo.quantize(torch.rand(5, 6))
    y = ezo.quantize(torch.rand(5, 1))
    planned = plan_int8_step(model, x, y, head=1, loss="squared_error")
    opt = ezo.ElasticZOInt8(ezo.convert_(model, head=1, precision="int8"), loss="squared_error")
    assert planned == int8_step_bytes(opt, x, y)


def test_what_integers_are_refused():
    model, x, y = ezo.models.MLP(6, 8, 4), torch.rand(5, 6), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(TypeError, match="must be an Int8Tensor, got Tensor"):
        plan_int8_step(model, x, y, head=0)
    with pytest.raises(NotImplementedError, match="BatchNorm1d"):
        plan_int8_step(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), ezo.quantize(x), y, head=0)
    for sample in (ezo.quantize(x), (ezo.quantize(x), y)):
        with pytest.raises(TypeError, match="plan_int8_step"):
            memory_plan(model, sample)
    with pytest.raises(TypeError, match="plan_int8_step"):
        ezo.choose_cut(model, (ezo.quantize(x), y))


def test_a_frozen_trunk_is_planned_as_it_is_measured():
    from ezo_kernels.optim.baselines import FrozenTrunk

    model, x, y = ezo.models.LeNet5(), torch.randn(8, 1, 28, 28), torch.arange(8) % 10
    planned = plan_step(model, x, y, F.cross_entropy, head=["fc2", "fc3"], frozen=True)
    assert all(p.requires_grad for p in model.parameters())
    twin = copy.deepcopy(model)
    FrozenTrunk(twin, ["fc2", "fc3"])
    assert planned == backprop_bytes(twin, x, y, F.cross_entropy, optimizer="sgd")
    everything = plan_step(model, x, y, F.cross_entropy, head=None)
    assert planned.total < 0.8 * everything.total and planned.parameters == everything.parameters

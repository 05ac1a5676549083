"""Node perturbation: skipped steps, schedules, states, copies, autocast, compiled and checkpointed models."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.utils.checkpoint
from materialised import randn
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import materialize
from tests.test_nodes import optimizer
from tests.test_step import batch, bits, lenet, same


def test_a_step_that_is_skipped_changes_nothing():
    opt = optimizer(queries=2)
    held = bits(opt.model)
    x, y = batch(8)
    x[3] = float("inf")
    opt.train_step(x, y)
    assert opt.skipped == 1 and opt.step_count == 0 and same(held, bits(opt.model))
    opt.train_step(*batch(8))
    assert opt.step_count == 1 and not same(held, bits(opt.model))


def test_a_system_that_cannot_be_solved_skips_the_whole_step(monkeypatch):
    opt = optimizer(queries=2)
    held = bits(opt.model)
    factor = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: factor(m * float("nan")))
    opt.train_step(*batch(8))
    assert opt.skipped == 1 and same(held, bits(opt.model))


def test_another_loss_than_the_first_steps_is_skipped():
    opt = optimizer(queries=2)
    opt.train_step(*batch(8))
    held = bits(opt.model)
    opt.train_step(*batch(8, 2), nn.CrossEntropyLoss(weight=torch.arange(1.0, 11.0)))
    assert opt.skipped == 1 and same(held, bits(opt.model))


def test_schedules_go_on_from_a_state():
    opt = optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    opt.train_step(*batch(6))
    schedule.step()
    again = optimizer()
    again.load_state_dict(opt.state_dict())
    torch.optim.lr_scheduler.LambdaLR(again, lambda step: 0.5**step, last_epoch=1)
    assert again.param_groups[-1]["lr"] == pytest.approx(0.05)


def test_schedules_move_its_rate():
    opt = optimizer(nodes={"lr": 0.4})
    assert [group.get("name", "head") for group in opt.param_groups] == ["trunk", "head", "nodes"]
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    opt.train_step(*batch(6))
    schedule.step()
    held = bits(opt.model)
    opt.train_step(*batch(6))
    assert opt.param_groups[-1]["lr"] == 0.2 and opt.nodes._lr.item() == pytest.approx(0.2)
    opt.param_groups[-1]["lr"] = 0.0
    held = bits(opt.model)
    opt.train_step(*batch(6))
    assert torch.equal(held["fc1.weight"], opt.model.fc1.weight)
    assert not torch.equal(held["conv1.weight"], opt.model.conv1.weight)


def test_a_rate_that_cannot_be_is_named_as_its_own():
    opt = optimizer()
    for name, value in (("lr", -1.0), ("eps", 0.0), ("clip", 0.0)):
        held, opt.param_groups[-1][name] = opt.param_groups[-1][name], value
        with pytest.raises(ValueError, match=f"{name} of node_perturbation must be finite"):
            opt.train_step(*batch(6))
        opt.param_groups[-1][name] = held
    opt.train_step(*batch(6))


def test_a_run_goes_on_from_its_state():
    whole, part = (optimizer(queries=2, nodes={"clip": 0.3}) for _ in range(2))
    for i in range(4):
        whole.train_step(*batch(6, i))
    for i in range(2):
        part.train_step(*batch(6, i))
    stream = io.BytesIO()
    torch.save((part.model.state_dict(), part.state_dict()), stream)
    stream.seek(0)
    weights, state = torch.load(stream, weights_only=True)
    again = optimizer(queries=2, nodes={"lr": 0.9, "eps": 0.9, "clip": None})
    again.model.load_state_dict(weights)
    again.load_state_dict(state)
    for i in range(2, 4):
        again.train_step(*batch(6, i))
    assert same(bits(whole.model), bits(again.model)) and again.param_groups[-1] is again.nodes.group
    for other in (optimizer(queries=2, nodes={"layers": ["fc1"]}), optimizer(queries=2, nodes={"damping": 0.5})):
        with pytest.raises(ValueError, match="the state is of node_perturbation"):
            other.load_state_dict(state)
    plain = ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), queries=2)
    with pytest.raises(ValueError, match="the state is of node_perturbation"):
        plain.load_state_dict(state)
    for name in ("eps", "clip"):
        broken = {**state, "node_perturbation": {**state["node_perturbation"], name: -1}}
        with pytest.raises(ValueError, match=f"{name} of node_perturbation"):
            again.load_state_dict(broken)


def test_a_copy_of_the_optimizer_trains_its_own_model():
    opt = optimizer(queries=2)
    opt.train_step(*batch(6))
    twin, again = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    for own in (opt, twin, again):
        own.train_step(*batch(6, 1))
    assert same(bits(opt.model), bits(twin.model)) and same(bits(opt.model), bits(again.model))
    assert opt.model.fc1.weight is not twin.model.fc1.weight


def test_another_optimizer_of_the_model_perturbs_weights_again():
    opt = optimizer(queries=2)
    opt.train_step(*batch(6))
    other = ezo.ElasticZO(opt.model, queries=2)
    held = opt.model.fc1.weight.clone()
    other.train_step(*batch(6))
    z = [materialize(held.shape, seed=0, step=0, site=opt.model.fc1.site, query=q) for q in range(2)]
    want = held - 1e-4 * sum(g * v for g, v in zip(other.g, z, strict=True)) / 2
    torch.testing.assert_close(opt.model.fc1.weight.detach(), want, rtol=1e-5, atol=1e-7)


def test_under_autocast_and_compiled():
    opt, kinds = optimizer(queries=2, mode="stacked"), []
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        factor = torch.linalg.cholesky_ex
        patch.setattr(torch.linalg, "cholesky_ex", lambda m: kinds.append(m.dtype) or factor(m))
        opt.train_step(*batch(6))
    assert opt.skipped == 0 and kinds == [torch.float32] * 2  # the moments are no product of 16 bits
    plain, compiled = optimizer(queries=2), optimizer(queries=2)
    compiled.model.compile(backend="eager")
    for i in range(2):
        for own in (plain, compiled):
            own.train_step(*batch(6, i))
    for a, b in zip(bits(plain.model).values(), bits(compiled.model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Remembered(nn.Module):
    """A trunk and a head whose activations a checkpoint makes again."""

    def __init__(self, again: bool):
        super().__init__()
        self.inner, self.out, self.again = nn.Linear(4, 6), nn.Linear(6, 3), again

    def forward(self, x):
        def run(x):
            return self.out(torch.tanh(self.inner(x)))

        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if self.again else run(x)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_checkpoint_that_runs_the_layer_again(mode):
    runs = []
    for again in (True, False):
        torch.manual_seed(0)
        model = ezo.convert_(Remembered(again), head=["out"])
        opt = ezo.ElasticZO(model, queries=2, node_perturbation=ezo.NodePerturbation(["inner"]), mode=mode)
        for _ in range(2):
            opt.train_step(randn(6, 4), torch.arange(6) % 3)
        runs.append(bits(model))
    assert same(*runs)

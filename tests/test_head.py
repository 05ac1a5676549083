"""The head: closures that keep off its gradients, optimizers that can be guarded, and a first step that is skipped."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.optim.head import GuardedOptimizer


def start(**options):
    torch.manual_seed(0)
    model = ezo.convert_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), head="2")
    return model, ezo.ElasticZO(model, seed=1, **options)


def batch():
    g = torch.Generator().manual_seed(2)
    return torch.randn(5, 4, generator=g), torch.randint(0, 3, (5,), generator=g)


def bits(model):
    return torch.cat([p.detach().clone().flatten() for p in model.parameters()])


@pytest.mark.parametrize("disturb", ["zero_grad", "backward", "linear loss backward"])
@pytest.mark.parametrize("head", ["2", "all"])
def test_a_closure_that_touches_gradients_is_refused(disturb, head):
    torch.manual_seed(0)
    model = ezo.convert_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), head=head)
    opt = ezo.ElasticZO(model)
    before, (x, y) = bits(model), batch()

    def closure():
        if disturb == "zero_grad":
            opt.zero_grad()
            return F.cross_entropy(model(x), y)
        loss = model(x).sum() if disturb == "linear loss backward" else F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        return loss

    if (disturb, head) == ("zero_grad", "all"):  # one group: there is nothing yet to lose
        opt.step(closure)
        return
    with pytest.raises(ValueError, match="must not call backward or zero_grad"):
        opt.step(closure)
    assert torch.equal(bits(model), before) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "name", ["NAdam", "ASGD", "Rprop", "Adam", "Adagrad", "RMSprop", "RAdam", "Adadelta", "Adamax"]
)
def test_a_skipped_first_step_leaves_no_trace_in_the_head(name):
    runs = []
    for skipped in (0, 2):
        model, opt = start(head_optimizer=lambda p: getattr(torch.optim, name)(p, lr=0.01))
        x, y = batch()
        for _ in range(skipped):
            opt.train_step(x * math.nan, y)
        for _ in range(3):
            opt.train_step(x, y)
        opt.train_step(x * math.inf, y)
        opt.train_step(x, y)
        runs.append(bits(model))
    assert torch.equal(*runs)


@pytest.mark.parametrize("name", ["ASGD", "Rprop", "Adam", "Adagrad", "RMSprop", "Adadelta", "Adafactor"])
def test_optimizers_whose_counts_are_the_hosts_are_refused_on_a_gpu(name, monkeypatch):
    """To put such a count back a step would wait for the device."""
    parameters = [nn.Parameter(torch.zeros(3))]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.01)
    assert GuardedOptimizer(optimizer).optimizer is optimizer
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    with pytest.raises(NotImplementedError, match=f"{name} keeps its step count on the host"):
        GuardedOptimizer(optimizer)
    assert GuardedOptimizer(torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
    if "capturable" in optimizer.defaults:
        assert GuardedOptimizer(getattr(torch.optim, name)(parameters, lr=0.01, capturable=True))


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_optimizers_that_cannot_take_a_step_are_refused_at_once(name):
    with pytest.raises(NotImplementedError, match=name):
        start(head_optimizer=getattr(torch.optim, name))


def test_a_loss_may_be_a_number_where_nothing_is_differentiated():
    model = ezo.convert_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    x, y = batch()
    opt = ezo.ElasticZO(model, eps=0.3)
    loss = opt.step(lambda: float(F.cross_entropy(model(x), y)))
    assert loss.item() == pytest.approx(opt.losses.mean().item()) and opt.g.item() != 0
    assert opt.train_step(x, y, loss_fn=lambda out, t: np.float32(2.0)).item() == 2.0
    with pytest.raises(TypeError, match="complex64"):
        opt.step(lambda: model(x).sum() * 1j)
    model, opt = start()
    with pytest.raises(ValueError, match="head's parameters"):
        opt.step(lambda: float(F.cross_entropy(model(x), y)))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("head_grad", ["mean", "plus"])
def test_a_step_brings_its_own_autograd(mode, head_grad):
    """Torch's optimizers step under no_grad, too, and some loops wrap all of it."""
    x, y = batch()
    model, opt = start(mode=mode, head_grad=head_grad)
    twin, other = start(mode=mode, head_grad=head_grad)
    opt.train_step(x, y)
    with torch.no_grad():
        other.train_step(x, y)
    assert torch.equal(bits(model), bits(twin))
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        other.train_step(x, y)
    assert torch.equal(bits(model), bits(twin))
    with torch.inference_mode():
        loss = ezo.ElasticZO(ezo.convert_(nn.Linear(4, 3)), mode=mode).train_step(x, y)
    assert torch.isfinite(loss)


def test_numbers_of_numpy_are_numbers_and_a_bad_clip_is_refused_later_too():
    model, opt = start(lr=np.float32(1e-3), eps=np.float64(1e-3), head_lr=np.int64(1), clip=np.float32(2.0))
    assert type(opt.param_groups[0]["lr"]) is float
    x, y = batch()
    torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: np.float32(0.5))
    opt.train_step(x, y)
    before = bits(model)
    for clip in (-1.0, 0.0, math.nan):
        opt.param_groups[0]["clip"] = clip
        with pytest.raises(ValueError, match="clip"):
            opt.train_step(x, y)
    assert torch.equal(before, bits(model))
    with pytest.raises(TypeError, match="rounds"):
        start(rounds=7.0)


def test_only_the_head_is_the_heads_though_the_user_unfreezes_everything():
    model, _ = start()
    model.requires_grad_(True)
    assert [id(p) for p in ezo.head_parameters(model)] == [id(p) for p in model[2].parameters()]
    model[2].bias.requires_grad_(False)
    assert [id(p) for p in ezo.head_parameters(model)] == [id(model[2].weight)]


class Checkpointed(nn.Module):
    """A head whose layers run again in the backward."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.again = again

    def forward(self, x):
        x = torch.relu(self.trunk(x))
        return torch.utils.checkpoint.checkpoint(self.head, x, use_reentrant=False) if self.again else self.head(x)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_head_under_checkpoint_is_the_same_bit_for_bit(mode):
    found = []
    for again in (True, False):
        torch.manual_seed(0)
        model = ezo.convert_(Checkpointed(again), head=["head"])
        opt = ezo.ElasticZO(model, queries=2, mode=mode, head_lr=0.1, lr=1e-3)
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(12, 6, generator=g), torch.randint(0, 3, (12,), generator=g)
        for _ in range(3):
            opt.train_step(x, y)
        found.append({k: v.clone() for k, v in model.state_dict().items()})
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_dropout_inside_a_named_head_has_one_mask_for_both_signs(mode):
    losses = []
    for nested in (True, False):
        torch.manual_seed(0)
        layers = [nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)]
        model = (
            nn.Sequential(nn.Linear(6, 8), nn.Sequential(*layers))
            if nested
            else nn.Sequential(nn.Linear(6, 8), *layers)
        )
        opt = ezo.ElasticZO(ezo.convert_(model, head=["1"] if nested else ["1", "2", "3"]), queries=2, mode=mode)
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(12, 6, generator=g), torch.randint(0, 3, (12,), generator=g)
        losses.append([opt.train_step(x, y).item() for _ in range(2)])
    assert losses[0] == losses[1]

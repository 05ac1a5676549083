"""What a user may do to a model once it is converted, and what is refused then."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import ezo_kernels as ezo

X, Y = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


def net(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), *between, nn.Linear(6, 5))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.o = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.o.weight = self.e.weight

    def forward(self, ids):
        return self.o(torch.tanh(self.e(ids)))


def test_a_tie_that_was_lost_is_refused():
    model = ezo.convert_(Tied(), head=0)
    opt = ezo.ElasticZO(model)
    opt.train_step(Y, Y)
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match=r"'e\.weight' and 'o\.weight' were one parameter"):
        ezo.ElasticZO(model)
    model.e.weight = opt.trunk[0]
    with pytest.raises(ValueError, match=r"'o\.weight' was replaced"):
        opt.train_step(Y, Y)
    model.o.weight = model.e.weight
    opt.train_step(Y, Y)
    own = ezo.convert_(Tied(), head=0)
    own.load_state_dict(model.state_dict(), assign=True)  # two Parameters over one memory: both learn
    before = own.o.weight.clone()
    ezo.ElasticZO(own).train_step(Y, Y)
    assert torch.equal(own.e.weight, own.o.weight) and not torch.equal(own.o.weight, before)


def test_a_tie_that_was_made_is_refused():
    model = ezo.convert_(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' were tied since convert_"):
        ezo.ElasticZO(model)


class Negative(nn.Module):
    def forward(self, w):
        return -w if w.is_floating_point() else w.clone()


@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize("how", ["prune", "parametrize"])
def test_a_trunk_whose_weight_is_computed_since_is_refused(precision, how):
    model = ezo.convert_(net(nn.ReLU()), head=["2"], precision=precision)
    x = X if precision == "float" else ezo.quantize(X)
    opt = (ezo.ElasticZO if precision == "float" else ezo.ElasticZOInt8)(model)
    opt.train_step(x, Y)
    if how == "prune":
        prune.l1_unstructured(model[0], "weight", 0.5)
    else:
        parametrize.register_parametrization(model[0], "weight", Negative(), unsafe=True)
    with pytest.raises(ValueError, match=r"a layer of '0\.weight' was pruned, parametrized"):
        opt.train_step(x, Y)
    assert opt.step_count.item() == 1


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda m: torch.compile(m, backend="eager")])
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_a_wrapped_trunk_goes_on_and_comes_back(precision, wrap):
    model = net(nn.ReLU())
    model.append(nn.Linear(5, 5).requires_grad_(False))
    ezo.convert_(model, head=["2"], precision=precision)
    x = X if precision == "float" else ezo.quantize(X)
    opt = (ezo.ElasticZO if precision == "float" else ezo.ElasticZOInt8)(model)
    opt.train_step(x, Y)
    model[0], model[3] = wrap(model[0]), wrap(model[3])
    opt.train_step(x, Y)
    ezo.unconvert_(model)
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False] * 2
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model[0](X)
    ezo.convert_(model, head=["2"], precision="float")


class Guarded(nn.Module):
    """Has bare parameters, and subclasses that must say a key."""

    def __init_subclass__(cls, *, key, **kwargs):
        super().__init_subclass__(**kwargs)


class Scale(Guarded, key="scale"):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.w


def test_a_conversion_that_fails_on_a_class_changes_nothing():
    model = net(Scale())
    types = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="key"):
        ezo.convert_(model, head=["2"])
    assert [type(m) for m in model.modules()] == types and all(p.requires_grad for p in model.parameters())
    assert not any("zo" in m.__dict__ for m in model.modules())


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.owned, self.lock = nn.Parameter(torch.ones(6)), 2.0, threading.Lock()

    def forward(self, x):
        return x * self.w * self.owned

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_attributes_and_states_of_a_users_class_are_its_own():
    model = net(Owner())
    plain = model(X)
    ezo.convert_(model, head=["2"])
    assert torch.equal(model(X), plain)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), plain) and other[1].lock is not model[1].lock
        ezo.ElasticZO(other).train_step(X, Y)
    ezo.unconvert_(model)
    assert model[1].owned == 2.0
    model[1].zo = 1
    with pytest.raises(NotImplementedError, match="has a 'zo' of its own"):
        ezo.convert_(model)


class Dropped(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.a, self.d, self.o = nn.Linear(6, 64), dropout, nn.Linear(64, 5)
        self.zeros = None

    def forward(self, x):
        h = self.a(x)
        d = self.d(h)
        self.zeros = ((h if self.d.inplace else d) == 0).float().detach()
        return self.o(h if self.d.inplace else d)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_dropout_in_place_is_in_place(mode):
    losses = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = ezo.convert_(Dropped(nn.Dropout(0.5, inplace=inplace)), head=["o"])
        opt = ezo.ElasticZO(model, queries=2, mode=mode)
        opt.train_step(X, Y)
        assert 0.4 < model.zeros.mean() < 0.6
        losses.append(opt.losses)
    assert torch.equal(*losses)


def test_a_first_dropout_in_place_leaves_the_batch():
    x = X.clone()
    model = ezo.convert_(nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(6, 5)))
    with pytest.raises(ValueError, match="writes into its batch"):
        ezo.ElasticZO(model, mode="sequential").train_step(x, Y)


def test_channels_of_a_dropout_without_a_batch():
    model = ezo.convert_(Dropped(nn.Dropout1d(0.5)), head=["o"])
    opt = ezo.ElasticZO(model)
    for _ in range(4):
        opt.train_step(X, Y)
        assert bool(((model.zeros.mean(1) == 0) | (model.zeros.mean(1) == 1)).all())


def test_a_summary_of_what_came_later():
    model = ezo.convert_(net(), head=["1"])
    model[0] = nn.Sequential(model[0])
    model.append(nn.Linear(5, 5))
    rows = {row.name: row for row in ezo.summary(model).rows}
    assert [rows[n].trained for n in ("0.0", "1", "2")] == ["ZO", "BP", "frozen"]
    assert rows["0.0"].reason == "a fused layer exists" and "nothing trains it" in rows["2"].reason


@torch.no_grad()
def test_no_window_of_two_by_two_is_torchs_error():
    conv, x = nn.Conv2d(1, 2, 3), torch.randn(2, 1, 3, 8)
    with pytest.raises(RuntimeError, match="too small"):
        F.max_pool2d(conv(x), 2)
    with pytest.raises(RuntimeError, match="too small"):
        ezo.nn.conv_pool_relu(conv, x)


def test_a_compiled_integer_model_is_quiet(monkeypatch):
    import sys

    raised = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    model = ezo.convert_(net(nn.ReLU()), head=["2"], precision="int8")
    model.compile(backend="eager")
    opt = ezo.ElasticZOInt8(model)
    for _ in range(2):
        opt.train_step(ezo.quantize(X), Y)
    assert not raised

"""What the integer head can be: frozen layers in it, branches beside the trunk, layers called twice, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import Int8Tensor, int8_relu
from tests.int8_models import exponents, overwrite, randint, same, state


def batch(rows: int = 6, width: int = 6, classes: int = 3):
    return Int8Tensor(randint(rows, width, seed=rows, low=-128), exponents(-7)), torch.arange(rows) % classes


def deep() -> nn.Sequential:
    sizes = [(6, 5), (5, 5), (5, 5), (5, 3)]
    return nn.Sequential(*[m for a, b in sizes for m in (nn.Linear(a, b), nn.ReLU())][:-1])


def stepped(model: nn.Module, n: int = 1, **how) -> dict:
    opt = ezo.ElasticZOInt8(model, **{"bits": 3, "head_bits": 4, "r_max": 15, **how})
    for i in range(n):
        opt.train_step(*batch(6 + i))
    return state(model)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_frozen_layer_of_the_head_passes_its_error_on(mode):
    """The layer before it learns what it learns beside a trained one, whose weights the step's error has seen, too."""
    found = []
    for frozen in (False, True):
        plain = deep()
        plain[4].requires_grad_(not frozen)
        model = overwrite(ezo.convert_(plain, head=["2", "4", "6"], precision="int8"))
        before = state(model)
        found.append((stepped(model, mode=mode), before))
    (free, before), (held, _) = found
    assert torch.equal(free["2.weight"], held["2.weight"]) and torch.equal(free["2.bias"], held["2.bias"])
    assert not torch.equal(held["2.weight"], before["2.weight"])
    assert torch.equal(held["4.weight"], before["4.weight"]) and not torch.equal(free["4.weight"], before["4.weight"])


class Branch(nn.Module):
    """The head sees the input itself, which all groups share, beside what the trunk makes of it."""

    def __init__(self, act: bool) -> None:
        super().__init__()
        self.trunk, self.h1, self.h2, self.h3 = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.act = act

    def forward(self, x):
        h = self.h1(x)
        return self.h3(self.h2(F.relu(h) if self.act else h) + self.trunk(x))


@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("head_grad", ["mean", "plus", "minus"])
def test_a_branch_beside_the_trunk_learns_alike_stacked_and_one_by_one(act, head_grad):
    """One by one there is a single group everywhere."""
    found = []
    for mode in ("stacked", "sequential"):
        model = overwrite(ezo.convert_(Branch(act), head=["h1", "h2", "h3"], precision="int8"))
        before = state(model)
        found.append(stepped(model, 2, mode=mode, queries=2, head_grad=head_grad))
    assert same(*found) and not torch.equal(found[0]["h1.weight"], before["h1.weight"])


def test_a_trunk_behind_the_head_is_refused_by_name():
    model = overwrite(ezo.convert_(deep(), head=["2"], precision="int8"))
    before = state(model)
    with pytest.raises(ValueError, match="^4: a layer of the head runs before this one of the trunk.*freeze"):
        stepped(model)
    assert same(before, state(model))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x):
        return self.c(self.b(self.b(self.a(x))))


def test_the_terms_of_a_layer_that_is_called_twice_count_twice():
    x, y = torch.zeros(24_835, 1, dtype=torch.int8), torch.zeros(24_835, dtype=torch.int64)
    model = overwrite(ezo.convert_(Twice(), head=["b", "c"], precision="int8"))
    opt, before = ezo.ElasticZOInt8(model), state(model)
    with pytest.raises(ValueError, match="b.weight: its gradient sums 99340 products over 2 groups.*99336"):
        opt.train_step(x, y)
    assert same(before, state(model))
    opt.train_step(x[:24_834], y[:24_834])


class Around(nn.Module):
    """A layer of the head whose output goes two ways, one of them through ``call``."""

    def __init__(self, call) -> None:
        super().__init__()
        self.a, self.b, self.c, self.call = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3), call

    def forward(self, x):
        h = self.b(self.a(x))
        return self.c(h + self.call(h))


@pytest.mark.parametrize("way", ["operator", "hook"])
def test_a_path_that_leaves_no_note_is_refused_instead_of_left_out(way):
    """What comes by the other path alone would be a gradient, too."""
    model = overwrite(
        ezo.convert_(Around(int8_relu if way == "operator" else nn.ReLU()), head=["b", "c"], precision="int8")
    )
    if way == "hook":
        model.call.register_forward_hook(lambda module, inputs, y: dataclasses.replace(y, values=y.values.clone()))
    before = state(model)
    with pytest.raises(NotImplementedError, match=r"Int8Tensor \[rows, 5\] that no layer or function made.*hook"):
        stepped(model)
    assert same(before, state(model))


class Points(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(12, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).flatten(1))


def test_a_head_learns_from_an_input_of_any_strides():
    values, found = randint(4, 6, 3, seed=1).transpose(1, 2), []
    for x in (values, values.contiguous()):
        model = overwrite(ezo.convert_(Points(), head=["a", "b"], precision="int8"))
        ezo.ElasticZOInt8(model, head_bits=4).train_step(x, torch.arange(4) % 3)
        found.append(state(model))
    assert same(*found)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(2, 3)

    def forward(self, x):
        return self.c(F.avg_pool2d(F.relu(self.b(self.a(x))).view(-1, 1, 2, 2), (2, 1)).flatten(1))


def test_a_pool_in_the_head_is_refused_behind_the_layer_it_follows():
    model = ezo.convert_(Pooling(), head=["b", "c"], precision="int8")
    with pytest.raises(NotImplementedError, match="avg_pool2d.*behind 'b': move the cut"):
        stepped(model)


def test_a_pool_before_the_first_layer_of_the_head_is_none_of_its():
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = overwrite(ezo.convert_(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), tail), head=["2"], precision="int8"))
    before = state(model)
    x = Int8Tensor(randint(4, 1, 6, 6), exponents(-7))
    ezo.ElasticZOInt8(model, head_bits=4).train_step(x, torch.arange(4) % 3)
    assert not torch.equal(before["2.2.weight"], model[2][2].weight)


class Deaf(nn.Module):
    """Calls its trunk and leaves what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 5), nn.Linear(6, 3)

    def forward(self, x):
        self.trunk(x)
        return self.head(x)


def test_an_output_that_does_not_depend_on_the_trunk_is_refused():
    model = ezo.convert_(Deaf(), head=["head"], precision="int8")
    before = state(model)
    with pytest.raises(ValueError, match="1 groups and the pass 2: it does not depend on the trunk"):
        stepped(model)
    assert same(before, state(model))

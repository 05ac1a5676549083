"""The head's linear layer for all groups at once, on the CPU reference: the bits of a call a group, and when it is taken."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.nn import linear_relu
from ezo_kernels.ops import _library, grouped_linear
from ezo_kernels.ops._perturbation import aligned
from tests.test_step import batch, bits, lenet
from tests.tolerance import assert_bitwise_equal


def gradients(y, tensors):
    return torch.autograd.grad(y, tensors, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("groups", "shape"), [(1, (33, 84)), (4, (4 * 33, 84)), (3, (6, 5, 84))])
def test_has_the_bits_of_a_call_a_group(groups, shape, bias, relu):
    torch.manual_seed(0)
    layer, x = nn.Linear(84, 10, bias=bias), torch.randn(shape, requires_grad=True)
    tensors = (x, *layer.parameters())
    ours = grouped_linear.grouped_linear(x, layer.weight, layer.bias, groups, relu)
    theirs = torch.cat([F.relu(layer(aligned(part))) if relu else layer(aligned(part)) for part in x.chunk(groups)])
    assert_bitwise_equal(ours.detach(), theirs.detach())
    for a, b in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        assert_bitwise_equal(a, b)


@pytest.fixture
def at_once(monkeypatch):
    """A CPU that takes what a GPU takes; the shapes of the layers that were taken."""
    seen, inner = [], grouped_linear._forward
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    monkeypatch.setattr(
        grouped_linear, "_forward", lambda x, w, *rest: (seen.append(tuple(w.shape)), inner(x, w, *rest))
    )
    return seen


def run(model, head, steps=3, **options):
    # not the library's own SGD, which is rounded in another way where a step takes it with its coefficients
    sgd = functools.partial(torch.optim.SGD, lr=0.05)
    opt = ezo.ElasticZO(ezo.convert_(model, head=head), lr=1e-3, seed=1, head_optimizer=sgd, **options)
    for i in range(steps):
        opt.train_step(*batch(9, i))
    return bits(model)


@pytest.mark.parametrize(
    "options",
    [{}, {"queries": 3, "antithetic": False}, {"head_grad": "plus"}, {"queries": 3, "head_grad": "minus"}],
    ids=str,
)
def test_a_step_has_the_bits_of_a_call_a_group(at_once, monkeypatch, options):
    ours = run(lenet(), ["fc2", "fc3"], **options)
    assert (84, 120) in at_once and (10, 84) in at_once
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: False)
    assert all(torch.equal(ours[k], v) for k, v in run(lenet(), ["fc2", "fc3"], **options).items())


def test_stacked_and_sequential_take_the_same_layers(at_once):
    """On a GPU a product has the bits of its kernel: both modes must ask for the same one."""
    for mode in ("stacked", "sequential"):
        at_once.clear()
        run(lenet(), ["fc2", "fc3"], steps=1, mode=mode)
        assert set(at_once) == {(84, 120), (10, 84)}, mode


def test_frozen_parameters_and_a_layer_without_bias(at_once):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.Linear(5, 10))
    model[4].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    after = run(model, ["3", "4"])
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert moved == {"1.weight", "1.bias", "3.weight", "4.bias"} and at_once


def test_what_is_left_to_torch(at_once, monkeypatch):
    layer, x = nn.Linear(4, 3), torch.randn(6, 4)

    def taken(x, weight=layer.weight, bias=layer.bias, groups=2):
        return grouped_linear.is_for_groups(x, weight, bias, groups)

    class Own(torch.Tensor):
        pass

    assert taken(x) and taken(x, bias=None) and taken(x.view(2, 3, 4))
    assert not taken(x[0]) and not taken(x, groups=4) and not taken(x[:0]) and not taken(torch.randn(6, 5))
    assert (
        not taken(x.double()) and not taken(x.bfloat16()) and not taken(x.to("meta")) and not taken(x.as_subclass(Own))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert taken(x) and taken(x.bfloat16())
        assert grouped_linear.grouped_linear(x, layer.weight, layer.bias, 2).dtype == torch.bfloat16
    assert not taken(x.to_sparse()) and not taken(torch.nested.nested_tensor([x, x]))
    with torch.autograd.forward_ad.dual_level():
        assert not taken(x)
    assert not torch.vmap(lambda one: torch.tensor(taken(one)))(torch.randn(2, 6, 4)).any()
    monkeypatch.setattr(grouped_linear, "MOST_PRODUCTS", 3 * 4 * 3)
    assert taken(x)
    monkeypatch.setattr(grouped_linear, "MOST_PRODUCTS", 3 * 4 * 3 - 1)
    assert not taken(x)


def test_a_layer_that_torch_compiles_stays_torchs(at_once):
    torch._dynamo.reset()
    model = ezo.convert_(lenet(), head=["fc3"])
    model.compile(backend="eager")
    opt = ezo.ElasticZO(model)
    for i in range(2):
        opt.train_step(*batch(9, i))
    assert opt.skipped == 0
    torch._dynamo.reset()


class Slope(nn.Module):
    """Of a head: the derivative of one of its layers goes through another (forces, gradient penalties)."""

    def __init__(self):
        super().__init__()
        self.trunk, self.b, self.c = nn.Linear(784, 6), nn.Linear(6, 5), nn.Linear(6, 10)

    def forward(self, x):
        h = self.trunk(x.flatten(1))
        if torch.is_grad_enabled():
            h = h.detach().requires_grad_()
            (h,) = torch.autograd.grad(torch.tanh(linear_relu(self.b, h)).sum(), h, create_graph=True)
        return self.c(h)


@pytest.mark.parametrize("options", [{}, {"mode": "sequential"}], ids=str)
def test_a_head_that_is_differentiated_twice(at_once, monkeypatch, options):
    torch.manual_seed(0)
    first = Slope()
    second, before = copy.deepcopy(first), copy.deepcopy(first.state_dict())
    with torch.enable_grad():
        ours = run(first, ["b", "c"], steps=1, **options)
        monkeypatch.setattr(_library, "bound_by_launches", lambda device: False)
        theirs = run(second, ["b", "c"], steps=1, **options)
    for name in ("b.weight", "b.bias", "c.weight", "c.bias"):
        torch.testing.assert_close(ours[name] - before[name], theirs[name] - before[name], rtol=1e-4, atol=1e-7)
        assert name == "b.bias" or not torch.equal(ours[name], before[name])

"""Bare parameters wherever torch keeps them, and a model that is one attention layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from tests.test_others import EPS, materialised_losses, seeded


class Lists(nn.Module):
    """A list, a dict and a dict in a list; their containers have no forward that could be told of the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))])
        self.shifts = nn.ParameterDict({"in": nn.Parameter(torch.zeros(4)), "out": nn.Parameter(torch.zeros(3))})
        self.frozen = nn.ParameterList([nn.Parameter(torch.ones(4), requires_grad=False)])
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        for scale in self.scales:
            x = x * scale
        return self.fc(x * self.frozen[0] + self.shifts["in"]) + self.shifts["out"]


@pytest.mark.parametrize("mode", ["auto", "stacked", "sequential"])
def test_parameters_in_lists_are_perturbed_where_they_are_read(mode):
    model = seeded(Lists)
    plain = copy.deepcopy(model)
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    ezo.convert_(model)
    assert len(ezo.trunk_parameters(model)) == 6
    opt = ezo.ElasticZO(model, eps=EPS, seed=3, queries=2, mode=mode)
    opt.train_step(x, y)
    want = materialised_losses(plain, lambda m: F.cross_entropy(m(x), y), model._ezo.manifest, 2)
    torch.testing.assert_close(opt.losses, want, rtol=2e-5, atol=2e-6)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert moved == {n for n, _ in plain.named_parameters()} - {"frozen.0"}
    rows = {r.name: r for r in ezo.summary(model).rows}
    assert (rows["scales"].trained, rows["scales"].reason) == ("ZO", "read by its parent module")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ezo.unconvert_(model)):
        assert other(x).shape == (5, 3)
    assert type(model.scales) is nn.ParameterList


def test_a_list_in_the_head_is_trained_by_backpropagation():
    model = ezo.convert_(seeded(Lists), head=["fc", "shifts"])
    assert len(ezo.head_parameters(model)) == 4 and len(ezo.trunk_parameters(model)) == 2
    opt = ezo.ElasticZO(model, head_lr=0.1)
    before = model.shifts["out"].detach().clone()
    opt.train_step(torch.randn(5, 4), torch.randint(0, 3, (5,)))
    assert not torch.equal(model.shifts["out"], before)


class Modules(nn.Module):
    """A list of lists, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.ModuleList([nn.ParameterList([nn.Parameter(torch.ones(4))])])
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x * self.deep[0][0])


def test_a_parameter_that_no_called_module_has_is_refused_by_name():
    model = ezo.convert_(seeded(Modules))
    with pytest.raises(ValueError, match="'deep.0.0'"):
        ezo.ElasticZO(model).train_step(torch.randn(5, 4), torch.randint(0, 3, (5,)))


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0].mean(1)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_is_one_attention_layer(training):
    model = seeded(lambda: Attention(8, 2, batch_first=True)).train(training)
    plain = copy.deepcopy(model)
    x, y = torch.randn(5, 6, 8), torch.randint(0, 8, (5,))
    ezo.convert_(model)
    assert len(ezo.trunk_parameters(model)) == 4
    opt = ezo.ElasticZO(model, eps=EPS, seed=3)
    opt.train_step(x, y)
    want = materialised_losses(plain, lambda m: F.cross_entropy(m(x), y), model._ezo.manifest, 1)
    torch.testing.assert_close(opt.losses, want, rtol=2e-5, atol=2e-6)
    ezo.unconvert_(model)
    assert type(model.out_proj) is type(plain.out_proj)

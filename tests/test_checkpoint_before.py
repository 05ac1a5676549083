"""What was written before an attribute or an option was there is read as what it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.cli.recipe import Recipe
from ezo_kernels.nn.grouped import Grouped


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))


def test_recipes_from_before_the_clip_had_none():
    new = Recipe(data="digits", head="fc3", nodes="fc1,fc2")
    old = {name: value for name, value in new.as_dict().items() if name != "node_clip"}
    assert Recipe.from_dict(old).node_clip == 0.0
    assert Recipe.from_dict(old).node_perturbation.clip is None
    assert Recipe.from_dict(new.as_dict()) == new
    plain = Recipe(data="digits")
    assert Recipe.from_dict({n: v for n, v in plain.as_dict().items() if n != "node_clip"}) == plain


def test_grouped_layers_from_before_zo_owned():
    model = ezo.convert_(net(), head=["3"])
    for module in [m for m in model.modules() if isinstance(m, Grouped)]:
        state = module.__dict__.copy()
        state["owned"] = state.pop("zo_owned")
        again = type(module).__new__(type(module))
        again.__setstate__({**state})
        assert again.zo is module.zo and again.zo_owned == module.zo_owned and "owned" not in again.__dict__


@pytest.mark.parametrize("head", [0, ["2"]])
def test_integer_layers_from_before_they_knew_what_they_were(head):
    model = ezo.convert_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), head=head, precision="int8")
    for module in model.modules():
        if module.__dict__.pop("was", None) is not None:
            module.converted = tuple(name for name in module.converted if name != "was")
    ezo.unconvert_(model)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


class OwnSGD(torch.optim.SGD):
    """As a user derives one."""


def test_a_subclass_of_the_head_optimizer_is_the_same_optimizer():
    def run(kind):
        model = ezo.convert_(net(), head=["3"])
        return ezo.ElasticZO(model, lr=1e-3, head_optimizer=kind(ezo.head_parameters(model), lr=0.1))

    state = run(OwnSGD).state_dict()
    run(torch.optim.SGD).load_state_dict(state)
    with pytest.raises(ValueError, match="AdamW"):
        run(torch.optim.AdamW).load_state_dict(run(torch.optim.Adam).state_dict())

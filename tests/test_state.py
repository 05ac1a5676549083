"""Saved states: what cannot be one is refused, and nothing changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import ezo_kernels as ezo


def start(outputs: int = 3):
    torch.manual_seed(0)
    model = ezo.convert_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, outputs)), head="2")
    return ezo.ElasticZO(model, seed=1, head_optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))


def stepped(opt, steps: int):
    g = torch.Generator().manual_seed(2)
    for _ in range(steps):
        opt.train_step(torch.randn(5, 4, generator=g), torch.randint(0, 3, (5,), generator=g))
    return opt


def flat(value) -> list:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *flat(value[key]))]
    if isinstance(value, (list, tuple)):
        return [leaf for own in value for leaf in flat(own)]
    return [value.tolist() if isinstance(value, torch.Tensor) else value]


GOOD_TRUNK = {"lr": 1e-4, "eps": 1e-3, "clip": None}


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("seed", 3, "seed"),
        ("seed", torch.zeros(2, dtype=torch.int64), "seed"),
        ("step", torch.tensor([1.5]), "step"),
        ("skipped", None, "skipped"),
        ("trunk", None, "settings"),
        ("trunk", {}, "lr"),
        ("trunk", {**GOOD_TRUNK, "lr": -1.0}, "lr"),
        ("trunk", {**GOOD_TRUNK, "eps": 0.0}, "eps"),
        ("trunk", {**GOOD_TRUNK, "clip": float("nan")}, "clip"),
        ("trunk", {**GOOD_TRUNK, "eps": "1"}, "eps"),
        ("head", None, "head"),
        ("head", {}, "SGD"),
        ("head", {"state": {}, "param_groups": []}, "groups"),
        ("manifest", None, "manifest"),
        ("noise", None, "noise"),
    ],
)
def test_values_that_cannot_be_change_nothing(key, value, match):
    opt = stepped(start(), 1)
    state, before = stepped(start(), 3).state_dict(), flat(opt.state_dict())
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict({**state, key: value})
    assert flat(opt.state_dict()) == before
    opt.load_state_dict(state)
    assert flat(opt.state_dict()) == flat(state)


def test_a_state_of_another_head_is_refused():
    opt = stepped(start(4), 1)
    before = flat(opt.state_dict())
    with pytest.raises(ValueError, match="another head"):
        opt.load_state_dict(stepped(start(3), 2).state_dict())
    assert flat(opt.state_dict()) == before
    old = copy.deepcopy(opt.state_dict())
    del old["head_shapes"]  # states from before it was kept
    opt.load_state_dict(old)


@pytest.mark.parametrize("value", [None, 3, [], "state"])
def test_what_is_no_state_is_refused(value):
    with pytest.raises(TypeError, match="a state is a dict"):
        start().load_state_dict(value)


def test_rates_of_numpy_are_saved_as_numbers(tmp_path):
    """torch.load(weights_only=True) takes numpy's scalars for code."""
    opt = ezo.ElasticZO(ezo.convert_(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), head=["1"]))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: np.float32(0.5) ** epoch)
    opt.train_step(torch.randn(5, 4), torch.arange(5) % 2)
    schedule.step()
    opt.param_groups[0]["eps"] = np.float64(1e-2)
    torch.save(opt.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    assert (saved["trunk"]["lr"], saved["trunk"]["eps"]) == (opt.param_groups[0]["lr"], 1e-2)
    opt.load_state_dict(saved)


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
}


def headed(made: str):
    torch.manual_seed(0)
    model = ezo.convert_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), head="2")
    return ezo.ElasticZO(model, seed=1, head_optimizer=MAKERS[made])


OTHERS = [("sgd", "adam"), ("momentum", "adam"), ("adam", "sgd"), ("adam", "momentum")]


@pytest.mark.parametrize(
    ("saved", "here", "kept"),
    [
        *((*own, kept) for own in OTHERS for kept in (True, False)),
        ("adam", "adamax", True),
    ],  # whose settings are in Adam's
)
def test_a_state_of_another_head_optimizer_is_refused_and_changes_nothing(saved, here, kept):
    state = stepped(headed(saved), 2).state_dict()
    if not kept:  # states from before its name was kept
        del state["head_optimizer"]
    opt, twin = (stepped(headed(here), 2) for _ in range(2))
    before = flat(opt.state_dict())
    with pytest.raises(ValueError, match="none of"):
        opt.load_state_dict(state)
    assert flat(opt.state_dict()) == before
    assert flat(stepped(opt, 2).state_dict()) == flat(stepped(twin, 2).state_dict())


@pytest.mark.parametrize("lr", [float("nan"), -1.0, "fast"])
def test_a_rate_of_the_head_that_cannot_be_is_refused_and_changes_nothing(lr):
    opt = stepped(start(), 1)
    state, before = copy.deepcopy(stepped(start(), 3).state_dict()), flat(opt.state_dict())
    state["head"]["param_groups"][0]["lr"] = lr
    with pytest.raises(ValueError, match="head"):
        opt.load_state_dict(state)
    assert flat(opt.state_dict()) == before

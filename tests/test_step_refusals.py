"""What a step and its optimizer refuse, and that nothing has changed then."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import ezo_kernels as ezo
from tests.test_step import batch, bits, lenet, same


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"eps": 0.0}, ValueError, "eps"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"eps": math.nan}, ValueError, "eps"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": "1"}, TypeError, "lr"),
        ({"lr": torch.tensor(1.0)}, TypeError, "lr"),
        ({"queries": 0}, ValueError, "queries"),
        ({"queries": 1.5}, TypeError, "queries"),
        ({"noise": "laplace"}, ValueError, "laplace"),
        ({"noise": "sparse", "p_zero": 1.0}, ValueError, "p_zero"),
        ({"noise": "gaussian", "p_zero": 0.5}, ValueError, "p_zero"),
        ({"noise": "gaussian_fast"}, NotImplementedError, "CUDA"),
        ({"noise": "sparse_int8"}, NotImplementedError, "integer"),
        ({"clip": 0.0}, ValueError, "clip"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1 << 64}, ValueError, "seed"),
        ({"mode": "both"}, ValueError, "both"),
        ({"head_grad": "sum"}, ValueError, "sum"),
        ({"head_optimizer": lambda p: 3}, TypeError, "head_optimizer"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    model = ezo.convert_(lenet(), head=["fc3"])
    with pytest.raises(error, match=match):
        ezo.ElasticZO(model, **kwargs)


def test_failed_call_changes_nothing():
    model = ezo.convert_(lenet(), head=["fc3"])
    opt = ezo.ElasticZO(model)
    opt.train_step(*batch(8))
    before, step = bits(model), opt.step_count.item()
    x, y = batch(8)
    for bad_x, bad_y, kwargs in (
        (x[:0], y[:0], {}),
        (x[:, :, :5], y, {}),
        (x, y[:5], {}),
        (x, y, {"loss_fn": lambda o, t: F.cross_entropy(o, t, reduction="none")}),
        (x.double(), y, {}),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            opt.train_step(bad_x, bad_y, **kwargs)
        assert same(before, bits(model)) and opt.step_count.item() == step
        assert opt.zo.p is None and all(p.grad is None for p in opt.head)
    with pytest.raises(ValueError, match="closure"):
        opt.step()


def test_a_replaced_parameter_is_refused_by_name():
    model = ezo.convert_(lenet(), head=["fc3"])
    opt = ezo.ElasticZO(model)
    opt.train_step(*batch(8))
    model.load_state_dict(bits(model), assign=True)
    with pytest.raises(ValueError, match=r"conv1\.bias.*replaced"):
        opt.train_step(*batch(8))

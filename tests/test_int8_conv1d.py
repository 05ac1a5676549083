"""Integers over points: the 1-D convolution and the maximum over one dimension, against what they are made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.ops import Int8Tensor, IntegerPerturbation, Noise
from ezo_kernels.ops.noise import key_tensor
from tests.int8_models import SEED, SITE, STEP, exponents, given, randint

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SCALES = {"weight_exponent": exponents(-9), "bias_exponent": exponents(-3), "site": SITE, "bias_site": 17}


def a_pass(signs=(1, -1)):
    return IntegerPerturbation(key_tensor(SEED, STEP), Noise("sparse_int8", 7, 0.3, 40), 4, 1, signs)


CASES = [
    dict(c=3, o=7, kernel=1, size=20),
    dict(c=5, o=6, kernel=3, size=9, padding=1),
    dict(c=4, o=6, kernel=4, size=11, stride=2, padding=2, dilation=2, groups=2),
    dict(c=6, o=6, kernel=5, size=5, groups=6),
]


@pytest.mark.parametrize("signs", [(1, -1), (1,), (0,), None])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"k{c['kernel']}g{c.get('groups', 1)}")
def test_one_dimension_is_two_with_a_height_of_one(case, signs):
    p = None if signs is None else a_pass(signs)
    how = {k: case.get(k, default) for k, default in (("stride", 1), ("padding", 0), ("dilation", 1))}
    conv_groups = case.get("groups", 1)
    x = given(len(signs or [0]), 3, case["c"], case["size"])
    w, b = randint(case["o"], case["c"] // conv_groups, case["kernel"], seed=1), randint(case["o"], seed=2)
    y = ops.int8_conv1d(x, w, b, p, **SCALES, **how, groups=conv_groups)
    two = {k: (0 if k == "padding" else 1, v) for k, v in how.items()}
    wide = Int8Tensor(x.values[:, :, None], x.exponent)
    want = ops.int8_conv2d(wide, w[:, :, None], b, p, **SCALES, **two, groups=conv_groups)
    assert torch.equal(y.values, want.values[:, :, 0]) and torch.equal(y.exponent, want.exponent)
    assert y.values.any()


def test_a_kernel_of_one_point_is_a_linear_layer_over_points():
    """z of both is of row o, column c: the same bits although one is a convolution and the other is not."""
    x, w, b = given(2, 3, 6, 10), randint(5, 6, seed=1), randint(5, seed=2)
    y = ops.int8_conv1d(x, w[:, :, None], b, a_pass(), **SCALES)
    rows = Int8Tensor(x.values.transpose(1, 2).contiguous(), x.exponent)
    want = ops.int8_linear(rows, w, b, a_pass(), **SCALES)
    assert torch.equal(y.values.transpose(1, 2), want.values) and torch.equal(y.exponent, want.exponent)


def test_conv1d_refuses():
    x, w = given(1, 2, 3, 8), randint(4, 3, 1)
    with pytest.raises(TypeError, match="int8_conv1d"):
        ops.int8_conv1d(x.dequantize(), w, None, None, weight_exponent=exponents(-9))
    for bad_x, bad_w in ((given(1, 2, 3, 8, 1), w), (x, randint(4, 3)), (given(1, 2, 3), w)):
        with pytest.raises(ValueError, match="int8_conv1d: x and weight must be 3-D"):
            ops.int8_conv1d(bad_x, bad_w, None, None, weight_exponent=exponents(-9))
    with pytest.raises(ValueError, match="does not fit weight"):
        ops.int8_conv1d(given(1, 2, 5, 8), w, None, None, weight_exponent=exponents(-9))


class Taps(nn.Module):
    """Two 1-D convolutions of every option and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 6, 3, stride=2, padding=2, dilation=2)
        self.second = nn.Conv1d(6, 4, 3, padding="same", groups=2, bias=False)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.amax(F.relu(self.second(F.relu(self.first(x)))), dim=-1))


class Flat(nn.Module):
    """The same in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, (1, 3), stride=(1, 2), padding=(0, 2), dilation=(1, 2))
        self.second = nn.Conv2d(6, 4, (1, 3), padding=(0, 1), groups=2, bias=False)
        self.fc = nn.Linear(4, 3)
        self.pool = nn.MaxPool2d((1, 7))

    def forward(self, x):
        return self.fc(self.pool(F.relu(self.second(F.relu(self.first(x))))).flatten(1))


@pytest.mark.parametrize("how", ["stacked", "sequential"])
def test_layers_take_the_steps_of_two_dimensions(how):
    """The update's z is the forward's: three steps of a padded, strided, dilated, grouped kernel, bit for bit."""
    torch.manual_seed(0)
    model, flat = Taps(), Flat()
    with torch.no_grad():
        for name, p in model.named_parameters():
            flat.get_parameter(name).copy_(p.view(flat.get_parameter(name).shape))
    runs = []
    for net in (model, flat):
        ezo.convert_(net, head=["fc"], precision="int8")
        opt = ezo.ElasticZOInt8(net, seed=SEED, mode=how, bits=3)
        start = {k: v.clone() for k, v in net.state_dict().items()}
        for step in range(3):
            x = Int8Tensor(randint(6, 2, 14, seed=step), exponents(-6))
            x = x if net is model else Int8Tensor(x.values[:, :, None], x.exponent)
            opt.train_step(x, torch.arange(6) % 3)
        assert not torch.equal(net.second.weight, start["second.weight"])
        runs.append(net.state_dict())
    assert list(runs[0]) == list(runs[1])
    assert all(torch.equal(runs[0][k].flatten(), runs[1][k].flatten()) for k in runs[0])


# ------------------------------------------------------------------------------------------------------------- amax


@pytest.mark.parametrize("dim", [1, 2, 3, -1, -3, (2,)])
@pytest.mark.parametrize("keepdim", [False, True])
def test_amax_is_the_maximum_and_keeps_the_exponents(dim, keepdim):
    x = given(2, 3, 4, 5, 6)
    y = torch.amax(x, dim, keepdim)
    assert torch.equal(y.values, x.values.amax(dim, keepdim)) and torch.equal(y.exponent, x.exponent)
    assert torch.equal(torch.amax(x, dim=dim, keepdim=keepdim).values, y.values)


def test_amax_of_the_least_value():
    x = Int8Tensor(torch.full((2, 3, 40), -128, dtype=torch.int8), exponents(-5))
    assert (torch.amax(x, 2).values == -128).all()


@pytest.mark.parametrize("dim", [0, -3, (1, 2), ()])
def test_amax_refuses(dim):
    with pytest.raises(NotImplementedError, match="amax in integers: one dimension"):
        torch.amax(given(1, 2, 3, 4), dim)


class LateMaximum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.amax(self.a(x), 1))


def test_amax_in_the_head_is_refused_by_name():
    model = ezo.convert_(LateMaximum(), head=2, precision="int8")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NotImplementedError, match="the head calls amax, which has no integer backward"):
        ezo.ElasticZOInt8(model).train_step(Int8Tensor(randint(3, 5, 4), exponents(-5)), torch.arange(3) % 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- pools


POOLS = [
    (lambda x: F.max_pool1d(x, 3, 2, 1), nn.MaxPool1d(3, 2, 1)),
    (lambda x: F.avg_pool1d(x, 4), nn.AvgPool1d(4)),
    (lambda x: F.avg_pool1d(x, 2, 1, 1), nn.AvgPool1d(2, 1, 1)),
    (lambda x: F.adaptive_avg_pool1d(x, 3), nn.AdaptiveAvgPool1d(3)),
    (lambda x: F.adaptive_max_pool1d(x, 4), nn.AdaptiveMaxPool1d(4)),
]


@pytest.mark.parametrize(("function", "module"), POOLS, ids=lambda m: type(m).__name__)
def test_pools_of_one_dimension_are_those_of_floats(function, module):
    """Maxima exactly, averages rounded with halves away from zero; of a function and of the module in a model."""
    x = given(2, 3, 4, 12)
    y, floats = function(x), function(x.values.double())
    want = torch.sign(floats) * torch.floor(floats.abs() + 0.5)
    assert torch.equal(y.values.double(), want) and torch.equal(y.exponent, x.exponent) and y.values.any()
    model = ezo.convert_(nn.Sequential(nn.Conv1d(4, 2, 1), module, nn.Flatten()), precision="int8")
    ezo.ElasticZOInt8(model).train_step(Int8Tensor(randint(3, 4, 12), exponents(-5)), torch.arange(3) % 2)


def test_the_largest_of_a_plane_is_its_adaptive_maximum():
    x = given(2, 3, 4, 6, 6)
    y = F.adaptive_max_pool2d(x, (1, 2))
    assert torch.equal(y.values.double(), F.adaptive_max_pool2d(x.values.double(), (1, 2)))
    model = nn.Sequential(nn.Conv2d(4, 2, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    ezo.ElasticZOInt8(ezo.convert_(model, precision="int8")).train_step(
        Int8Tensor(randint(3, 4, 6, 6), exponents(-5)), torch.arange(3) % 2
    )


def test_pools_of_one_dimension_refuse():
    x = given(1, 2, 3, 8)
    for call, error, match in (
        (lambda: F.max_pool1d(x, 2, ceil_mode=True), NotImplementedError, "max_pool1d in integers"),
        (lambda: F.avg_pool1d(x, 2, 2, 1, False, False), NotImplementedError, "avg_pool1d in integers"),
        (lambda: F.adaptive_avg_pool1d(x, 3), NotImplementedError, r"\(8,\) is no multiple of \(3,\).*use avg_pool1d"),
        (lambda: F.adaptive_max_pool1d(x, 0), ValueError, "at least 1, got"),
        (lambda: F.adaptive_max_pool1d(x, 1, return_indices=True), TypeError, "with_indices has no integer form"),
    ):
        with pytest.raises(error, match=match):
            call()

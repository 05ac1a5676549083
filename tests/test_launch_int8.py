"""Integer launches on a GPU that is not there; what tests/test_launch.py says holds here."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

import ezo_kernels as ezo  # noqa: E402
from ezo_kernels import ops  # noqa: E402
from ezo_kernels.ops import Int8Tensor, Int8UpdatePlan, IntegerPerturbation, Noise, _library  # noqa: E402
from ezo_kernels.ops._int8_update_triton import update_table  # noqa: E402
from ezo_kernels.ops.int8_head import sum_groups  # noqa: E402
from ezo_kernels.ops.noise import key_tensor  # noqa: E402
from tests.test_launch import launches  # noqa: E402, F401 - the fixture

pytestmark = pytest.mark.compile


def int8(*shape) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int8)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tensor(groups: int, *shape) -> Int8Tensor:
    return Int8Tensor(int8(*shape), torch.zeros(groups, dtype=torch.int32))


def options(**more) -> dict:
    return {"weight_exponent": int32(-8), "bias_exponent": int32(-9), "site": 0xFFFFFFFF, "bias_site": 1, **more}


def pass_of(signs=(1, -1)) -> IntegerPerturbation:
    return IntegerPerturbation(key_tensor(1, 2), Noise("sparse_int8", 7, 0.5, 3), signs=signs)


@pytest.mark.parametrize("strategy", ["buffer", "twice"])
def test_lenet(launches, strategy):  # noqa: F811
    """The shapes that training begins with: a product and a requantisation, or two products."""
    p, how = pass_of(), options(strategy=strategy)
    ops.int8_conv2d(tensor(1, 32, 1, 28, 28), int8(6, 1, 5, 5), int8(6), p, padding=2, **how)
    ops.int8_conv2d(tensor(2, 64, 6, 14, 14), int8(16, 6, 5, 5), int8(16), p, padding=2, **how)
    ops.int8_linear(tensor(2, 64, 784), int8(120, 784), int8(120), p, **how)
    ops.int8_linear(tensor(2, 64, 84), int8(10, 84), int8(10), None, **how)
    assert len(launches) == (6 if strategy == "buffer" else 8)  # a few linear outputs are rounded by the last program


@pytest.mark.parametrize("weights", ["fused", "slab"])
def test_pooled_convolutions(launches, weights):  # noqa: F811
    """Pooling and relu are in the kernel that rounds; with sums in memory pooling is a kernel of its own."""
    p, how = pass_of(), options(weights=weights, padding=2, relu=True, pool=2)
    for x, w in ((tensor(1, 32, 1, 28, 28), int8(6, 1, 5, 5)), (tensor(2, 64, 6, 15, 15), int8(16, 6, 5, 5))):
        ops.int8_conv2d(x, w, int8(len(w)), p, strategy="twice", **how)
        names = [launch.name for launch in launches]
        slab = ["int8_slab_kernel"] * 2 + ["int8_conv2d_kernel"] * 4
        assert names == (["int8_conv2d_kernel"] * 2 if weights == "fused" else slab)
        launches.clear()
        ops.int8_conv2d(x, w, int8(len(w)), p, strategy="buffer", **how)
        assert [launch.name for launch in launches][-2:] == ["int8_requantize_kernel", "int8_pool2d_kernel"]
        assert len(launches) == (3 if weights == "fused" else 6)
        launches.clear()


@pytest.mark.parametrize("head", [0, ["fc2", "fc3"]], ids=str)
@pytest.mark.parametrize("strategy", ["buffer", "twice"])
def test_a_whole_step(launches, monkeypatch, head, strategy):  # noqa: F811
    """LeNet-5 with remainders; but for the trunk's update, whose table holds addresses of a GPU."""
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    opt = ezo.ElasticZOInt8(
        ezo.convert_(ezo.models.LeNet5(), head=head, precision="int8"), head_remainder=True, strategy=strategy
    )
    opt.train_step(Int8Tensor(int8(4, 1, 28, 28), int32(-5)), torch.arange(4))
    names = [launch.name for launch in launches]
    assert names.count("int8_cross_entropy_kernel") == 1 and "int8_signs_kernel" not in names
    assert names.count("int8_head_step_kernel") == (1 if head else 0)  # of weight and bias of each layer
    assert "int8_relu_kernel" not in names and "int8_head_update_kernel" not in names


def test_a_step_of_lenet(launches):  # noqa: F811
    """As a GPU's plan has it: convolutions twice, for their accumulators are most of the memory, and linear layers once."""
    opt = ezo.ElasticZOInt8(ezo.convert_(ezo.models.LeNet5(), head=0, precision="int8"), strategy="buffer")
    x, y = Int8Tensor(int8(32, 1, 28, 28), int32(-5)), torch.arange(32) % 10
    opt.train_step(x, y)
    opt._strategies.update({layer: "twice" for layer in opt._strategies if isinstance(layer, torch.nn.Conv2d)})
    launches.clear()
    opt.train_step(x, y)
    names = [launch.name for launch in launches]
    convolutions = ["int8_conv2d_kernel"] * 4
    linear = ["int8_linear_kernel"] * 3
    assert names[:9] == ["fold_key_kernel", *convolutions, *linear, "int8_cross_entropy_kernel"]
    assert names[9:] in ([], ["int8_update_kernel"])  # its table holds addresses of a GPU


@pytest.mark.parametrize(("signs", "groups"), [((1, -1), 2), ((1, -1), 1), ((0,), 1)])
def test_everything_is_one(launches, monkeypatch, signs, groups):  # noqa: F811
    """Arguments that are one are constants of the kernel."""
    p = pass_of(signs)
    ops.int8_linear(tensor(groups, groups, 1), int8(1, 1), int8(1), p, **options())
    monkeypatch.setattr(sys.modules["ezo_kernels.ops.int8_linear"], "MOST_ONCE", 0)
    ops.int8_linear(tensor(groups, groups, 1), int8(1, 1), int8(1), p, **options())
    ops.int8_conv2d(tensor(groups, groups, 1, 1, 1), int8(1, 1, 1, 1), None, p, **options(strategy="twice"))
    assert len(launches) == 5


@pytest.mark.parametrize("strategy", ["buffer", "twice"])
def test_slabs(launches, strategy):  # noqa: F811
    """Written once where all outputs fit: bias, weight, then the pair's product, and one a group for a convolution."""
    p, how = pass_of(), options(strategy=strategy, weights="slab")
    ops.int8_linear(tensor(2, 8, 64), int8(48, 64), int8(48), p, **how)
    times = 1 if strategy == "buffer" else 2
    names = ["int8_slab_kernel"] * 2 + ["int8_plain_kernel"] * times
    assert [launch.name for launch in launches[: 2 + times]] == names
    launches.clear()
    ops.int8_conv2d(tensor(1, 2, 3, 6, 6), int8(5, 3, 3, 3), None, p, **how)
    assert [launch.name for launch in launches[: 1 + 2 * times]] == ["int8_slab_kernel"] + [
        "int8_conv2d_kernel"
    ] * 2 * times


@pytest.mark.parametrize(("rows", "first"), [(150, "int8_linear_kernel"), (192, "int8_slab_kernel")])
def test_the_rows_of_one_group_choose(launches, rows, first):  # noqa: F811
    """Stacked they are 300 and 384."""
    ops.int8_linear(tensor(2, 2 * rows, 4096), int8(4096, 4096), None, pass_of(), **options())
    assert launches[0].name == first


@pytest.mark.parametrize("signs", [(1, -1), (-1,)])
def test_slabs_of_one(launches, signs):  # noqa: F811
    p = pass_of(signs)
    ops.int8_linear(tensor(1, 1, 1), int8(1, 1), int8(1), p, **options(weights="slab"))
    ops.int8_conv2d(tensor(1, 1, 1, 1, 1), int8(1, 1, 1, 1), None, p, **options(strategy="twice", weights="slab"))
    assert {launch.name for launch in launches} >= {"int8_slab_kernel", "int8_plain_kernel", "int8_conv2d_kernel"}


@pytest.mark.parametrize("size", [1, 33])
def test_between_the_products(launches, size):  # noqa: F811
    key, x, image = key_tensor(1, 2), tensor(2, 2 * size, size), tensor(1, size, 1, 3, 3)
    labels = torch.zeros(size, dtype=torch.int64)
    ops.int8_relu(x)
    ops.int8_add(x, x)
    ops.int8_pool2d(image, "max", 2)
    ops.int8_pool2d(image, "avg", 3, 1, 1)
    ops.int8_cross_entropy(x, labels)
    ops.int8_cross_entropy_gradient(x, labels, key)
    ops.int8_squared_error(x, tensor(1, size, size), gradient=True)
    ops.round_shift(torch.ones(size, size, dtype=torch.int32), 9, "stochastic", key=key)
    assert len(launches) == 9


@pytest.mark.parametrize("shapes", [[(1,)], [(5, 7), (8, 8, 3, 3), (64,), (64, 64)]], ids=str)
def test_updates(launches, shapes):  # noqa: F811
    params, sites = [int8(*s) for s in shapes], list(range(1, len(shapes) + 1))
    layouts = ["conv" if len(s) == 4 else "matrix" for s in shapes]
    where = tuple(map(Int8UpdatePlan._address, params))
    plan = Int8UpdatePlan(tuple(sites), tuple(layouts), where, update_table(params, sites, layouts))
    key, versions = key_tensor(1, 2), [w._version for w in params]
    ops.int8_update_(params, key, int32(1, -1), int32(3), sites=sites, layouts=layouts, plan=plan)
    assert all(p._version > v for p, v in zip(params, versions, strict=True)), "autograd must hear of it"
    w = params[-1]
    acc, _ = ops.int8_gemm(w.view(1, w.shape[0], -1).transpose(1, 2), w.view(1, w.shape[0], -1).transpose(1, 2))
    sum_groups(acc, int32(0))
    version = w._version
    ops.int8_head_update_(w, torch.ones(w.shape, dtype=torch.int32), int32(5), int32(1), key=key, site=7)
    assert len(launches) == 4 and w._version > version

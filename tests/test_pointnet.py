"""PointNet: its shape, zeroth-order steps of both forms, and a problem that it learns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.models import PointNet
from tests.test_others import EPS, materialised_losses


def make(classes: int = 4, norm: bool = True, seed: int = 0) -> PointNet:
    return PointNet(classes, norm=norm, generator=torch.Generator().manual_seed(seed))


def clouds(n: int = 8, points: int = 16, seed: int = 0):
    """Two classes: points on a stick along x, points on a disc."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = torch.randn(n, 3, points, generator=g) * 0.1
    x[y == 0, 0] += torch.rand(int((y == 0).sum()), points, generator=g) * 2 - 1
    x[y == 1, 1:] += torch.rand(int((y == 1).sum()), 2, points, generator=g) * 1.4 - 0.7
    return x.clamp(-1, 1), y


def test_parameters_of_the_paper():
    counts = {norm: sum(p.numel() for p in PointNet(40, norm=norm).parameters()) for norm in (True, False)}
    assert counts == {True: 819_624, False: 815_400}
    layers = {name: sum(p.numel() for p in m.parameters()) for name, m in PointNet().named_children()}
    assert layers == {
        "conv1": 256, "bn1": 128, "conv2": 4160, "bn2": 128, "conv3": 4160, "bn3": 128, "conv4": 8320, "bn4": 256,
        "conv5": 132096, "bn5": 2048, "fc1": 524800, "bn6": 1024, "fc2": 131328, "bn7": 512, "fc3": 10280,
    }  # fmt: skip


@pytest.mark.parametrize("classes", [0, -1])
def test_classes_are_checked(classes):
    with pytest.raises(ValueError, match=f"classes is {classes}"):
        PointNet(classes)


@pytest.mark.parametrize("norm", [True, False])
def test_the_same_mlp_on_every_point_then_the_maximum(norm):
    model = make(5, norm).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.running_mean.uniform_(-0.5, 0.5), m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, -1, 1), nn.init.uniform_(m.bias, -1, 1)
    x, _ = clouds(3, 7)

    def layer(h, weights, bn):
        w = model.get_submodule(weights)
        h = F.linear(h, w.weight.flatten(1), w.bias)
        return F.relu(model.get_submodule(bn)(h) if norm else h)

    h = x.transpose(1, 2).reshape(21, 3)
    for i in range(1, 6):
        h = layer(h, f"conv{i}", f"bn{i}")
    h = h.view(3, 7, 1024).max(1).values
    want = model.fc3(layer(layer(h, "fc1", "bn6"), "fc2", "bn7"))
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    # The order of the points does not matter.
    torch.testing.assert_close(model(x[:, :, torch.randperm(7)]), model(x), rtol=1e-5, atol=1e-6)


def test_initial_weights_are_kaiming_and_the_generator_decides_them():
    model, again, other = make(seed=1), make(seed=1), make(seed=2)
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.dim() == 1:
            assert (p == (name.startswith("bn") and name.endswith("weight"))).all(), name
            continue
        assert not torch.equal(p, r)
        assert abs(p.std().item() / math.sqrt(2 / p[0].numel()) - 1) < 5 / math.sqrt(2 * p.numel()), name


# ------------------------------------------------------------------------------------------------------- zeroth order

HEADS = {0: (), 1: ("fc3",), 2: ("fc2", "bn7", "fc3")}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_losses_equal_materialised_noise(norm, head):
    model = make(norm=norm)
    plain = copy.deepcopy(model)
    x, y = clouds()
    ezo.convert_(model, head=head)
    assert model._ezo_plan.head == tuple(n for n in HEADS[head] if norm or not n.startswith("bn"))
    assert list(model.state_dict()) == list(plain.state_dict())
    opt = ezo.ElasticZO(model, eps=EPS, seed=3, queries=2)
    opt.train_step(x, y)
    assert opt.mode == "stacked"
    want = materialised_losses(plain, lambda m: F.cross_entropy(m(x), y), model._ezo.manifest, 2)
    # batch norm over 8 rows divides by deviations as small as rounding makes them differ
    torch.testing.assert_close(opt.losses, want, rtol=2e-4, atol=2e-5)
    assert opt.g.abs().max() > 1e-3
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    # each bias of a layer before batch norm is taken out by the mean: its gradient in the head is rounding, or nothing
    assert moved >= {n for n in plain.state_dict() if n.endswith("weight") and not n.startswith("bn")}


@pytest.mark.parametrize("head", HEADS)
def test_no_perturbation_no_difference(head):
    """eps = 0: both signs give the same loss, bit for bit, and the trunk stays."""
    model = ezo.convert_(make(), head=head)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = ezo.ElasticZO(model, seed=3)
    opt._eps.zero_()
    x, y = clouds(33)
    opt.train_step(x, y)
    assert opt.losses[0] == opt.losses[1]
    for name, p in model.named_parameters():
        in_trunk = name.partition(".")[0] not in HEADS[head]
        assert not in_trunk or torch.equal(p, before[name]), name


def test_both_modes_agree_and_statistics_move_once():
    results = []
    for mode in ("stacked", "sequential"):
        model = ezo.convert_(make(), head=1)  # its bn7 is the trunk's
        opt = ezo.ElasticZO(model, eps=EPS, seed=3, mode=mode)
        opt.train_step(*clouds())
        results.append((opt.losses.clone(), model.bn5.running_mean.clone(), model.bn7.running_var.clone()))
        assert all(m.num_batches_tracked == 1 for m in model.modules() if isinstance(m, nn.BatchNorm1d))
        assert model.bn5.running_mean.abs().max() > 0
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_two_class_problem_is_learnt():
    """ElasticZO with the last two layers by backpropagation; the classes come from batches it has not seen."""
    model = ezo.convert_(make(2), head=2)
    opt = ezo.ElasticZO(model, lr=1e-5, eps=1e-3, head_lr=0.01, seed=0)
    for step in range(30):
        opt.train_step(*clouds(16, seed=step))
    model.eval()
    x, y = clouds(64, seed=1000)
    with torch.no_grad():
        logits, start = model(x), make(2).eval()(x)
    assert F.cross_entropy(logits, y) < 0.3 < F.cross_entropy(start, y)
    assert (logits.argmax(1) == y).float().mean() > 0.95


class ReadsTheView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)

    def forward(self, x):
        return F.linear(self.conv(x).amax(2), self.conv.weight.squeeze(2).t())


def test_a_view_of_a_weight_that_is_read_is_still_found():
    model = ezo.convert_(ReadsTheView())
    with pytest.raises(ValueError, match=r"'conv.weight' \(by linear\)"):
        ezo.ElasticZO(model).train_step(torch.randn(4, 3, 5), torch.arange(4) % 3)


class WritesTheWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)

    def forward(self, x):
        self.conv.weight.mul_(1.0)
        return self.conv(x).amax(2)


def test_a_weight_that_the_forward_writes_is_found():
    model = ezo.convert_(WritesTheWeight())
    with pytest.raises(ValueError, match=r"'conv.weight' \(by mul_\)"):
        ezo.ElasticZO(model).train_step(torch.randn(4, 3, 5), torch.arange(4))


# --------------------------------------------------------------------------------------------------------- in integers


def integer_clouds(n: int = 8, points: int = 16, seed: int = 0):
    x, y = clouds(n, points, seed)
    return ezo.quantize(x, -7), y


def test_batch_norm_is_refused_by_name_and_nothing_has_changed():
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NotImplementedError) as error:
        ezo.convert_(model, head=2, precision="int8")
    assert all(f"bn{i} (BatchNorm1d)" in str(error.value) and "fold" in str(error.value) for i in range(1, 8))
    assert "Conv1d" not in str(error.value) and "amax" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.conv1) is nn.Conv1d


class Twin(nn.Module):
    """PointNet without norm out of nn.Conv2d and nn.MaxPool2d, whose integers the oracle's tests prove."""

    def __init__(self, model: PointNet, points: int) -> None:
        super().__init__()
        for name, layer in model.named_children():
            if isinstance(layer, nn.Conv1d):
                conv = nn.Conv2d(layer.in_channels, layer.out_channels, (1, 1))
                conv.weight.data, conv.bias.data = layer.weight.data[:, :, None].clone(), layer.bias.data.clone()
                layer = conv
            self.add_module(name, copy.deepcopy(layer))
        self.pool = nn.MaxPool2d((1, points))

    def forward(self, x):
        for name in ("conv1", "conv2", "conv3", "conv4"):
            x = F.relu(self.get_submodule(name)(x))
        x = F.relu(self.pool(self.conv5(x))).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


@pytest.mark.parametrize("head", HEADS)
def test_integer_steps_are_those_of_two_dimensions_bit_for_bit(head):
    model = make(3, norm=False)
    twin = Twin(model, 16)
    names = [n for n in HEADS[head] if not n.startswith("bn")]
    runs = []
    for net in (model, twin):
        ezo.convert_(net, head=names, precision="int8")
        opt = ezo.ElasticZOInt8(net, queries=2, seed=5, mode="stacked" if net is model else "sequential")
        losses = []
        for step in range(3):
            x, y = integer_clouds(seed=step)
            x = x if net is model else ezo.Int8Tensor(x.values.unsqueeze(2), x.exponent)
            losses.append(opt.train_step(x, y).item())
        runs.append((losses, dict(net.state_dict())))
    assert runs[0][0] == runs[1][0] and len(set(runs[0][0])) == 3
    for (name, a), b in zip(runs[0][1].items(), runs[1][1].values(), strict=True):
        assert torch.equal(a.flatten(), b.flatten()), name
    start = ezo.convert_(make(3, norm=False), head=names, precision="int8").state_dict()
    assert not any(torch.equal(v, runs[0][1][k]) for k, v in start.items() if k.endswith("weight"))


def test_integer_head_is_an_integer_of_layers():
    model = ezo.convert_(make(norm=False), head=2, precision="int8")
    assert model._ezo_plan.head == ("fc2", "fc3")
    with pytest.raises(NotImplementedError, match=r"conv5 \(Conv1d\).*cut"):
        ezo.convert_(make(norm=False), head=4, precision="int8")


def test_integers_learn_the_two_class_problem():
    model = ezo.convert_(make(2, norm=False), head=2, precision="int8")
    opt = ezo.ElasticZOInt8(model, seed=0)
    for step in range(40):
        opt.train_step(*integer_clouds(16, seed=step))
    x, y = integer_clouds(64, seed=1000)
    accuracy = (model(x).values.int().argmax(1) == y).float().mean()
    assert accuracy > 0.9


def test_unconverted_integers_are_a_float_pointnet_again():
    model = ezo.convert_(make(norm=False), head=1, precision="int8")
    ezo.unconvert_(model)
    assert type(model.conv5) is nn.Conv1d and model.conv5.weight.dtype == torch.float32
    weight = make(norm=False).conv5.weight
    assert (model.conv5.weight - weight).abs().max() <= weight.abs().max() / 64
    assert model(clouds()[0]).shape == (8, 4)

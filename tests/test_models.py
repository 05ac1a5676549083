"""The example models: shapes, parameters, initial weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ezo_kernels.models import MLP, LeNet5


def test_lenet_has_the_published_parameters():
    model = LeNet5()
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in model.named_children()}
    assert counts == {"conv1": 156, "conv2": 2416, "fc1": 94200, "fc2": 10164, "fc3": 850}
    assert sum(counts.values()) == 107_786


def test_lenet_is_relu_then_pool():
    model = LeNet5(generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 1, 28, 28)
    h = F.max_pool2d(F.relu(model.conv1(x)), 2)
    assert h.shape == (3, 6, 14, 14)
    h = F.max_pool2d(F.relu(model.conv2(h)), 2)
    assert h.shape == (3, 16, 7, 7)
    h = F.relu(model.fc2(F.relu(model.fc1(h.flatten(1)))))
    assert torch.equal(model(x), model.fc3(h))


def test_classes():
    assert LeNet5(classes=7)(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize("make", [LeNet5, lambda generator: MLP(784, 256, 128, 10, generator=generator)])
def test_initial_weights_are_kaiming_and_the_generator_decides_them(make):
    model, again, other = (make(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.dim() == 1:
            assert not p.any()
            continue
        assert not torch.equal(p, r)
        want = math.sqrt(2 / p[0].numel())
        # The sample deviation of n normals is within 5 / sqrt(2 n) of the true one, but for one case in a million.
        assert abs(p.std().item() / want - 1) < 5 / math.sqrt(2 * p.numel()), name


def test_mlp_names_its_layers_and_flattens():
    model = MLP(12, 5, 3)
    assert [name for name, _ in model.named_children()] == ["fc1", "fc2"]
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(model(x), model.fc2(F.relu(model.fc1(x.flatten(1)))))
    assert MLP(12, 3)(x).shape == (4, 3)


@pytest.mark.parametrize("widths", [(), (3,), (3, 0), (3, -1, 2)])
def test_mlp_refuses_widths(widths):
    with pytest.raises(ValueError, match="at least two widths"):
        MLP(*widths)

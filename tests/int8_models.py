"""Nets, data and helpers that the tests of the integers share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import Int8Tensor


def ints(shape, seed: int, low: int = -127, high: int = 127) -> torch.Tensor:
    """int8 by a formula that no library's version can move."""
    n = torch.Size(shape).numel()
    values = [(((i + 1) * 2654435761 + seed * 40503) % 2**32 >> 7) % (high - low + 1) + low for i in range(n)]
    return torch.tensor(values, dtype=torch.int8).view(shape)


def overwrite(model: nn.Module, exponents: dict[str, int] | None = None) -> nn.Module:
    """Parameters of a converted model by a formula: nothing of them depends on floats."""
    for i, (name, p) in enumerate(sorted(model.named_parameters())):
        reach = 100 if name.endswith("weight") else 60
        p.data.copy_(ints(p.shape, i, -reach, reach))
    for name, buffer in model.named_buffers():
        if exponents and name in exponents:
            buffer.fill_(exponents[name])
        elif not exponents:
            buffer.fill_(-9 if name.startswith("weight", name.rfind(".") + 1) else -8)
    return model


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.fc1, self.fc2 = nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv(x), 2)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


TINY_LAYERS = [("conv", "conv"), "pool", "relu", "flatten", ("linear", "fc1"), "relu", ("linear", "fc2")]
#: So that a bias is shifted to the left (conv: from -6 to about -13) and to the right (fc1).
TINY_EXPONENTS = {
    "conv.weight_exponent": -8, "conv.bias_exponent": -6, "fc1.weight_exponent": -9, "fc1.bias_exponent": -20,
    "fc2.weight_exponent": -7, "fc2.bias_exponent": -7,
}  # fmt: skip


def tiny(head=()) -> nn.Module:
    return overwrite(ezo.convert_(Tiny(), head=list(head), precision="int8"), TINY_EXPONENTS)


def tiny_batch(seed: int = 0, rows: int = 3):
    x = Int8Tensor(ints((rows, 2, 6, 6), 100 + seed, -128), torch.tensor([-5], dtype=torch.int32))
    return x, torch.arange(seed, seed + rows) % 4


def lenet(head=()) -> nn.Module:
    model = ezo.models.LeNet5(generator=torch.Generator().manual_seed(0))
    return overwrite(ezo.convert_(model, head=list(head), precision="int8"))


def lenet_batch(rows: int = 8, seed: int = 0):
    """Blobs in a place that tells the class, over noise: all by arithmetic."""
    y = (torch.arange(rows) * 7 + 3 * seed) % 10
    x = ints((rows, 1, 28, 28), seed, -20, 20)
    for row, label in zip(x, y.tolist(), strict=True):
        row[0, 2 * label : 2 * label + 6, 2 * label : 2 * label + 6] += 90
    return Int8Tensor(x, torch.tensor([-5], dtype=torch.int32)), y


LENET_HEADS = [(), ("fc3",), ("fc2", "fc3")]


class Residual(nn.Module):
    """A path beside a convolution, both kinds of average, modules and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.pool, self.last = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = self.pool(F.relu(x + self.conv(x)))
        return self.fc(torch.flatten(self.last(x), 1))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def steps(opt, n: int, batch=lenet_batch, rows: int = 8, first: int = 0):
    return [opt.train_step(*batch(seed=i, rows=rows)).item() for i in range(first, first + n)]


# ---- of single operators


SEED, STEP, SITE = 3, 5, 0xFEDC_BA98


def randint(*shape, seed=0, low=-127, high=127):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def exponents(*values):
    return torch.tensor(values, dtype=torch.int32)


def given(groups, *shape, seed=0, device="cpu"):
    """x with other exponents and another reach in each group, -128 among its values."""
    x = randint(groups, *shape, seed=seed, low=-128)
    for g in range(groups):
        x[g] >>= g % 3
    return Int8Tensor(x.flatten(0, 1).to(device), exponents(*(-5 - g for g in range(groups))).to(device))

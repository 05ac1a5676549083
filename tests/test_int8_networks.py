"""Networks that no other test has, drawn by a seed: steps against sums in fp64, and alike however they run.

Strided, dilated, grouped and pointwise convolutions, averages with padding, sums of two paths, layers without a bias, points,
exponents at their ends, inputs of one value, batches of one.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import Int8Tensor
from tests import int8_oracle as oracle
from tests.int8_models import exponents, randint, same, state

KINDS = ("residual", "mlp", "points")
HEADS = {
    "residual": [["fc1", "fc2"], ["fc2"]],
    "mlp": [["f.2", "f.3"], ["f.0", "f.1", "f.2", "f.3"]],
    "points": [["f2"], ["f1", "f2"]],
}


class Drawn(nn.Module):
    def __init__(self, kind: str, rng: random.Random) -> None:
        super().__init__()
        self.kind = kind

        def bias() -> bool:
            return rng.random() < 0.6

        if kind == "residual":
            self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=bias())
            self.c1 = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, bias=bias())
            self.c2 = nn.Conv2d(12, 12, 3, padding=2, dilation=2, bias=bias())
            self.down = nn.Conv2d(8, 12, 1, stride=2, bias=bias())
            self.pool, self.last = nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d((2, 1))
            self.fc1, self.fc2 = nn.Linear(24, 7, bias=bias()), nn.Linear(7, 4, bias=bias())
        elif kind == "mlp":
            self.f = nn.ModuleList(nn.Linear(a, b, bias=bias()) for a, b in ((13, 9), (9, 9), (9, 5), (5, 4)))
        else:
            self.c1, self.c2 = nn.Conv1d(3, 8, 1, bias=bias()), nn.Conv1d(8, 10, 3, stride=2, padding=1, bias=bias())
            self.f1, self.f2 = nn.Linear(10, 6, bias=bias()), nn.Linear(6, 4, bias=bias())

    def forward(self, x):
        if self.kind == "residual":
            x = F.relu(self.stem(x))
            out = self.c2(F.relu(self.c1(x)))
            out += self.down(x)
            x = self.last(self.pool(torch.relu(out))).flatten(1)
            return self.fc2(F.relu(self.fc1(x)))
        if self.kind == "mlp":
            h = self.f[0](x)
            h = self.f[1](F.relu(h)) + h
            return self.f[3](F.relu(self.f[2](h)))
        x = F.relu(torch.amax(self.c2(F.relu(self.c1(x))), 2))
        return self.f2(F.relu(self.f1(x)))


def rounded(x: torch.Tensor, n: int) -> torch.Tensor:
    """To nearest, halves away from zero; int64."""
    x = x.to(torch.int64)
    return torch.sign(x) * ((x.abs() + ((1 << n) >> 1)) >> n) if 0 < n < 60 else x * (n == 0)


class Reference(nn.Module):
    """The forward of one group by its definition: ``weights`` name -> (values int64, exponent, bias or None, its exponent)."""

    def __init__(self, net: Drawn, weights: dict) -> None:
        super().__init__()
        self.net, self.weights = net, weights

    @staticmethod
    def requantised(acc, s):
        shift = max(0, int(acc.abs().max()).bit_length() - 7)
        return rounded(acc, shift).clamp(-127, 127), s + shift

    def layer(self, name, x, s):
        w, s_w, b, s_b = self.weights[name]
        module, values, w = self.net.get_submodule(name), x.double(), w.double()
        if isinstance(module, nn.Linear):
            acc = values @ w.t()
        else:
            how = (module.stride, module.padding, module.dilation, module.groups)
            acc = (F.conv2d if w.dim() == 4 else F.conv1d)(values, w, None, *how)
        acc = acc.to(torch.int64)
        if b is not None:
            k = s_b - s - s_w
            moved = b << min(k, 22) if k >= 0 else rounded(b, -k)
            acc = acc + moved.view(-1, *[1] * (acc.dim() - 2))
        return self.requantised(acc, s + s_w)

    def added(self, a, s_a, b, s_b):
        low = max(min(s_a, s_b), max(s_a, s_b) - 16)
        parts = [v << s - low if s >= low else rounded(v, low - s) for v, s in ((a, s_a), (b, s_b))]
        return self.requantised(parts[0] + parts[1], low)

    @staticmethod
    def average(x, kernel, stride, padding):
        n = kernel[0] * kernel[1]
        total = (F.avg_pool2d(x.double(), kernel, stride, padding) * n).round().to(torch.int64)
        return torch.sign(total) * ((2 * total.abs() + n) // (2 * n))

    def forward(self, x, s):
        layer = self.layer
        if self.net.kind == "residual":
            x, s = layer("stem", x, s)
            x = x.clamp(min=0)
            h, s_h = layer("c1", x, s)
            x, s = self.added(*layer("c2", h.clamp(min=0), s_h), *layer("down", x, s))
            x = self.average(x.clamp(min=0), (3, 3), 2, 1)
            x = self.average(x, (x.shape[2] // 2, x.shape[3]), (x.shape[2] // 2, x.shape[3]), 0).flatten(1)
            x, s = layer("fc1", x, s)
            return layer("fc2", x.clamp(min=0), s)
        if self.net.kind == "mlp":
            h, s = layer("f.0", x, s)
            h, s = self.added(*layer("f.1", h.clamp(min=0), s), h, s)
            h, s = layer("f.2", h, s)
            return layer("f.3", h.clamp(min=0), s)
        x, s = layer("c1", x, s)
        x, s = layer("c2", x.clamp(min=0), s)
        x, s = layer("f1", x.amax(2).clamp(min=0), s)
        return layer("f2", x.clamp(min=0), s)


def drawn(seed: int):
    """A network with odd exponents, a batch, a recipe and a head."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    kind = KINDS[seed % 3]
    net = Drawn(kind, rng)
    rows = rng.choice([1, 2, 5])
    shape = {
        "residual": (rows, 3, 16, rng.choice([12, 16, 20])),
        "mlp": (rows, 13),
        "points": (rows, 3, rng.choice([7, 33])),
    }
    values = rng.choice([randint(*shape[kind], seed=seed, low=-128), *(torch.full(shape[kind], v) for v in (0, -128))])
    x = Int8Tensor(values.to(torch.int8), exponents(rng.choice([-64, -7, 0, 20, 64])))
    recipe = dict(
        r_max=rng.choice([1, 3, 127]), p_zero=rng.choice([0.0, 0.5, 0.9]), bits=rng.choice([-2, 1, 7]), seed=seed,
        queries=rng.choice([1, 2, 3]), rounding=rng.choice(["nearest", "pseudo"]), fraction_bits=rng.choice([0, 8]),
    )  # fmt: skip
    head = rng.choice([[], *HEADS[kind]])
    model = ezo.convert_(copy.deepcopy(net), head=head, precision="int8")
    for _, buffer in model.named_buffers():
        buffer.fill_(rng.choice([-64, -9, -9, -5, 0, 30]))
    return net, model, x, torch.randint(0, 4, (rows,)), recipe


@pytest.mark.parametrize("seed", range(24))
def test_a_step_of_a_drawn_network(seed):
    net, model, x, y, recipe = drawn(seed)
    before, found = state(model), []
    for mode in ("stacked", "sequential"):
        for strategy in ("buffer", "twice", "auto"):
            own = copy.deepcopy(model)
            opt = ezo.ElasticZOInt8(own, mode=mode, strategy=strategy, head_bits=3, **recipe)
            opt.train_step(x, y)
            found.append((opt.losses.tolist(), opt.g.tolist(), state(own)))
            memory = opt.memory()
            assert memory["planned_bytes"] == memory["measured_bytes"]
    losses, g, after = found[0]
    assert all(other[:2] == (losses, g) and same(other[2], after) for other in found)

    names = sorted(n for n, _ in net.named_parameters())
    sites = {s.names[0]: s.site for s in model._ezo.manifest}
    assert all(names[site] == name for name, site in sites.items())
    how = dict(key=oracle.fold(seed, 0), p_zero=recipe["p_zero"], r_max=recipe["r_max"])

    def z(name, query):
        shape = before[name].shape
        places = oracle.places(tuple(shape), len(shape) > 2)
        return torch.tensor([oracle.z_at(*at, site=sites[name], query=query, **how) for at in places]).view(shape)

    def of_group(name, query, sign):
        if name not in before:
            return None
        w = before[name].to(torch.int64)
        return (w + sign * z(name, query)).clamp(-127, 127) if name in sites else w

    for group in range(len(losses) if sites else 0):
        query, sign = group // 2, 1 - 2 * (group % 2)
        weights = {}
        for layer in {n.rpartition(".")[0] for n in names}:
            weights[layer] = (
                of_group(f"{layer}.weight", query, sign), int(before[f"{layer}.weight_exponent"]),
                of_group(f"{layer}.bias", query, sign), int(before.get(f"{layer}.bias_exponent", 0)),
            )  # fmt: skip
        logits, s = Reference(net, weights)(x.values.to(torch.int64), int(x.exponent))
        if -40 < s < 25:  # beyond, the loss of the oracle is not shifted by as little as the contract's
            assert losses[group] == oracle.cross_entropy(logits.tolist(), s, y.tolist(), recipe["fraction_bits"])
    shift = max(0, recipe["r_max"].bit_length() - recipe["bits"])
    for name in sites:
        total = sum(g[q] * z(name, q) for q in range(recipe["queries"])).flatten().tolist()
        moved = [oracle.round_shift(t, shift, recipe["rounding"]) for t in total]
        want = [oracle.clamp(w - m) for w, m in zip(before[name].flatten().tolist(), moved, strict=True)]
        assert after[name].flatten().tolist() == want, name


def test_training_is_alike_on_any_number_of_threads():
    found = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            _, model, x, y, recipe = drawn(15)
            opt = ezo.ElasticZOInt8(model, **recipe)
            for _ in range(3):
                opt.train_step(x, y)
            found.append(state(model))
    finally:
        torch.set_num_threads(threads)
    assert same(*found)


def test_a_short_last_batch_has_a_plan_of_its_own_in_any_network():
    for seed in range(3):
        net, model, _, _, recipe = drawn(seed)
        shape = {"residual": (3, 16, 16), "mlp": (13,), "points": (3, 9)}[net.kind]
        opt = ezo.ElasticZOInt8(model, **recipe)
        for rows in (7, 7, 3):
            opt.train_step(Int8Tensor(randint(rows, *shape, seed=rows), exponents(-7)), torch.arange(rows) % 4)
            memory = opt.memory()
            assert memory["planned_bytes"] == memory["measured_bytes"]
        assert len(opt._plans) == 2

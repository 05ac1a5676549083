"""Models that have no integer form: each is refused by name, with what to do, and nothing has changed then."""

from __future__ import annotations

import contextlib
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from tests.int8_models import Tiny, ints, state


class Stray(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(4, 2), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.fc(x) * self.scale


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return F.gelu(self.fc(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x))


def with_nan() -> nn.Module:
    model = Tiny()
    model.fc1.weight.data[0, 0] = float("nan")
    return model


def huge() -> nn.Module:
    """The second of two layers: the first one must not be converted by then."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight.data *= 1e30
    return model


def viewed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data.t())
    return model


def normed(undo) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), undo(nn.Linear(4, 4)))


class Squashing(nn.ReLU):
    def forward(self, x):
        return torch.sigmoid(x)


def pooled(pool: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, 1), pool)


UNFIT = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 0, r"1 \(BatchNorm1d\).*fold"),
    "batch norm 2d": (lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)), 0, r"1 \(BatchNorm2d\).*fold"),
    "sigmoid": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), 0, r"1 \(Sigmoid\).*ReLU"),
    "gelu": (Functional, 0, "gelu"),
    "stray": (Stray, 0, r"the model \(Stray\)"),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), 0, r"1 \(Dropout\).*rate"),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 1, 1)), 0, r"0 \(Conv3d\).*take it out"),
    "conv1d in the head": (lambda: nn.Sequential(nn.Conv1d(1, 1, 1)), 1, r"0 \(Conv1d\).*cut"),
    "circular": (lambda: nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")), 0, "0 .*'circular'"),
    "tied": (Tied, 0, r"'one.weight' and 'two.weight'"),
    "conv in the head": (Tiny, 3, r"conv \(Conv2d\).*cut"),
    "nan": (with_nan, 0, r"fc1 \(Linear\).*not finite"),
    "terms": (lambda: nn.Sequential(nn.Linear(99_337, 1)), 0, r"0 \(Linear\).*99337.*99336"),
    "reflect": (lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")), 0, "0 .*'reflect'"),
    "even same": (lambda: nn.Sequential(nn.Conv2d(1, 1, 2, padding="same")), 0, "0 .*'same'"),
    "huge": (huge, 0, r"1 \(Linear\): its weight reaches .*127 \* 2\^64"),
    "viewed": (viewed, 0, "'0.weight' and '1.weight' are one parameter"),
    "no outputs": (lambda: nn.Sequential(nn.Linear(4, 0)), 0, r"0 \(Linear\): its weight \(0, 4\) is empty"),
    "weight norm": (
        lambda: normed(nn.utils.weight_norm),
        0,
        r"1 \(Linear\): its weight is computed from.*remove_weight_norm",
    ),
    "spectral norm": (
        lambda: normed(nn.utils.spectral_norm),
        0,
        r"1 \(Linear\): its weight is computed from.*weight_orig",
    ),
    "float64": (
        lambda: nn.Sequential(nn.Linear(2, 2).double()),
        0,
        r"0 \(Linear\): its weight is torch.float64.*float\(\)",
    ),
    "ceil": (lambda: pooled(nn.MaxPool2d(2, ceil_mode=True)), 0, r"1 \(MaxPool2d\): no dilation, ceil_mode"),
    "dilated pool": (lambda: pooled(nn.MaxPool2d(2, dilation=2)), 0, r"1 \(MaxPool2d\): no dilation"),
    "average of what is there": (
        lambda: pooled(nn.AvgPool2d(3, padding=1, count_include_pad=False)),
        0,
        r"1 \(AvgPool2d\):.*count_include_pad=True",
    ),
    "divisor": (lambda: pooled(nn.AvgPool2d(3, divisor_override=2)), 0, r"1 \(AvgPool2d\):.*divisor_override"),
    "flattened rows": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)), 0, r"1 \(Flatten\):.*start_dim=1"),
    "subclass": (
        lambda: nn.Sequential(nn.Linear(4, 4), Squashing()),
        0,
        r"forward of 1 \(Squashing\) calls sigmoid.*use one of",
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(3, 4)), 0, r"0 \(Embedding\)"),
}


class InPlace(nn.Module):
    """Two layers and what is called between them."""

    def __init__(self, call) -> None:
        super().__init__()
        self.a, self.b, self.relu, self.call = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True), call

    def forward(self, x):
        return self.call(self, self.a(x), x)


def adds(h, x):
    keep = h
    h += x
    return h + keep


def of_a_view(h):
    flat = h.flatten(1)
    h = F.relu_(h)
    return flat + h


def sized(self, h):
    h = self.relu(h)
    n = h.size(0)
    n += 0
    return h.view(n, -1)


MISSED = {
    "read again": (
        lambda self, h, x: self.b(self.relu(h)) + h,
        r"the forward changes a in place \(relu \(ReLU\)\), and add",
    ),
    "returned": (
        lambda self, h, x: (torch.relu_(h), h)[1],
        r"changes a in place \(relu_\), and output reads that again",
    ),
    "ignored": (
        lambda self, h, x: (F.relu(self.b(h), True), h)[1],
        r"b in place \(F.relu\(inplace=True\)\), .*is not used",
    ),
    "another name": (lambda self, h, x: adds(h, x), r"changes a in place \(\+=\), and add reads"),
    "a view": (lambda self, h, x: of_a_view(h), r"changes a in place \(relu_\), and add reads"),
}
for _name, (_call, _match) in MISSED.items():
    UNFIT[f"in place, {_name}"] = (lambda call=_call: InPlace(call), 0, _match)


@pytest.mark.filterwarnings("ignore:Initializing zero-element", "ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("case", UNFIT)
def test_a_model_without_an_integer_form_is_refused_by_name(case):
    make, head, match = UNFIT[case]
    model = make()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    classes = [type(m) for m in model.modules()]
    with pytest.raises(NotImplementedError, match=match):
        ezo.convert_(model, head=head, precision="int8")
    assert [type(m) for m in model.modules()] == classes and [p.requires_grad for p in model.parameters()] == flags
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items())


FOUND = {
    "its result": lambda self, h, x: self.b(self.relu(h)),
    "a sum's": lambda self, h, x: self.relu(operator.iadd(self.b(self.relu(h)), x)),
    "a size": lambda self, h, x: sized(self, h),
    "branches that each begin with a relu": lambda self, h, x: self.b(self.relu(h)) + self.b(torch.relu(h)),
    "an older size": lambda self, h, x: self.relu(h).view(h.size(0), -1),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_returns_all_that_it_changes_in_place_is_accepted(case):
    """As a residual block does."""
    model = ezo.convert_(InPlace(FOUND[case]), head=0, precision="int8")
    if "size" not in case:
        ezo.ElasticZOInt8(model).train_step(ints((3, 4), 0), torch.zeros(3, dtype=torch.int64))
    batch = ezo.quantize(torch.ones(3, 4))
    for _ in range(2):
        model(batch)


class Keeping(nn.Module):
    """Counts its calls and keeps its features, so that a trace leaves its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.features, self.calls, self.seen = nn.Linear(4, 4), nn.Linear(4, 2), None, 0, []
        self.register_buffer("counter", torch.zeros(1))
        self.register_buffer("last", None)

    def forward(self, x):
        self.calls += 1
        self.counter += 1
        self.last = self.counter.clone()
        self.features = self.a(x)
        self.seen.append(self.features)
        return self.b(self.features)


@pytest.mark.parametrize("how", [{"precision": "int8"}, {"head": 1}, {"head": 1, "sample": torch.ones(2, 4)}], ids=str)
@pytest.mark.parametrize("refused", [False, True])
def test_a_conversion_leaves_nothing_of_its_trace(how, refused):
    model = Keeping()
    if refused:
        model.sub = nn.LSTM(2, 2) if "precision" not in how else nn.BatchNorm1d(2)
    keys, seen = set(vars(model)), model.seen
    with pytest.raises(NotImplementedError) if refused else contextlib.nullcontext():
        ezo.convert_(model, **how)
    assert set(vars(model)) - {name for name in vars(model) if name.startswith("_ezo")} == keys
    assert model.features is None and model.last is None and model.calls == 0 == model.counter.item()
    assert model.seen is seen == []
    pickle.dumps(model)


class Making(nn.Module):
    """Makes a layer and a parameter in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mid, self.b = nn.Linear(4, 4), None, nn.Linear(4, 2)

    def forward(self, x):
        h = torch.relu(self.a(x))
        if self.mid is None:
            self.mid, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        return self.b(torch.relu(self.mid(h)) * self.scale)


def test_what_a_first_forward_makes_is_trained():
    model = ezo.convert_(Making(), head=1, sample=torch.ones(2, 4))
    assert model.mid.weight in set(ezo.ElasticZO(model).trunk) and "mid" not in vars(model)
    assert [s.names[0] for s in model._ezo.manifest].count("scale") == 1


@pytest.mark.parametrize("leaf", ["bias", "weight"])
def test_half_a_frozen_layer_is_refused_by_name(leaf):
    plain = Tiny()
    getattr(plain.fc1, leaf).requires_grad_(False)
    with pytest.raises(NotImplementedError, match="fc1 .Linear. is frozen in half"):
        ezo.convert_(plain, precision="int8")
    assert type(plain.fc1) is nn.Linear and plain.fc1.weight.dtype == torch.float32
    ezo.convert_(plain, head=["fc1", "fc2"], precision="int8")  # in the head each parameter is on its own


def test_all_problems_are_listed_at_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.BatchNorm1d(4))
    with pytest.raises(NotImplementedError, match=r"(?s)1 \(Sigmoid\).*2 \(BatchNorm1d\)"):
        ezo.convert_(model, precision="int8")


def test_the_longest_sum_is_accepted():
    model = ezo.convert_(nn.Sequential(nn.Linear(99_336, 1)), precision="int8")
    opt = ezo.ElasticZOInt8(model)
    opt.train_step(torch.full((1, 99_336), -128, dtype=torch.int8), torch.zeros(1, dtype=torch.int64))


def test_a_dropout_of_rate_zero_is_no_obstacle():
    """The advice for another rate is to set it to zero."""
    model = ezo.convert_(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 2)), precision="int8")
    ezo.ElasticZOInt8(model).train_step(ints((3, 4), 0), torch.zeros(3, dtype=torch.int64))

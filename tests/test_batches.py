"""Batches and outputs of any structure: stacked where they can be, one group at a time where not, never mixed."""

from __future__ import annotations

import warnings
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.optim.batches import parts_of
from tests import zoo


class WithLoss(nn.Module):
    """A model that computes its own loss; ``wrap`` makes its output."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.fc, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x, labels):
        logits = self.fc(x)
        return self.wrap(F.cross_entropy(logits, labels), logits)


def data(rows: int = 5):
    g = torch.Generator().manual_seed(2)
    return torch.randn(rows, 4, generator=g), torch.randint(0, 3, (rows,), generator=g)


def one_step(model, x, y, mode, **kwargs):
    opt = ezo.ElasticZO(ezo.convert_(model), seed=1, eps=1e-2, mode=mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.train_step(x, y, **kwargs)
    return opt, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda loss, logits: SimpleNamespace(loss=loss, logits=logits), "SimpleNamespace"),
        (lambda loss, logits: {"loss": loss, "logits": logits}, r"shape \(\)"),
    ],
)
def test_an_output_that_cannot_be_split_is_run_one_group_at_a_time(wrap, says):
    x, y = data()
    pick = lambda out, t: out["loss"] if isinstance(out, dict) else out.loss  # noqa: E731
    torch.manual_seed(0)
    opt, said = one_step(WithLoss(wrap), x, y, "auto", loss_fn=pick, labels=y)
    torch.manual_seed(0)
    want, _ = one_step(WithLoss(wrap), x, y, "sequential", loss_fn=pick, labels=y)
    assert opt.mode == "sequential" and len(said) == 1 and opt.g.item() != 0
    assert torch.equal(opt.losses, want.losses)
    with pytest.raises(ValueError, match=says + ".*sequential"):
        one_step(WithLoss(wrap), x, y, "stacked", loss_fn=pick, labels=y)


@dataclass
class Fields(OrderedDict):
    """Keys that are attributes, too, as those of Hugging Face's ModelOutput, which takes no mapping."""

    logits: torch.Tensor
    loss: float | None = None

    def __post_init__(self) -> None:
        self["logits"] = self.logits


def filled(output, logits):
    output[0] = logits
    return output


@pytest.mark.parametrize(
    "make", [dict, OrderedDict, lambda: defaultdict(list)], ids=["dict", "OrderedDict", "defaultdict"]
)
def test_an_output_by_number_is_split_into_its_groups(make):
    class Numbered(nn.Linear):
        def forward(self, x):
            return filled(make(), super().forward(x))

    (x, y), found = data(), []
    for mode in ("stacked", "sequential"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), Numbered(4, 3))
        opt, _ = one_step(model, x, y, mode, loss_fn=lambda out, y: F.cross_entropy(out[0], y))
        found.append(opt.losses)
    assert opt.g.item() != 0 and torch.equal(*found)


def test_a_group_of_a_mapping_is_of_its_class():
    logits = torch.arange(4.0).view(4, 1)
    for output in (Fields(logits), filled(OrderedDict(), logits), filled(defaultdict(list), logits)):
        for part, rows in zip(parts_of(output, 2), logits.chunk(2), strict=True):
            assert type(part) is type(output) and [*part] == [*output] and torch.equal(*part.values(), rows)
            assert not isinstance(part, Fields) or torch.equal(part.logits, rows)
            assert not isinstance(part, defaultdict) or part["new"] == []


class Batch(dict):
    """A mapping of a class of its own, as collators make."""


@pytest.mark.parametrize("kind", [UserDict, Batch])
def test_mappings_are_keyword_arguments(kind):
    x, y = data()

    class Plain(nn.Linear):
        def forward(self, features):
            return super().forward(features)

    torch.manual_seed(0)
    opt, _ = one_step(nn.Sequential(Plain(4, 3))[0], kind(features=x), y, "stacked")
    torch.manual_seed(0)
    want, _ = one_step(nn.Sequential(Plain(4, 3))[0], {"features": x}, y, "stacked")
    assert opt.g.item() != 0 and torch.equal(opt.losses, want.losses)


class Recurrent(nn.Module):
    """The classifier reads the hidden state, whose first dimension is layers, not rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(7, 8), nn.LSTM(8, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, ids):
        return self.out(self.rnn(self.embed(ids))[1][0][-1])


@pytest.mark.parametrize("rows", [4, 5])
def test_a_recurrent_head_is_run_one_group_at_a_time(rows):
    ids, y = torch.arange(6 * rows).view(rows, 6) % 7, data(rows)[1]
    losses = []
    for mode in ("auto", "sequential"):
        torch.manual_seed(0)
        model = ezo.convert_(Recurrent(), head=["rnn", "out"])
        opt = ezo.ElasticZO(model, seed=1, eps=1e-2, mode=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.train_step(ids, y)
        assert opt.mode == "sequential"
        losses.append(opt.losses)
    assert torch.equal(*losses)


class Positional(nn.Module):
    """Dropout of a tensor without rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.scale = nn.Linear(4, 3), nn.Dropout(0.5), nn.Dropout(0.5)
        self.register_buffer("position", torch.arange(4.0)[None])

    def forward(self, x):
        return self.fc(x + self.drop(self.position)) * (1 + self.scale(x.new_ones(())))


def test_dropout_without_rows_is_run_one_group_at_a_time():
    x, y = data()
    torch.manual_seed(0)
    opt, said = one_step(Positional(), x, y, "auto")
    assert opt.mode == "sequential" and "Dropout" in said[0]
    opt.param_groups[0]["eps"] = 1e-6
    opt.train_step(x, y)
    assert abs(opt.losses[0] - opt.losses[1]) < 1e-3  # one mask for both signs
    with pytest.raises(ValueError, match="Dropout.*sequential"):
        one_step(Positional(), x, y, "stacked")


class Auxiliary(nn.Module):
    """Gives a scalar beside its rows, as a router's balance loss."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.scale, (x * self.scale).pow(2).mean()


class Balanced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.route, self.fc = Auxiliary(), nn.Linear(4, 3)

    def forward(self, x):
        x, balance = self.route(x)
        return self.fc(x) + balance * 1e-3


def test_a_scalar_of_one_group_is_not_given_to_the_others():
    x, y = data()
    opt, said = one_step(Balanced(), x, y, "auto")
    assert opt.mode == "sequential" and "Auxiliary" in said[0]


class Chosen(nn.Module):
    """A layer that sees some rows of a batch, as an expert does."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer, self.o = layer, nn.Linear(8, 3)

    def forward(self, x, keep):
        h = self.layer(x[keep]).flatten(1)
        return self.o(torch.zeros(len(x), 8).index_put((keep.nonzero()[:, 0],), h))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Linear(8, 8), torch.randn(4, 8)),
        (lambda: zoo.Conv1D(8, 8), torch.randn(4, 8)),
        (lambda: nn.Conv1d(2, 2, 3, padding=1), torch.randn(4, 2, 4)),
        (lambda: nn.Conv2d(2, 2, 3, padding=1), torch.randn(4, 2, 2, 2)),
        (lambda: nn.Embedding(9, 8), torch.randint(9, (4,))),
    ],
    ids=["Linear", "Conv1D", "Conv1d", "Conv2d", "Embedding"],
)
def test_rows_that_were_chosen_are_run_one_group_at_a_time(layer, x):
    """A gate that is perturbed may choose more rows of one group than of another, and some would get the other's z."""
    keep, y = torch.tensor([True, False, True, False]), torch.tensor([0, 1, 2, 0])
    made, name = lambda: Chosen(layer()), type(layer()).__name__
    torch.manual_seed(0)
    opt, said = one_step(made(), x, y, "auto", keep=keep)
    torch.manual_seed(0)
    want, _ = one_step(made(), x, y, "sequential", keep=keep)
    assert opt.mode == "sequential" and len(said) == 1 and f"layer: {name}" in said[0] and "4 rows" in said[0]
    assert torch.equal(opt.losses, want.losses) and opt.g.item() != 0
    with pytest.raises(ValueError, match=rf"layer: {name}.*no multiple of the 8 .*sequential"):
        one_step(made(), x, y, "stacked", keep=keep)
    opt, said = one_step(made(), x, y, "stacked", keep=torch.zeros(4, dtype=torch.bool) | True)
    assert opt.mode == "stacked" and not said


class Pairs(nn.Module):
    """Scores of two rows by each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x):
        return self.o(torch.relu(self.a(x)).view(-1, 8))


def test_rows_that_are_joined_are_stacked_as_a_batch_of_pairs():
    """As rows of their own they look like rows that were chosen."""
    x, y = torch.randn(8, 8), torch.tensor([0, 1, 2, 0])
    torch.manual_seed(0)
    want, said = one_step(Pairs(), x, y, "auto")
    assert want.mode == "sequential" and "rows chosen or joined" in said[0]
    torch.manual_seed(0)
    opt, said = one_step(Pairs(), x.view(4, 2, 8), y, "auto")
    assert opt.mode == "stacked" and not said
    torch.testing.assert_close(opt.losses, want.losses)

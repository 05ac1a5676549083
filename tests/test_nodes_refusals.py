"""Node perturbation: settings, layers, losses and models that are refused, and that nothing changed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from materialised import randn
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import materialize
from tests.test_nodes import Tokens, optimizer, token_loss
from tests.test_step import batch, bits, lenet, same


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"layers": "fc1"}, TypeError, "list of names"),
        ({"layers": []}, ValueError, "at least one"),
        ({"lr": -1.0}, ValueError, "lr of node_perturbation must be finite and at least 0"),
        ({"eps": 0.0}, ValueError, "eps of node_perturbation must be finite and above 0"),
        ({"damping": 0}, ValueError, "damping of node_perturbation"),
        ({"clip": 0}, ValueError, "clip of node_perturbation must be finite and above 0"),
        ({"clip": "5"}, TypeError, "clip of node_perturbation"),
        ({"layers": ["fc9"]}, ValueError, "no layer 'fc9'; the trunk's linear layers are fc1, fc2"),
        ({"layers": ["conv1", "fc3"]}, NotImplementedError, "'conv1' .*; 'fc3' "),
    ],
    ids=str,
)
def test_settings_that_cannot_be(kwargs, error, words):
    with pytest.raises(error, match=words):
        optimizer(nodes=kwargs)


def test_layers_that_cannot_learn_so():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[1].weight = tied[0].weight
    half = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 2).bfloat16())
    for model, words in ((tied, "the weight of '0' is tied"), (half, "the weight of '0' is torch.bfloat16")):
        with pytest.raises(NotImplementedError, match=words):
            ezo.ElasticZO(ezo.convert_(model, head=1), node_perturbation=ezo.NodePerturbation(["0"]))
    with pytest.raises(TypeError, match="NodePerturbation, got list"):
        ezo.ElasticZO(ezo.convert_(lenet(), head=["fc3"]), node_perturbation=["fc1"])
    with pytest.raises(ValueError, match="nothing named 'fc1'"):
        optimizer(scales={"fc1": 0.3})


@pytest.mark.parametrize("mode", ["auto", "stacked", "sequential"])
def test_steps_that_cannot_be(mode):
    opt = optimizer(mode=mode)
    held = bits(opt.model)
    x, y = batch(6)
    with pytest.raises(NotImplementedError, match="update=False"):
        opt.train_step(x, y, update=False)
    with pytest.raises(ValueError, match="loss of each row"):
        opt.step(lambda: F.cross_entropy(opt.model(x), y))
    with pytest.raises(NotImplementedError, match="<lambda> takes no reduction"):
        opt.train_step(x, y, lambda out, y: F.cross_entropy(out, y))
    weighed = nn.CrossEntropyLoss(weight=torch.arange(1.0, 11.0))
    with pytest.raises(ValueError, match="every row counts alike"):
        opt.train_step(x, y, weighed)
    with pytest.raises(ValueError, match="must give a tensor"):
        opt.train_step(x, y, functools.partial(lambda out, y, reduction="mean": F.cross_entropy(out, y)))
    assert same(held, bits(opt.model)) and opt.step_count == 0
    opt.train_step(x, y)
    assert opt.step_count == 1


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.inner(torch.tanh(self.inner(x))))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_layer_that_runs_twice(mode):
    opt = ezo.ElasticZO(ezo.convert_(Twice(), head=1), node_perturbation=ezo.NodePerturbation(["inner"]), mode=mode)
    with pytest.raises(ValueError, match="inner: a layer whose outputs are perturbed ran twice"):
        opt.train_step(randn(6, 4), torch.arange(6) % 3)


def test_models_whose_rows_depend_on_each_other():
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    mean = nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 3))
    x, y = randn(6, 4), torch.arange(6) % 3
    nodes = ezo.NodePerturbation(["0"])
    opt = ezo.ElasticZO(ezo.convert_(norm, head=["2"]), node_perturbation=nodes)
    with pytest.raises(NotImplementedError, match=r"'1' would take batch statistics"):
        opt.train_step(x, y)
    norm.eval()
    opt.train_step(x, y)
    norm.train()
    norm[1].track_running_stats, norm[1].running_mean, norm[1].running_var = False, None, None
    allowed = ezo.NodePerturbation(["0"], constant_statistics=True)
    with pytest.raises(NotImplementedError, match="keep running statistics"):
        ezo.ElasticZO(norm, node_perturbation=allowed).train_step(x, y)
    opt = ezo.ElasticZO(ezo.convert_(mean, head=["2"]), node_perturbation=nodes, mode="sequential")
    with pytest.raises(ValueError, match="does not treat the rows of a batch apart"):
        opt.train_step(x, y)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_batch_norms_whose_statistics_count_as_constants(mode):
    """The step is the formula with each group's own statistics; they move as in any step, and the modes stay."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    twin, (x, y) = copy.deepcopy(model), (randn(6, 4), torch.arange(6) % 3)
    model[1].requires_grad_(False)
    ezo.convert_(model, head=["3"])
    nodes = ezo.NodePerturbation(["0"], lr=1.0, damping=None, constant_statistics=True)
    opt = ezo.ElasticZO(model, queries=2, node_perturbation=nodes, seed=1, mode=mode)
    opt.train_step(x, y)
    rows, noise = [], [materialize((6, 5), seed=1, step=0, site=model[0].site, query=q) for q in range(2)]
    with torch.no_grad():
        for z in noise:
            for sign in (1, -1):
                h = twin[0](x) + sign * 0.05 * z
                rows.append(F.cross_entropy(twin[3](F.relu(twin[1](h))), y, reduction="none"))
    want = sum(((rows[2 * q] - rows[2 * q + 1]) / 0.1 / 12)[:, None] * noise[q] for q in range(2))
    torch.testing.assert_close(twin[0].bias.detach() - model[0].bias.detach(), want.sum(0), rtol=1e-3, atol=1e-6)
    assert model[1].training and not torch.equal(model[1].running_mean, torch.zeros(5)) and opt.skipped == 0


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_a_first_batch_of_one_row_has_shown_nothing():
    model = nn.Sequential(nn.Linear(4, 4), Centred(), nn.Linear(4, 3))
    own = {"node_perturbation": ezo.NodePerturbation(["0"]), "mode": "sequential"}
    opt = ezo.ElasticZO(ezo.convert_(model, head=["2"]), **own)
    x, y = randn(6, 4), torch.arange(6) % 3
    opt.train_step(x[:1], y[:1])
    opt.train_step(x * float("nan"), y)
    with pytest.raises(ValueError, match="does not treat the rows of a batch apart"):
        opt.train_step(x, y)


class Placed(nn.Module):
    """A layer whose input is a table of positions, not the batch."""

    def __init__(self, rows: int):
        super().__init__()
        self.register_buffer("table", randn(rows, 5))
        self.position, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(x + self.position(self.table).mean(0))


@pytest.mark.parametrize("rows", [8, 1])
def test_a_layer_whose_input_is_not_the_batch(rows):
    own = {"node_perturbation": ezo.NodePerturbation(["position"]), "mode": "sequential"}
    opt = ezo.ElasticZO(ezo.convert_(Placed(rows), head=["out"]), **own)
    with pytest.raises(ValueError, match=f"'position' is given {rows} rows of a batch of 4 and {rows} of one of 2"):
        opt.train_step(randn(4, 4), torch.arange(4) % 3)


def test_masks_of_tokens_and_outputs_that_hold_nothing():
    """As many tokens as rows: a [T, T] mask is no batch."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x, mask):
            x = torch.tanh(self.inner(x))
            return {"logits": self.out((mask @ x).mean(1)), "none": x[:, :0].flatten(1)}

    opt = ezo.ElasticZO(ezo.convert_(Masked(), head=["out"]), node_perturbation=ezo.NodePerturbation(["inner"]))

    def loss(out, y, reduction="mean"):
        return F.cross_entropy(out["logits"], y, reduction=reduction)

    opt.train_step((randn(5, 5, 4), torch.ones(5, 5).tril()), torch.arange(5) % 3, loss)
    assert opt.step_count == 1


def test_what_a_loss_or_a_model_may_not_do_later():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1), nn.Flatten(0))
    opt = ezo.ElasticZO(ezo.convert_(model, head=["1"]), node_perturbation=ezo.NodePerturbation(["0"]))
    with pytest.raises(ValueError, match="the target was broadcast"):
        opt.train_step(randn(6, 5), randn(6, 1), F.mse_loss)
    opt.model.bfloat16()
    with pytest.raises(ValueError, match="no longer float32"):
        opt.train_step(randn(6, 5).bfloat16(), randn(6).bfloat16(), F.mse_loss)


def test_rows_in_another_order_at_the_layer():
    model = Tokens(turned=True)
    model.out.requires_grad_(False)
    opt = ezo.ElasticZO(
        ezo.convert_(model, head=0), node_perturbation=ezo.NodePerturbation(["inner"]), mode="sequential"
    )
    ids = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="in another order at a perturbed layer"):
        opt.train_step(ids, ids, token_loss)

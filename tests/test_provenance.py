"""What a stacked pass knows of whose a tensor is, where rows do not tell, and what it does with errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ezo_kernels as ezo
from tests.test_shared_batch import ROWS, batch, seeded, seen_rows
from tests.tolerance import bits


class Queries(nn.Module):
    """A table of as many rows as the batch, which is no batch."""

    def __init__(self):
        super().__init__()
        self.a, self.f, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.register_buffer("q", torch.randn(ROWS, 8))

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.out(h + (h @ self.f(self.q).T).logsumexp(-1, keepdim=True))


class FirstPosition(nn.Module):
    """Takes one row of what is every row's."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions, self.out = nn.Embedding(11, 16), nn.Embedding(8, 16), nn.Linear(16, 5)

    def forward(self, ids):
        places = self.positions(torch.arange(ids.shape[1], device=ids.device)[None])[0]
        return self.out(torch.tanh(self.tokens(ids) + places).mean(1))


def losses(make, mode, data, dtype=torch.float32, steps=2, **options):
    opt = ezo.ElasticZO(ezo.convert_(seeded(make).to(dtype)), seed=3, mode=mode, **options)
    found = []
    for step in range(steps):
        opt.train_step(*data(step))
        found.append(opt.losses.clone())
    return torch.cat(found), opt.mode


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "shape"), [(Queries, (ROWS, 8)), (FirstPosition, (3, 4))], ids=["table", "positions"])
def test_sixteen_bits_hide_no_wrong_row(make, shape):
    """Their rounding is more than a step changes: the outputs of each group alone tell nothing."""

    def data(step):
        x, y = batch(shape, step)
        return (x.bfloat16() if x.is_floating_point() else x), y

    found, mode = losses(make, "auto", data, torch.bfloat16, eps=1e-2)
    alone, _ = losses(make, "sequential", data, torch.bfloat16, eps=1e-2)
    assert torch.equal(found, alone) and mode == "sequential"


class Writes(nn.Module):
    """Writes into its batch as torch does not count."""

    def __init__(self, how):
        super().__init__()
        self.a, self.how = nn.Linear(8, 5), how

    def forward(self, x):
        if self.how == "data":
            x.data.mul_(0.5)
        else:
            x.numpy()[...] *= 0.5
        return self.a(x)


@pytest.mark.parametrize("how", ["data", "numpy"])
def test_a_batch_that_is_written_without_count_is_copied(how):
    opt = ezo.ElasticZO(ezo.convert_(seeded(lambda: Writes(how))), mode="stacked")
    x, y = batch((ROWS, 8))
    before = x.clone()
    for _ in range(3):
        opt.train_step(x, y)
    assert torch.equal(x, before)


def frozen_first():
    model = nn.Sequential(nn.Linear(67, 130), nn.Tanh(), nn.Linear(130, 5))
    model[0].requires_grad_(False)
    return model


def test_an_error_of_the_loss_is_the_users_and_changes_nothing():
    weights, rows = [], []
    for fails in (False, True):
        model = ezo.convert_(seeded(frozen_first))
        opt = ezo.ElasticZO(model, lr=1e-2, mode="stacked")
        opt.train_step(*batch((3, 67)))
        rows.append(seen_rows(model[0]))
        if fails:
            with pytest.raises(IndexError, match="out of bounds"):
                opt.train_step(batch((3, 67), 1)[0], torch.full((3,), 99))
        for step in (1, 2):
            opt.train_step(*batch((3, 67), step))
        weights.append(bits(model[2].weight))
    assert torch.equal(*weights) and rows == [[3, 3], [3, 3, 3]]


class ByValue(nn.Module):
    """Another way for other values, with a layer that is compiled."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 5)
        self.call = lambda layer, h: layer(h)

    def forward(self, x):
        h = self.a(x) if x.sum() > 0 else self.a(x.flatten(0, 1)).view(-1, 2, 8)
        return self.call(self.b, torch.tanh(h).mean(1))


@pytest.mark.parametrize("what", ["layer", "function"])
def test_what_is_compiled_hides_no_other_way(what):
    def made(compiled):
        model = seeded(ByValue)
        opt = ezo.ElasticZO(ezo.convert_(model), seed=3, eps=1e-2, mode="stacked" if compiled else "sequential")
        if compiled == "layer":
            model.b.compile(backend="eager")
        elif compiled:
            model.call = torch.compile(model.call, backend="eager")
        return opt

    opt, other = made(what), made("")
    for step in range(4):
        x, y = batch((ROWS, 2, 8), step)
        x = -x.abs() if step else x.abs()
        opt.train_step(x, y)
        other.train_step(x, y)
        torch.testing.assert_close(opt.losses, other.losses, rtol=1e-5, atol=1e-6)


def test_a_sparse_batch_is_taken():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 5)

        def forward(self, x):
            return self.a(x.to_dense())

    x, y = batch((ROWS, 8))
    sparse, _ = losses(Sparse, "stacked", lambda step: (x.relu().to_sparse(), y))
    dense, _ = losses(Sparse, "stacked", lambda step: (x.relu(), y))
    torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-6)

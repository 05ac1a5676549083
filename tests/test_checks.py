"""What a step looks at before it counts: batches of another shape, modules in another mode, whatever is random, the head."""

from __future__ import annotations

import gc
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.optim import compare
from tests.test_step import bits, same


class Memory(nn.Module):
    """Attention to a table of its own, whose rows are no batch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x, table):
        return torch.softmax(x * self.scale @ table.t(), -1) @ table


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.memory, self.out = nn.Linear(8, 8), Memory(), nn.Linear(8, 3)
        self.register_buffer("table", torch.randn(64, 8))

    def forward(self, x):
        return self.out(self.memory(self.a(x), self.table))


class Net(nn.Module):
    """Two layers with ``between`` them."""

    def __init__(self, between=lambda h: h, width=8):
        super().__init__()
        self.a, self.o, self.between = nn.Linear(width, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.o(self.between(torch.relu(self.a(x))))


class Attention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.mha, self.o = nn.MultiheadAttention(16, 2, dropout=dropout, batch_first=True), nn.Linear(16, 5)

    def forward(self, x, mask=None):
        return self.o(self.mha(x, x, x, attn_mask=mask)[0].mean(1))


class Sequences(nn.Module):
    """Sequence first: a stacked batch would be longer sequences."""

    def __init__(self):
        super().__init__()
        self.e, self.o = nn.Embedding(20, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.o(self.e(x)).mean(0)


def made(model, head=0, **options):
    torch.manual_seed(0)
    return ezo.ElasticZO(ezo.convert_(model(), head=head), **options)


def examples(rows, width=8, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator), torch.randint(classes, (rows,), generator=generator)


def test_rows_are_compared_again_for_a_batch_of_another_size():
    """16 rows are a quarter of the table's, 20 are no part of it."""
    x, y = examples(20)
    ours = made(Reader, head=["out"], lr=0.0, head_lr=0.0)
    theirs = made(Reader, head=["out"], lr=0.0, head_lr=0.0, mode="sequential")
    for opt in (ours, theirs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.train_step(x, y)
            opt.train_step(x[:16], y[:16])
        assert opt is theirs or "treat the rows of a batch apart" in str(caught[-1].message)
    assert ours.mode == "sequential" and torch.equal(ours.losses, theirs.losses)
    strict = made(Reader, head=["out"], mode="stacked")
    strict.train_step(x, y)
    before = bits(strict.model)
    with pytest.raises(ValueError, match="apart"):
        strict.train_step(x[:16], y[:16])
    assert same(bits(strict.model), before) and strict.step_count.item() == 1


class Prompted(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, prompts):
        return self.o(torch.tanh(self.a(x))) @ prompts.t()


def test_an_argument_that_is_as_long_as_a_batch_by_chance():
    ours = made(Prompted, head=["o"], lr=0.0, head_lr=0.0)
    theirs = made(Prompted, head=["o"], lr=0.0, head_lr=0.0, mode="sequential")
    prompts = torch.randn(10, 8)
    for rows in (16, 10):
        x, y = examples(rows, classes=10)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours.train_step((x, prompts), y)
        theirs.train_step((x, prompts), y)
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_a_mask_of_attention_is_no_batch(rows):
    """8 x 8, where 2 groups of 1, 2 or 4 rows would divide it, and 8 rows are stacked with the batch."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, 8, 16, generator=generator), torch.randint(5, (rows,), generator=generator)
    mask = torch.ones(8, 8).triu(1).bool()
    ours, theirs = (made(Attention, head=["o"], mode=mode) for mode in ("stacked", "sequential"))
    for opt in (ours, theirs):
        opt.train_step((x, mask), y)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (6, 3)])
def test_auto_goes_on_one_by_one_where_a_stacked_pass_fails(shape):
    opt = made(Sequences)
    with pytest.warns(UserWarning, match="one by one"):
        opt.train_step(torch.randint(0, 20, shape), torch.randint(0, 5, shape[1:]))
    assert opt.mode == "sequential" and opt.step_count.item() == 1


def test_an_error_of_the_users_is_the_users():
    opt = made(Net)
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        opt.train_step(examples(4)[0], torch.full((4,), 7))
    assert opt.mode == "stacked" and opt.step_count.item() == 0


KEPT = torch.Generator()
DRAWS = {
    "numpy": lambda h: h + float(np.random.randn()),
    "python": lambda h: h * random.random(),
    "torch": lambda h: h + torch.randn(()),
    "generator": lambda h: h + torch.randn((), generator=KEPT),
}


OWN = {"numpy": np.random.default_rng(0).normal, "python": random.Random(0).random}


class Counting(nn.Module):
    """``used``: its output depends on how often it ran."""

    def __init__(self, used: bool):
        super().__init__()
        self.used, self.runs = used, 0
        self.a, self.o = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        self.runs += 1
        h = torch.tanh(self.a(x))
        return self.o(h / max(0.1, 0.9**self.runs) if self.used else h)


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("mode", ["auto", "sequential"])
@pytest.mark.parametrize("kind", [*OWN, "count"])
def test_a_model_that_is_another_when_it_runs_again_is_refused(kind, mode, antithetic):
    def model():
        return Counting(True) if kind == "count" else Net(lambda h: h * (1 + 0.1 * OWN[kind]()))

    opt = made(model, head=["o"], mode=mode, queries=2, antithetic=antithetic)
    before = bits(opt.model)
    with pytest.raises(ValueError, match="another output when they run again"):
        opt.train_step(*examples(4))
    assert opt.step_count.item() == 0 and opt.mode != "sequential" or mode == "sequential"
    assert same(bits(opt.model), before)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_count_that_nothing_reads_is_the_users_business(mode):
    opt = made(lambda: Counting(False), head=["o"], mode=mode)
    opt.train_step(*examples(4))
    assert opt.step_count.item() == 1


@pytest.mark.parametrize("mode", ["auto", "sequential"])
@pytest.mark.parametrize("kind", DRAWS)
def test_whatever_is_random_is_refused(kind, mode):
    opt = made(lambda: Net(DRAWS[kind]), head=["o"], mode=mode)
    with pytest.raises(ValueError, match="random in a way that would differ"):
        opt.train_step(*examples(4))
    assert opt.step_count.item() == 0


def test_a_generator_that_each_forward_makes_alike_is_no_chance():
    opt = made(lambda: Net(lambda h: h + torch.randn((), generator=torch.Generator().manual_seed(0))), head=["o"])
    opt.train_step(*examples(4))
    assert opt.step_count.item() == 1


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_model_is_looked_at_again_when_it_goes_from_eval_to_train(mode):
    x, y = torch.randn(4, 5, 16), torch.randint(0, 5, (4,))
    opt = made(lambda: Attention(0.3).eval(), head=["o"], mode=mode)
    opt.train_step(x, y)
    opt.model.train()
    with pytest.raises(ValueError, match=r"mha \(.*MultiheadAttention\)"):
        opt.train_step(x, y)
    opt.model.eval()
    opt.train_step(x, y)
    assert opt.step_count.item() == 2


def test_a_pass_that_failed_leaves_nothing_behind():
    held = []

    class Kept(Sequences):
        def forward(self, x):
            h = self.e(x)
            held.append(weakref.ref(h))
            return self.o(h).mean(0)

    opt = made(Kept, head=["o"])
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="one by one"):
            opt.train_step(torch.randint(0, 20, (6, 4)), torch.randint(0, 5, (4,)))
        # of one batch for all groups, of a copy each, the groups one by one, and what they give twice
        assert len(held) == 8 and not any(ref() is not None for ref in held)
    finally:
        gc.enable()


def test_two_failures_are_told_together():
    def fails(output, y):
        raise RuntimeError(f"{len(output)} rows")

    with pytest.raises(RuntimeError, match="4 rows") as error:
        made(Net).train_step(*examples(4), loss_fn=fails)
    assert "a stacked pass failed" in error.value.__notes__[0]


def test_a_new_shape_of_batch_compiles_a_model_once():
    """What is looked at runs uncompiled: each group by itself would be compiled for its own."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    opt = made(Net, head=["o"], queries=4)
    opt.model.compile(backend=backend)
    for rows in (8, 8, 4, 8, 4, 6, 6):
        opt.train_step(*examples(rows))
    assert len(compiled) <= 4


def test_cross_entropy_of_each_group_is_the_models_own():
    """The functions above compare losses; this one that they are losses."""
    x, y = examples(6)
    opt = made(Net, eps=1e-30)
    opt.train_step(x, y)
    torch.testing.assert_close(opt.losses, F.cross_entropy(made(Net).model(x), y).expand(2).detach())


def test_the_check_of_rows_takes_as_long_as_it_has_groups(monkeypatch):
    """Each group held against each other one was minutes at a thousand queries."""
    calls, differ = [], compare.differ
    monkeypatch.setattr(compare, "differ", lambda a, b: (calls.append(1), differ(a, b))[1])
    groups = [[torch.randn(5, 3, generator=torch.Generator().manual_seed(g))] for g in range(40)]
    assert compare.rows_apart(groups, [[t + 1e-4] for (t,) in groups])
    assert len(calls) <= 3 * 40
    for wrong in (groups[1:] + groups[:1], [*groups[:-1], [groups[-1][0].roll(1, 0)]], [[t[:4]] for (t,) in groups]):
        assert not compare.rows_apart(groups, wrong)

"""What a step looks at before it counts: batches of another shape, modules in another mode, whatever is random, the head."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from tests.test_step import batch, bits, lenet, same


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


@pytest.mark.parametrize("rows", [1, 4])
def test_a_mask_of_attention_is_no_batch(rows):
    """8 x 8, where 2 groups of 1, 2 or 4 rows would divide it."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, 8, 16, generator=generator), torch.randint(5, (rows,), generator=generator)
    mask = torch.ones(8, 8).triu(1).bool()
    ours, theirs = (made(Attention, head=["o"], mode=mode) for mode in ("stacked", "sequential"))
    for opt in (ours, theirs):
        opt.train_step((x, mask), y)
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-6, atol=1e-6)


def test_a_mask_as_long_as_the_batch_makes_auto_go_one_by_one():
    opt = made(Attention, head=["o"])
    with pytest.warns(UserWarning, match="a stacked pass failed: The shape of the 2D attn_mask"):
        opt.train_step((torch.randn(8, 8, 16), torch.ones(8, 8).triu(1).bool()), torch.randint(5, (8,)))
    assert opt.mode == "sequential" and opt.step_count.item() == 1


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


DRAWS = {
    "numpy": lambda h: h + float(np.random.randn()),
    "python": lambda h: h * random.random(),
    "torch": lambda h: h + torch.randn(()),
    "generator": lambda h: h + torch.randn((), generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("mode", ["auto", "sequential"])
@pytest.mark.parametrize("kind", DRAWS)
def test_whatever_is_random_is_refused(kind, mode):
    opt = made(lambda: Net(DRAWS[kind]), head=["o"], mode=mode)
    with pytest.raises(ValueError, match="random in a way that would differ"):
        opt.train_step(*examples(4))
    assert opt.step_count.item() == 0


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


def test_parameters_of_the_head_are_still_those_of_the_model():
    opt = made(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), head=["2"])
    opt.train_step(*examples(4))
    held = opt.model[2]
    opt.model[2] = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="'2.weight' was replaced"):
        opt.train_step(*examples(4))
    opt.model[2] = held
    held.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="'2.bias' of the head was frozen"):
        opt.train_step(*examples(4))
    held.bias.requires_grad_(True)
    opt.train_step(*examples(4))
    assert opt.step_count.item() == 2
    whole = made(Net, head="all")
    whole.model.load_state_dict(bits(whole.model), assign=True)
    with pytest.raises(ValueError, match="was replaced"):
        whole.train_step(*examples(4))


def test_a_head_that_gets_no_gradient_is_named_once():
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(2, 2)

    opt = made(Idle, head=["o", "idle"])
    with pytest.warns(UserWarning, match="'idle.weight', 'idle.bias' got no gradient"):
        opt.train_step(*examples(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.train_step(*examples(4))


def test_eps_stays_while_losses_are_accumulated():
    opt = made(Net)
    opt.train_step(*examples(4), update=False)
    opt.param_groups[0]["eps"] = 0.1
    with pytest.raises(ValueError, match="eps was 0.001 for the losses accumulated so far, and is now 0.1"):
        opt.train_step(*examples(4))
    opt.train_step(*examples(4))
    assert opt.step_count.item() == 1


def test_a_head_optimizer_that_raises_has_changed_nothing():
    opt = made(Net, head=["o"], head_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    opt.train_step(*examples(4))
    before = bits(opt.model)

    def fail(*_):
        raise RuntimeError("a hook of the user's")

    hook = opt.head_optimizer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a hook of the user's"):
        opt.train_step(*examples(4))
    assert same(bits(opt.model), before) and (opt.step_count.item(), opt.skipped.item()) == (1, 0)
    hook.remove()
    opt.train_step(*examples(4))
    assert opt.step_count.item() == 2


@pytest.mark.parametrize("lr", [float("nan"), -1.0, "x"])
def test_the_heads_rate_is_checked_at_every_step(lr):
    opt = made(Net, head=["o"])
    opt.param_groups[1]["lr"] = lr
    before = bits(opt.model)
    with pytest.raises((TypeError, ValueError), match="lr of the head must be"):
        opt.train_step(*examples(4))
    assert same(bits(opt.model), before) and opt.step_count.item() == 0


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"eps": 1e39}, ValueError, "eps must be in the range of fp32"),
        ({"eps": 1e-50}, ValueError, "eps must be in the range of fp32"),
        ({"lr": 1e39}, ValueError, "lr must be in the range of fp32"),
        ({"queries": True}, TypeError, "queries must be an int, got bool"),
        ({"seed": True}, TypeError, "seed must be an int, got bool"),
        ({"stochastic_rounding": "no"}, TypeError, "stochastic_rounding must be a bool"),
        ({"head_optimizer": "adam"}, TypeError, "head_optimizer must be a torch optimizer"),
    ],
)
def test_arguments(options, error, match):
    with pytest.raises(error, match=match):
        made(Net, head=["o"], **options)


def test_a_loss_that_cannot_be_called():
    with pytest.raises(TypeError, match="loss_fn must be a function of the output and y, got str"):
        made(Net).train_step(*examples(4), loss_fn="cross_entropy")


def test_a_model_that_was_converted_anew_wants_a_new_optimizer():
    model = ezo.convert_(lenet(), head=["fc3"])
    opt = ezo.ElasticZO(model)
    ezo.unconvert_(model)
    ezo.convert_(model, head=["fc2", "fc3"])
    with pytest.raises(ValueError, match="converted anew"):
        opt.train_step(*batch(4))


def test_one_autocast_around_all_steps_is_one_around_each():
    runs = []
    for around in (True, False):
        opt = made(Net, head=["o"], head_lr=0.5)
        with torch.autocast("cpu", torch.bfloat16) if around else contextlib.nullcontext():
            for i in range(4):
                with torch.autocast("cpu", torch.bfloat16):
                    opt.train_step(*examples(8, seed=i))
        runs.append(bits(opt.model))
    assert same(*runs)


@pytest.mark.parametrize("setting", ["'high'", "cuda.matmul", ""])
def test_any_switch_of_tf32_is_read(setting):
    change = {
        "'high'": "torch.set_float32_matmul_precision('high')",
        "cuda.matmul": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "": "torch.backends.fp32_precision = 'tf32'",
    }[setting]
    code = f"""
import torch
from ezo_kernels.ops.linear import input_precision
assert input_precision(torch.float32, "") == "ieee"
{change}
assert input_precision(torch.float32, "") == "tf32" and input_precision(torch.float32, "ieee") == "ieee"
assert input_precision(torch.float16, "") == "ieee"
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_cross_entropy_of_each_group_is_the_models_own():
    """The functions above compare losses; this one that they are losses."""
    x, y = examples(6)
    opt = made(Net, eps=1e-30)
    opt.train_step(x, y)
    torch.testing.assert_close(opt.losses, F.cross_entropy(made(Net).model(x), y).expand(2).detach())

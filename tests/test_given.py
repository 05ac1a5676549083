"""What groups of a first step must be given alike: the batch, and what a model keeps from one forward to the next."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.test_checks import examples, made
from tests.test_step import bits, same


class Writes(nn.Module):
    """Writes into its input before it reads it."""

    def __init__(self, write):
        super().__init__()
        self.a, self.o, self.write = nn.Linear(8, 8), nn.Linear(8, 3), write

    def forward(self, x):
        self.write(x)
        return self.o(torch.relu(self.a(x)))


@pytest.mark.parametrize("how", ["sequential", "closure", "loss", "stacked loss"])
@pytest.mark.parametrize("write", [lambda t: t.mul_(0.5), lambda t: t.unsqueeze_(0)], ids=["values", "shape"])
def test_what_writes_into_its_batch_is_refused(how, write):
    """The second group would be given what the first one left, and g would be the difference of two batches."""
    of_loss = how.endswith("loss")
    opt = made(lambda: Writes((lambda x: x) if of_loss else write), mode=how.split()[0] if " " in how else "sequential")
    model, before, x, y = opt.model, bits(opt.model), torch.randn(4, 8), torch.randn(4, 3)

    def loss(output, target):
        if of_loss:
            write(target)
        return F.mse_loss(output.view(-1), target.reshape(-1))

    with pytest.raises(ValueError, match="writes into its batch.*clone it"):
        if how == "closure":
            opt.step(lambda: loss(model(x), y))
        else:
            opt.train_step(x, y, loss)
    assert same(before, bits(model)) and opt.step_count.item() == 0 and opt.zo.p is None


@pytest.mark.parametrize("mode", ["sequential", "stacked"])
def test_what_is_the_same_after_each_write_is_none(mode):
    """A clamp or a relu in place, a closure's own copy; and a stacked batch is a copy, of which nobody else hears."""
    x, y = torch.randn(4, 8), torch.randint(3, (4,))
    x[0, 0] = torch.nan
    plain = made(lambda: Writes(lambda x: x), mode=mode)
    clamped = made(lambda: Writes(lambda x: x.nan_to_num_().clamp_(0)), mode=mode)
    plain.train_step(x.nan_to_num().clamp(0), y)
    clamped.train_step(x, y)
    assert same(bits(plain.model), bits(clamped.model))
    opt, other = made(lambda: Writes(lambda x: x.mul_(0.5)), mode=mode), made(lambda: Writes(lambda x: x), mode=mode)
    opt.step(lambda: F.cross_entropy(opt.model(x.clone()), y))
    other.step(lambda: F.cross_entropy(other.model(x * 0.5), y))
    if mode == "stacked":
        before = x.nan_to_num_().clone()
        opt.train_step(x, y)
        other.train_step(x * 0.5, y)
        assert torch.equal(before, x)
    assert same(bits(opt.model), bits(other.model))


class Keeps(nn.Module):
    """Does something with an attribute at each forward."""

    def __init__(self, do, held=None):
        super().__init__()
        self.a, self.o, self.do, self.held = nn.Linear(8, 8), nn.Linear(8, 3), do, held

    def forward(self, x):
        h = self.a(x)
        return self.o(torch.tanh(h if (more := self.do(self, h)) is None else h + more))


def carried(model, h):
    """As the state of a recurrent net."""
    before, model.held = model.held, h.detach()
    return before


def carried_in_place(model, h):
    before = model.held * 0.5
    model.held.copy_(h)
    return before


def carried_in_a_list(model, h):
    model.held.append(h.detach())
    return model.held[-2] if len(model.held) > 1 else None


def cached(model, h):
    if model.held is None:
        model.held = {len(h): torch.arange(8.0)}
    return model.held[len(h)]


def noted(model, h):
    """What somebody will look at, and a count of it, neither of which a forward reads."""
    model.held[0].copy_(h)
    model.held[1] += h.detach().sum()
    model.last = h


def overwritten(model, h):
    """Memory that a forward fills before it reads it, in each way that torch has."""
    model.held.zero_()
    model.held.add_(h)
    first = model.held * 1.0
    model.held[:] = h
    second = model.held * 1.0
    return first + second + torch.mul(h, 2.0, out=model.held) * 1.0


def seen_anew(model, h):
    """The same values at each forward, by a new view of them."""
    model.held = model.held.detach()[: len(h)]
    return model.held


def doubled_in_place(model, h):
    """Written over, by what was there."""
    return torch.mul(model.held, h, out=model.held) * 1.0


def written_in_part(model, h):
    model.held[:2] = h[:2]
    return model.held * 1.0


def handed_on(model, h):
    """Read by what it is written to alone."""
    out = torch.empty(4, 8)
    out[:] = model.held
    model.held = h.detach()
    return out


@pytest.mark.parametrize("do", [overwritten, seen_anew])
def test_what_each_forward_begins_with_alike_is_no_state(do):
    x, y = examples(4)
    with torch.no_grad():
        opt = made(lambda: Keeps(do, torch.ones(4, 8)), mode="sequential")
        for _ in range(2):
            opt.train_step(x, y)
    assert opt.step_count.item() == 2


@pytest.mark.parametrize("do", [doubled_in_place, written_in_part, handed_on])
def test_what_a_forward_only_seems_to_begin_with_alike_is_refused(do):
    with torch.no_grad(), pytest.raises(ValueError, match="the model keeps 'held' from one forward to the next"):
        made(lambda: Keeps(do, torch.ones(4, 8)), mode="sequential").train_step(*examples(4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_an_argument_of_ragged_rows_is_left_alone(layout):
    """Those of one layout have no shape, those of the other no copy in inference_mode."""
    ragged = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=layout)

    class Leaves(Keeps):
        def forward(self, x, _):
            return super().forward(x)

    opt, (x, y) = made(lambda: Leaves(lambda *_: None), mode="sequential"), examples(4)
    with torch.inference_mode():
        opt.step(lambda: F.cross_entropy(opt.model(x, ragged), y))
    assert opt.step_count.item() == 1


@pytest.mark.parametrize("how", ["sequential", "auto", "closure"])
@pytest.mark.parametrize("do", [carried, carried_in_place, carried_in_a_list])
def test_what_one_group_leaves_to_the_next_is_refused_by_name(do, how):
    held = {carried: None, carried_in_place: torch.zeros(4, 8), carried_in_a_list: []}[do]
    opt, (x, y) = made(lambda: Keeps(do, held), mode="sequential" if how == "closure" else how), examples(4)
    before = bits(opt.model)
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match="the model keeps 'held' from one forward to the next"),
    ):
        warnings.simplefilter("ignore")
        if how == "closure":
            opt.step(lambda: F.cross_entropy(opt.model(x), y))
        else:
            opt.train_step(x, y)
    assert same(before, bits(opt.model)) and opt.step_count.item() == 0


def test_what_is_kept_but_not_read_is_no_state():
    x, y = examples(4)
    for do, held in ((cached, None), (noted, [torch.zeros(4, 8), torch.zeros(())])):
        opt = made(lambda do=do, held=held: Keeps(do, held), mode="sequential")
        opt.train_step(x, y)
        opt.step(lambda opt=opt: F.cross_entropy(opt.model(x), y))
    opt = made(lambda: Keeps(carried), mode="sequential")

    def closure():
        opt.model.held = None
        return F.cross_entropy(opt.model(x), y)

    opt.step(closure)
    assert opt.step_count.item() == 1
    opt = made(lambda: Keeps(carried, torch.zeros(4, 8)), mode="sequential")

    def in_place():
        opt.model.held.zero_()
        return F.cross_entropy(opt.model(x), y)

    opt.step(in_place)
    assert opt.step_count.item() == 1

"""The remainder of the head's weights: the bits behind the unit that an update leaves, against plain integers."""

from __future__ import annotations

import copy

import pytest
import torch

import ezo_kernels as ezo
from ezo_kernels import ops
from tests import int8_oracle as oracle
from tests.int8_models import exponents, randint, same, state
from tests.test_int8_arithmetic import SEED, SITE, STEP, key_tensor
from tests.test_int8_step import HEADS, lenet, lenet_batch, oracle_of, step_as_the_oracle, steps, tiny

HOW = dict(r_max=40, p_zero=0.3, head_remainder=True)


@pytest.mark.parametrize("rounding", ["nearest", "pseudo", "stochastic"])
@pytest.mark.parametrize("bits", [-8, -1, 0, 1, 4, 7])
@pytest.mark.parametrize("largest", [3, 90_000, 2**31 - 1])
def test_head_update_is_the_oracles(rounding, bits, largest, device):
    generator = torch.Generator().manual_seed(1)
    w, rest = randint(5, 9, low=-128).to(device), randint(5, 9, seed=2, low=-128).to(device)
    grad = torch.randint(-largest, largest + 1, (5, 9), generator=generator).int().to(device)
    grad[0, :3] = 0
    before = w.tolist(), rest.tolist()
    peak = grad.abs().max().reshape(1)
    ops.int8_head_update_(
        w, grad, peak, exponents(bits).to(device), key=key_tensor(SEED, STEP, device), site=SITE, rounding=rounding,
        remainder=rest,
    )  # fmt: skip
    n, key = max(0, oracle.bits(peak.item()) - bits), oracle.fold(SEED, STEP)
    for r in range(5):
        for c in range(9):
            lane = oracle.lane_at(r, c, key=key, site=SITE)
            expected = oracle.finer(before[0][r][c], before[1][r][c], grad[r, c].item(), n, rounding, lane)
            assert (w[r, c].item(), rest[r, c].item()) == expected


@pytest.mark.parametrize("rounding", ["nearest", "pseudo", "stochastic"])
def test_no_gradient_changes_nothing(rounding, device):
    w, rest = randint(3, 4, low=-128).to(device), randint(3, 4, seed=1, low=-128).to(device)
    before, zero = (w.clone(), rest.clone()), torch.zeros(3, 4, dtype=torch.int32, device=device)
    how = dict(key=key_tensor(0, 0, device), site=1, rounding=rounding, remainder=rest)
    ops.int8_head_update_(w, zero, zero[0, :1], exponents(7).to(device), **how)
    assert torch.equal(w, before[0]) and torch.equal(rest, before[1])


def test_small_steps_add_up_and_the_rails_hold(device):
    """A hundred steps of 10/256 are 1000/256 units, to the last bit; without a remainder, nearest rounding loses them all."""
    grad = torch.full((2, 3), 10, dtype=torch.int32, device=device)
    grad[1] = -10
    peak = grad.abs().max().reshape(1)
    how = dict(key=key_tensor(0, 0, device), site=1, rounding="nearest")
    # the peak has 4 bits: a width of -4 makes a step 10 / 2^8
    w, rest = torch.zeros_like(grad, dtype=torch.int8), torch.zeros_like(grad, dtype=torch.int8)
    rough = w.clone()
    for _ in range(100):
        ops.int8_head_update_(w, grad, peak, exponents(-4).to(device), remainder=rest, **how)
        ops.int8_head_update_(rough, grad, peak, exponents(-4).to(device), **how)
    assert (w.int() * 256 + rest.int()).tolist() == [[-1000] * 3, [1000] * 3] and not rough.any()
    for _ in range(20):
        ops.int8_head_update_(w, grad, peak, exponents(7).to(device), remainder=rest, **how)
    assert w.tolist() == [[-127] * 3, [127] * 3] and not rest.any()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("head", [1, 2])
@pytest.mark.parametrize("head_rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("width", [-3, 2])
def test_steps_are_the_oracles(head, head_rounding, width):
    how = dict(HOW, bits=1, head_bits=width, queries=2, head_rounding=head_rounding)
    model = tiny(HEADS[head])
    opt = ezo.ElasticZOInt8(model, seed=17, **how)
    run = oracle_of(model, opt, 17, **how)
    for i in range(4):
        step_as_the_oracle(opt, run, i)
    kept = opt.state_dict()["head_remainder"]
    assert {name: r.flatten().tolist() for name, r in kept.items()} == run.remainders
    assert all(r.any() for r in kept.values())


def test_it_is_counted_and_the_trunk_has_none():
    model = lenet(("fc3",))
    opt = ezo.ElasticZOInt8(model, **HOW)
    steps(opt, 1)
    assert opt.memory()["remainder_bytes"] == 84 * 10 + 10
    plain = ezo.ElasticZOInt8(lenet(("fc3",)))
    steps(plain, 1)
    assert plain.memory()["remainder_bytes"] == 0 and plain.state_dict()["head_remainder"] == {}


def test_resume_equals_the_uninterrupted_run(tmp_path):
    how = dict(HOW, queries=2, head_bits=-2, seed=4)
    model = lenet(("fc2", "fc3"))
    opt = ezo.ElasticZOInt8(model, **how)
    steps(opt, 3)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint")
    losses = steps(opt, 3, first=3)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    fresh = lenet(("fc2", "fc3"))
    fresh.load_state_dict(saved["model"])
    other = ezo.ElasticZOInt8(fresh, **{**how, "seed": 0})
    other.load_state_dict(saved["opt"])
    assert steps(other, 3, first=3) == losses and same(state(fresh), state(model))
    ours, theirs = opt.state_dict()["head_remainder"], other.state_dict()["head_remainder"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_states_of_the_other_kind_and_bad_remainders_are_refused():
    with_it, without = (ezo.ElasticZOInt8(lenet(("fc3",)), head_remainder=kept) for kept in (True, False))
    steps(with_it, 1)
    good, step = with_it.state_dict(), without.step_count.clone()
    with pytest.raises(ValueError, match="made with head_remainder, this run is without"):
        without.load_state_dict(good)
    with pytest.raises(ValueError, match="made without head_remainder, this run is with"):
        with_it.load_state_dict({k: v for k, v in without.state_dict().items() if k != "head_remainder"})
    assert without.step_count == step
    kept = good["head_remainder"]
    for bad in (None, True, [kept]):
        with pytest.raises(ValueError, match="head_remainder of the state must be a dict of tensors"):
            with_it.load_state_dict({**good, "head_remainder": bad})
    for bad in (kept["fc3.weight"].float(), kept["fc3.weight"][:2], [0]):
        with pytest.raises(ValueError, match="fc3.weight must be an int8 tensor of shape"):
            with_it.load_state_dict({**good, "head_remainder": {**kept, "fc3.weight": bad}, "step": step + 7})
    assert with_it.step_count == 1


def test_bad_arguments():
    with pytest.raises(TypeError, match="head_remainder must be a bool, got int"):
        ezo.ElasticZOInt8(lenet(("fc3",)), head_remainder=1)
    w, grad = randint(3, 4), torch.ones(3, 4, dtype=torch.int32)
    how = dict(peak=exponents(1), bits=exponents(1), key=key_tensor(0, 0), site=1)
    before = w.clone()
    for bad, error, match in (
        (w.float(), TypeError, "float32"),
        (w[:2], ValueError, r"\(2, 4\)"),
        (randint(4, 3).t(), ValueError, r"\(3, 4\)"),
    ):
        with pytest.raises(error, match=match):
            ops.int8_head_update_(w, grad, remainder=bad, **how)
    assert torch.equal(w, before)


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("head_grad", ["mean", "plus", "minus"])
def test_modes_give_the_same_bits(mode, head_grad):
    how = dict(HOW, queries=2, seed=9, head_grad=head_grad)
    found = []
    for of in (mode, "stacked"):
        model = lenet(("fc2", "fc3"))
        opt = ezo.ElasticZOInt8(model, mode=of, **how)
        steps(opt, 3)
        found.append((state(model), opt.state_dict()["head_remainder"]))
    assert same(found[0][0], found[1][0]) and same(found[0][1], found[1][1])


def test_a_copy_has_remainders_of_its_own():
    opt = ezo.ElasticZOInt8(lenet(("fc3",)), **HOW)
    steps(opt, 2)
    other = copy.deepcopy(opt)
    assert same(opt.state_dict()["head_remainder"], other.state_dict()["head_remainder"])
    assert steps(opt, 2, first=2) == steps(other, 2, first=2) and same(state(opt.model), state(other.model))
    before = other.state_dict()["head_remainder"]
    steps(opt, 1, first=4)
    assert same(before, other.state_dict()["head_remainder"])


def test_a_float_loss_that_is_not_finite_changes_no_remainder():
    opt = ezo.ElasticZOInt8(lenet(("fc3",)), loss="float_cross_entropy", **HOW)
    x, y = lenet_batch(8)
    opt.train_step(x, y)
    before = opt.state_dict()["head_remainder"]
    opt.train_step(x, y, loss_fn=lambda logits, y: logits.sum() * float("nan"))
    assert opt.skipped == 1 and same(before, opt.state_dict()["head_remainder"]) and before["fc3.weight"].any()


def test_a_head_that_is_not_contiguous_is_refused_before_anything_is_written():
    """It moved after the optimizer was made."""
    model = lenet(("fc3",))
    opt = ezo.ElasticZOInt8(model, **HOW)
    model.fc3.weight.data = model.fc3.weight.data.t().contiguous().t()
    before = state(model)
    with pytest.raises(ValueError, match="fc3.weight of the head, of shape .10, 84., is not contiguous"):
        opt.train_step(*lenet_batch(8))
    assert same(before, state(model)) and opt.step_count == 0 and not opt.g.any()

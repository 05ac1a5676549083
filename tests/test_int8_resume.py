"""An integer run that goes on from its state, the loss that people read, and schedules of integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ezo_kernels as ezo
from ezo_kernels.optim import IntegerSchedule
from tests.int8_models import LENET_HEADS, lenet, lenet_batch, same, state, steps, tiny, tiny_batch


@pytest.mark.parametrize("head", LENET_HEADS, ids=str)
def test_resume_equals_the_uninterrupted_run(head, tmp_path):
    how = dict(queries=2, seed=2**64 - 1, p_zero=0.5)
    model = lenet(head)
    opt = ezo.ElasticZOInt8(model, **how)
    opt.param_groups[0]["bits"] = 2
    steps(opt, 3)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint")
    losses = steps(opt, 3, first=3)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    fresh = lenet(head)
    fresh.conv1.weight.data.zero_()
    fresh.load_state_dict(saved["model"])
    other = ezo.ElasticZOInt8(fresh, **{**how, "seed": 0})
    other.load_state_dict(saved["opt"])
    assert steps(other, 3, first=3) == losses
    assert same(state(fresh), state(model)) and other.step_count.item() == 6


def test_values_without_their_exponent_are_not_loaded():
    """With strict=False torch would take them, and read them with the exponent that was there."""
    model, saved = tiny(), tiny().state_dict()
    for gone in ("fc1.weight_exponent", "fc1.bias"):
        part = {name: value for name, value in saved.items() if name != gone}
        lacked = (
            "fc1.weight comes without fc1.weight_exponent"
            if "weight" in gone
            else "fc1.bias_exponent comes without fc1.bias"
        )
        with pytest.raises(RuntimeError, match=lacked):
            model.load_state_dict(part, strict=False)
    model.load_state_dict({name: value for name, value in saved.items() if not name.startswith("fc1")}, strict=False)


CHANGES = {"bits": 3, "r_max": 50, "p_zero": 0.25, "head_bits": 4}


def test_the_loss_for_people_is_the_mean_over_rows_whatever_the_loss():
    """The float loss of the same logits is a mean already: dividing by the rows again would make it 8 times too small."""
    means = []
    for loss in ("cross_entropy", "float_cross_entropy"):
        opt = ezo.ElasticZOInt8(lenet(("fc3",)), seed=1, loss=loss)
        opt.train_step(*lenet_batch(8))
        assert opt.group_losses.shape == (2,) and opt.mean_loss == opt.group_losses.mean()
        means.append(opt.mean_loss.item())
    assert means[0] == pytest.approx(means[1], rel=0.01) and means[0] > 1


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_the_loss_for_people_of_a_closure_is_what_it_returned(loss):
    model = tiny()
    opt, (x, _) = ezo.ElasticZOInt8(model, loss=loss), tiny_batch()
    for losses in ((torch.tensor([0.25]), torch.tensor(1.75)), (torch.tensor(3), torch.tensor([8]))):
        given = iter(losses)
        opt.step(lambda given=given: (model(x), next(given))[1])
        want = [float(v) for v in losses]
        assert opt.group_losses.tolist() == want and opt.mean_loss == sum(want) / 2
        assert opt.mean_loss.dtype == torch.float64


def test_a_run_by_closures_is_watched():
    model = tiny()
    opt, (x, y) = ezo.ElasticZOInt8(model), tiny_batch()
    watch = ezo.Diagnostics(opt, every=2)

    def steps(n):
        for _ in range(n):
            opt.step(lambda: ezo.ops.int8_cross_entropy(model(x), y))
            watch.observe()

    steps(4)
    assert len(watch._windows) == 2
    watch._read = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        steps(2)
    assert watch._scales == [], "the next reading has as many again"


def test_a_schedule_changes_what_it_says_when_it_says():
    def run(by_hand):
        model = tiny(("fc2",))
        opt = ezo.ElasticZOInt8(model)
        schedule = IntegerSchedule(opt, {0: {"bits": 2}, 2: CHANGES} if not by_hand else {})
        for i in range(4):
            if by_hand and i in (0, 2):
                trunk = {"bits": 2} if i == 0 else {k: CHANGES[k] for k in ("bits", "r_max", "p_zero")}
                opt.param_groups[0].update(trunk)
                opt.param_groups[1]["bits"] = 1 if i == 0 else 4
            opt.train_step(*tiny_batch(i))
            schedule.step()
        return state(model), opt

    (ours, opt), (by_hand, _) = run(False), run(True)
    assert same(ours, by_hand)
    assert {k: opt.param_groups[0][k] for k in ("bits", "r_max", "p_zero")} == {"bits": 3, "r_max": 50, "p_zero": 0.25}
    assert opt.param_groups[1]["bits"] == 4
    assert opt._shift.item() == 3 and opt._head_bits.item() == 4


def test_a_schedule_goes_on_from_its_state():
    opt = ezo.ElasticZOInt8(tiny(("fc2",)))
    schedule = IntegerSchedule(opt, {2: CHANGES})
    saved = {"last_step": 2}
    assert opt.param_groups[0]["bits"] == 1
    schedule.load_state_dict(saved)
    assert opt.param_groups[0]["bits"] == 3 and schedule.state_dict() == saved


def test_step_hooks_run_around_a_train_step():
    opt, calls = ezo.ElasticZOInt8(tiny(())), []
    hooks = [register(lambda o, *_: calls.append(o.step_count.item()))
             for register in (opt.register_step_pre_hook, opt.register_step_post_hook)]  # fmt: skip
    opt.train_step(*tiny_batch(0))
    for hook in hooks:
        hook.remove()
    opt.train_step(*tiny_batch(1))
    assert calls == [0, 1]


def test_a_fraction_of_numpy_is_saved_as_a_number(tmp_path):
    """torch.load(weights_only=True) takes numpy's scalars for code."""
    opt = ezo.ElasticZOInt8(tiny(()))
    opt.param_groups[0]["p_zero"] = np.float64(0.75)
    opt.train_step(*tiny_batch(0))
    torch.save(opt.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    assert saved["param_groups"][0]["p_zero"] == 0.75
    opt.load_state_dict(saved)


def test_what_is_said_of_a_closure_that_gives_no_number():
    """Of a float's cures none is there in integers."""
    model = tiny(())
    opt, x = ezo.ElasticZOInt8(model), tiny_batch(0)[0]
    watch = ezo.Diagnostics(opt, every=10, warn=False)
    for step in range(10):
        opt.step(lambda step=step: model(x).dequantize().square().mean() * (float("nan") if step in (3, 4) else 1))
        watch.observe()
    finding = watch.active["not_finite"]
    assert "look at loss_fn or the closure" in finding.advice and "learning rate" not in finding.advice

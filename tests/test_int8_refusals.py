"""What the integers refuse, by name, and that nothing has changed then: arguments, steps, states."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.ops import Int8Tensor
from ezo_kernels.optim import IntegerSchedule
from tests.int8_models import Tiny, lenet, overwrite, same, state, steps, tiny, tiny_batch

# ---- arguments


BAD_ARGUMENTS = [
    (dict(r_max=0), ValueError, "0"), (dict(r_max=128), ValueError, "128"),
    (dict(p_zero=1.0), ValueError, "1.0"), (dict(p_zero=-0.1), ValueError, "-0.1"),
    (dict(bits=-9), ValueError, "^bits.*-9"), (dict(bits=8), ValueError, "^bits.*8"), (dict(bits=1.5), TypeError, "^bits"),
    (dict(bits=True), TypeError, "^bits"), (dict(head_bits=-9), ValueError, "^head_bits.*-9"),
    (dict(head_bits=8), ValueError, "^head_bits.*8"), (dict(head_bits=1.5), TypeError, "^head_bits"),
    (dict(queries=0), ValueError, "queries.*0"), (dict(queries=-1), ValueError, "queries.*-1"),
    (dict(queries=1.0), TypeError, "queries"), (dict(seed=-1), ValueError, "seed"), (dict(seed=2**64), ValueError, "seed"),
    (dict(loss="mse"), ValueError, "loss.*'mse'"), (dict(mode="both"), ValueError, "mode.*'both'"),
    (dict(strategy="thrice"), ValueError, "strategy.*'thrice'"), (dict(rounding="down"), ValueError, "rounding.*'down'"),
    (dict(head_rounding="down"), ValueError, "rounding.*'down'"),
    (dict(activation_rounding="stochastic"), ValueError, "activation_rounding.*'stochastic'"),
    (dict(head_grad="both"), ValueError, "head_grad.*'both'"), (dict(fraction_bits=9), ValueError, "fraction_bits"),
    (dict(fraction_bits=-1), ValueError, "fraction_bits"), (dict(rounds=8), ValueError, "rounds"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "error", "match"), BAD_ARGUMENTS, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_arguments_out_of_range_are_refused_by_name(arguments, error, match):
    with pytest.raises(error, match=match):
        ezo.ElasticZOInt8(TINY, **arguments)


TINY = tiny(("fc2",))


def test_an_r_max_that_is_no_integer_is_refused():
    with pytest.raises(TypeError, match="r_max"):
        ezo.ElasticZOInt8(TINY, r_max=1.5)


def test_models_that_are_not_converted_so_are_refused():
    with pytest.raises(ValueError, match="not converted"):
        ezo.ElasticZOInt8(Tiny())
    with pytest.raises(ValueError, match="precision='int8'"):
        ezo.ElasticZOInt8(ezo.convert_(Tiny()))
    with pytest.raises(ValueError, match="precision.*'int4'"):
        ezo.convert_(Tiny(), precision="int4")
    frozen = Tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        ezo.ElasticZOInt8(ezo.convert_(frozen, precision="int8"))


@pytest.mark.parametrize(
    "milestones",
    [{1: {"bits": 8}}, {1: {"head_bits": -9}}, {1: {"r_max": 0}}, {1: {"r_max": 128}}, {1: {"p_zero": 1.0}},
     {1: {"lr": 1}}, {-1: {"bits": 1}}, {1: {"bits": 1.5}}, {0: {"bits": 2}, 5: {"p_zero": -0.1}}],
    ids=str,
)  # fmt: skip
def test_a_schedule_refuses_bad_values_before_anything_changes(milestones):
    opt = ezo.ElasticZOInt8(tiny(("fc2",)))
    before = [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]
    with pytest.raises((TypeError, ValueError)):
        IntegerSchedule(opt, milestones)
    assert before == [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]


@pytest.mark.parametrize(
    ("milestones", "match"),
    [({3: None}, "int 3 and NoneType"), ({3.0: {}}, "float 3.0"), ({True: {}}, "bool True"), ([3], "got list")],
    ids=str,
)
def test_milestones_of_another_type_are_refused(milestones, match):
    with pytest.raises(TypeError, match=match):
        IntegerSchedule(ezo.ElasticZOInt8(TINY), milestones)


@pytest.mark.parametrize(
    ("saved", "error", "match"),
    [({"last_step": "a"}, TypeError, "last_step.*str"), ({"last_step": -1}, ValueError, "-1"), ({}, ValueError, "lacks"),
     ([1], TypeError, "list")],
    ids=str,
)  # fmt: skip
def test_a_schedule_refuses_what_is_no_state_of_one_and_stays_where_it_was(saved, error, match):
    schedule = IntegerSchedule(ezo.ElasticZOInt8(TINY), {2: {"bits": 3}})
    schedule.step()
    with pytest.raises(error, match=match):
        schedule.load_state_dict(saved)
    assert schedule.state_dict() == {"last_step": 1}


# ---- steps


def bad_inputs():
    x, y = tiny_batch()
    one = torch.tensor([-5], dtype=torch.int32)
    return {
        "float x": ((x.dequantize(), y), TypeError, "float32"),
        "numbers": (([1, 2], y), TypeError, "list"),
        "empty": ((Int8Tensor(x.values[:0], one), y[:0]), ValueError, r"\(0, 2, 6, 6\)"),
        "two groups": ((Int8Tensor(x.values[:2], one.repeat(2)), y[:1]), ValueError, "one group"),
        "channels": ((Int8Tensor(x.values[:, :1], one), y), ValueError, "1"),
        "three dimensions": ((Int8Tensor(x.values[0], one), y), ValueError, "3"),
        "float labels": ((x, y.float()), TypeError, "float32"),
        "int32 labels": ((x, y.int()), TypeError, "int32"),
        "a label too large": ((x, y + 2), ValueError, r"\[0, 4\).*4"),
        "a label below zero": ((x, y - 1), ValueError, r"\[0, 4\).*-1"),
        "labels too few": ((x, y[:2]), ValueError, r"\(2,\)"),
        "one-hot labels": ((x, y[:, None]), ValueError, r"\(3, 1\)"),
        "float loss": ((x, y, F.cross_entropy), ValueError, "float_cross_entropy"),
    }


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize("case", bad_inputs())
def test_a_step_that_is_refused_changes_nothing(case, mode, first):
    """Weights and counters are as before, and the next good step is as if it had not been."""
    arguments, error, match = bad_inputs()[case]
    model, other = tiny(("fc2",)), tiny(("fc2",))
    opts = [ezo.ElasticZOInt8(m, mode=mode, bits=3, head_bits=3) for m in (model, other)]
    if not first:
        for opt in opts:
            opt.train_step(*tiny_batch())
    before, counted = state(model), opts[0].step_count.item()
    with pytest.raises(error, match=match):
        opts[0].train_step(*arguments)
    assert same(before, state(model)) and opts[0].step_count.item() == counted
    for opt in opts:
        opt.train_step(*tiny_batch(1))
    assert same(state(model), state(other)) and not same(state(model), before)
    assert torch.equal(opts[0].losses, opts[1].losses)


def test_the_float_input_of_a_layer_is_refused_by_its_class():
    model = tiny()
    for layer, x in ((model.conv, torch.zeros(1, 2, 6, 6)), (model.fc1, torch.zeros(1, 12))):
        with pytest.raises(TypeError, match=f"{type(layer).__name__}.*float32.*quantize"):
            layer(x)


def test_a_closure_that_gives_no_loss_changes_nothing():
    model = tiny()
    opt, before = ezo.ElasticZOInt8(model), state(model)
    for bad in (lambda: 1.0, lambda: torch.zeros(2)):
        with pytest.raises(ValueError, match="one element"):
            opt.step(bad)
    with pytest.raises(ValueError, match="closure"):
        opt.step()
    with pytest.raises(ValueError, match="not visited.*conv.weight"):
        opt.step(lambda: torch.zeros(1))
    assert same(before, state(model)) and opt.step_count.item() == 0
    with pytest.raises(ValueError, match="train_step"):
        ezo.ElasticZOInt8(tiny(("fc2",))).step(lambda: torch.zeros(1))


class Skipping(Tiny):
    """Calls not all of its layers until it is told to."""

    def __init__(self, skipped: str) -> None:
        super().__init__()
        self.skipped = skipped
        self.extra, self.tail = nn.Linear(12, 12), nn.Linear(4, 4)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv(x), 2)).flatten(1)
        if self.skipped != "extra":
            x = self.extra(x)
        x = self.fc2(F.relu(self.fc1(x)))
        return x if self.skipped == "tail" else self.tail(x)


@pytest.mark.parametrize("skipped", ["extra", "tail"])
def test_a_layer_that_the_forward_does_not_call_is_named(skipped):
    """In the trunk and in the head."""
    models = [overwrite(ezo.convert_(Skipping(s), head=["fc2", "tail"], precision="int8")) for s in (skipped, "")]
    before = state(models[0])
    opts = [ezo.ElasticZOInt8(m, bits=3, head_bits=3) for m in models]
    with pytest.raises(ValueError, match=f"'{skipped}.bias', '{skipped}.weight'|'{skipped}.weight', '{skipped}.bias'"):
        opts[0].train_step(*tiny_batch())
    assert same(before, state(models[0])) and opts[0].step_count.item() == 0
    models[0].skipped = ""
    for opt in opts:
        opt.train_step(*tiny_batch())
    assert same(state(models[0]), state(models[1]))


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_a_layer_that_a_later_step_leaves_out_is_named_and_nothing_moves(mode):
    """Its z was in no forward: an update would be noise."""
    model = overwrite(ezo.convert_(Skipping(""), head=["fc2", "tail"], precision="int8"))
    opt = ezo.ElasticZOInt8(model, r_max=15, p_zero=0.0, bits=3, head_bits=3, mode=mode)
    opt.train_step(*tiny_batch())
    before, losses = state(model), opt.losses
    model.skipped = "extra"
    with pytest.raises(ValueError, match="not visited by the forward.*'extra.bias', 'extra.weight'"):
        opt.train_step(*tiny_batch())
    assert same(before, state(model)) and opt.step_count.item() == 1 and opt.losses is losses


def test_a_layer_that_one_pass_of_a_step_leaves_out_is_named():
    """The losses of its two signs are those of two functions."""
    model = overwrite(ezo.convert_(Skipping(""), precision="int8"))
    opt = ezo.ElasticZOInt8(model, mode="sequential")
    opt.train_step(*tiny_batch())
    model.conv.register_forward_pre_hook(lambda *_: setattr(model, "skipped", "" if model.skipped else "extra"))
    with pytest.raises(ValueError, match="not visited by the forward.*'extra.weight'"):
        opt.train_step(*tiny_batch())


def converted_anew(model):
    ezo.convert_(ezo.unconvert_(model), head=["fc2"], precision="int8")


def assigned(model):
    model.load_state_dict(state(model), assign=True)


def another_head(model):
    model.fc2.weight = nn.Parameter(model.fc2.weight.data.clone(), requires_grad=False)


STALE = [(converted_anew, "converted anew"), (ezo.unconvert_, "not converted"), (assigned, "'conv.bias' was replaced"),
         (another_head, "'fc2.weight' was replaced")]  # fmt: skip


@pytest.mark.parametrize("mode", ["stacked", "sequential"])
@pytest.mark.parametrize(("change", "match"), STALE, ids=[f.__name__ for f, _ in STALE])
def test_an_optimizer_of_weights_that_are_no_longer_the_models_is_refused(change, match, mode):
    model = tiny(("fc2",))
    opt = ezo.ElasticZOInt8(model, mode=mode)
    opt.train_step(*tiny_batch())
    change(model)
    before = state(model)
    with pytest.raises(ValueError, match=match):
        opt.train_step(*tiny_batch())
    assert same(before, state(model)) and opt.step_count.item() == 1


class Reading(Tiny):
    def forward(self, x):
        assert int(x.values.max()) <= 127
        return super().forward(x)


def test_a_forward_or_a_hook_that_reads_a_value_is_told_of_the_pass_without_values():
    for model, match in ((Reading(), "^a value is read"), (Tiny(), r"^fc1 \(Int8Linear\): a value is read")):
        ezo.convert_(model, precision="int8")
        if match.startswith("^fc1"):
            model.fc1.register_forward_hook(lambda module, args, out: int(out.exponent[0]))
        with pytest.raises(RuntimeError, match=match + ".*without values, on the meta device, to plan its memory"):
            ezo.ElasticZOInt8(model).train_step(*tiny_batch())


class TwoWords(ValueError):
    def __init__(self, first, second) -> None:
        super().__init__(f"{first} {second}")


def test_a_users_own_error_keeps_its_class_and_says_where():
    model = tiny()
    model.fc1.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(TwoWords("bad", "rows")))
    with pytest.raises(TwoWords, match="^bad rows") as caught:
        ezo.ElasticZOInt8(model).train_step(*tiny_batch())
    assert caught.value.__notes__ == ["in the forward of fc1 (Int8Linear)"]


class Leaving(Tiny):
    """With control flow, so that no trace warns of it at the conversion."""

    def forward(self, x):
        y = super().forward(x)
        return y.dequantize() if len(x) else y


def test_a_model_that_returns_a_float_is_refused():
    model = ezo.convert_(Leaving(), precision="int8")
    opt, before = ezo.ElasticZOInt8(model), state(model)
    with pytest.raises(TypeError, match="Int8Tensor, got Tensor"):
        opt.train_step(*tiny_batch())
    assert same(before, state(model)) and opt.step_count.item() == 0


def test_more_rows_than_a_gradient_of_the_head_can_sum_are_refused():
    model = overwrite(ezo.convert_(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), head=["1"], precision="int8"))
    opt, before = ezo.ElasticZOInt8(model), state(model)
    with pytest.raises(ValueError, match="1.weight: its gradient sums 99338 products over 2 groups.*99336"):
        opt.train_step(torch.zeros(49_669, 1, dtype=torch.int8), torch.zeros(49_669, dtype=torch.int64))
    assert same(before, state(model))
    opt.train_step(torch.zeros(49_668, 1, dtype=torch.int8), torch.zeros(49_668, dtype=torch.int64))


def test_more_terms_than_a_gradient_of_the_head_can_sum_are_refused():
    """[B, T, K]: the gradient sums B T groups products."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(30_000, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x)).flatten(1))

    model = overwrite(ezo.convert_(Tokens(), head=["b", "c"], precision="int8"))
    with pytest.raises(ValueError, match="b.weight.*120000 products"):
        ezo.ElasticZOInt8(model).train_step(
            torch.ones(2, 30_000, 1, dtype=torch.int8), torch.zeros(2, dtype=torch.int64)
        )


# ---- states


BAD_STATES = {
    "numerics": (lambda s: s.update(numerics_version="ezo-int8-0"), "numerics_version.*ezo-int8-0"),
    "noise": (lambda s: s.update(rng_version="ezo-1/philox4x32-10"), "rng_version"),
    "recipe": (lambda s: s.update(queries=2), "queries"),
    "loss": (lambda s: s.update(loss="squared_error"), "loss"),
    "fraction": (lambda s: s.update(fraction_bits=0), "fraction_bits"),
    "head_grad": (lambda s: s.update(head_grad="plus"), "head_grad"),
    "rounding": (lambda s: s.update(rounding=["pseudo", "stochastic"]), "rounding"),
    "head": (lambda s: s.update(head=[]), "head"),
    "model": (lambda s: s["manifest"][0][2].append(1), "manifest"),
    "a stranger's": (lambda s: s.clear(), "lacks"),
    "groups": (lambda s: s["param_groups"].pop(), None),
    "bits": (lambda s: s["param_groups"][0].update(bits=99), "99"),
    "a manifest of numbers": (lambda s: s.update(manifest=[5]), "manifest is no list of sites"),
    "groups of numbers": (lambda s: s.update(param_groups=[1, 2]), "param_groups"),
    "no groups": (lambda s: s.update(param_groups=3), "param_groups"),
    "bits in words": (lambda s: s["param_groups"][0].update(bits="two"), "no settings: bits"),
    "activations": (lambda s: s["rounding"].__setitem__(2, "pseudo"), "rounding"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_of_another_run_is_refused_and_changes_nothing(case):
    spoil, match = BAD_STATES[case]
    opt = ezo.ElasticZOInt8(tiny(("fc2",)))
    saved = copy.deepcopy(opt.state_dict())
    saved["step"] += 5
    spoil(saved)
    with pytest.raises(ValueError, match=match):
        opt.load_state_dict(saved)
    assert opt.step_count.item() == 0 and opt.param_groups[0]["bits"] == 1


def test_a_third_param_group_is_refused():
    with pytest.raises(NotImplementedError, match="convert_"):
        ezo.ElasticZOInt8(tiny()).add_param_group({"params": []})


def test_a_failed_forward_does_not_wedge_the_model():
    """The pass and the arena are closed again when a layer raises, in a trial as in a pass."""
    model = lenet()
    opt = ezo.ElasticZOInt8(model)
    hook = model.fc2.register_forward_pre_hook(lambda m, x: (_ for _ in ()).throw(KeyError("mine")))
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            steps(opt, 1)
    hook.remove()
    other = ezo.ElasticZOInt8(lenet())
    assert steps(opt, 2) == steps(other, 2) and same(state(model), state(other.model))


@pytest.mark.parametrize("scheduler", [torch.optim.lr_scheduler.CosineAnnealingLR, torch.optim.lr_scheduler.StepLR])
def test_a_scheduler_of_learning_rates_is_told_which_one_to_use(scheduler):
    opt = ezo.ElasticZOInt8(ezo.convert_(ezo.models.LeNet5(), precision="int8"))
    with pytest.raises(KeyError, match="no learning rate.*IntegerSchedule"):
        scheduler(opt, 10)
    with pytest.raises(KeyError, match="^'width'$"):
        opt.param_groups[0]["width"]

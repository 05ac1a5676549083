"""Models of integers: other networks, conversion and back, states, copies, layers outside of a step, float losses."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo
from ezo_kernels.data import quantize_images
from ezo_kernels.ops import Int8Tensor
from tests.int8_models import (
    TINY_EXPONENTS,
    Residual,
    Tiny,
    ints,
    lenet,
    lenet_batch,
    overwrite,
    same,
    state,
    steps,
    tiny,
    tiny_batch,
)

# ---- other models


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("head", [0, ["fc"]], ids=str)
def test_a_residual_network_trains_alike_however_it_runs(head):
    runs = []
    for strategy, mode in (("buffer", "stacked"), ("twice", "stacked"), ("auto", "sequential")):
        model = overwrite(ezo.convert_(Residual(), head=head, precision="int8"))
        opt = ezo.ElasticZOInt8(model, queries=2, strategy=strategy, mode=mode, bits=3)
        for i in range(3):
            x = Int8Tensor(ints((4, 2, 6, 6), i), torch.tensor([-5], dtype=torch.int32))
            opt.train_step(x, torch.arange(4) % 3)
        runs.append({**state(model), "losses": opt.losses})
        assert opt.memory()["planned_bytes"] == opt.memory()["measured_bytes"]
    assert all(same(runs[0], other) for other in runs[1:])
    assert len(set(runs[0]["losses"].tolist())) > 1


def test_sequential_of_modules_trains_and_its_loss_falls():
    """Two classes told by one pixel: nothing but plain modules, an integer for the head."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Identity(), nn.Linear(8, 2))
    overwrite(ezo.convert_(model, head=1, precision="int8"))
    for exponent in model.buffers():
        exponent.fill_(-6)
    y = torch.arange(32) % 2
    values = ints((32, 2, 2), 1, -10, 10)
    values[:, 0, 0] += torch.where(y == 1, 80, -80).to(torch.int8)
    opt = ezo.ElasticZOInt8(model, head_bits=3)
    seen = []
    for _ in range(60):
        opt.train_step(Int8Tensor(values, torch.tensor([-5], dtype=torch.int32)), y)
        seen.append(opt.mean_loss.item())
    assert sum(seen[-5:]) < 0.3 * sum(seen[:5])


# ---- conversion


def test_filter_fn_leaves_layers_alone():
    model = ezo.convert_(Tiny(), head=["fc2"], precision="int8", filter_fn=lambda m, name: name != "fc1")
    overwrite(model, TINY_EXPONENTS)
    before, opt = state(model), ezo.ElasticZOInt8(model, r_max=40, p_zero=0.0, bits=7, head_bits=7)
    assert [s.names[0] for s in model._ezo.manifest] == ["conv.bias", "conv.weight"]
    steps(opt, 2, tiny_batch, 3)
    changed = {k for k, v in state(model).items() if not torch.equal(v, before[k])}
    assert changed == {"conv.weight", "conv.bias", "fc2.weight", "fc2.bias"}


def test_state_dict_holds_integers_and_their_exponents():
    found = tiny(("fc2",)).state_dict()
    names = {f"{m}.{leaf}" for m in ("conv", "fc1", "fc2") for leaf in ("weight", "bias")}
    assert set(found) == names | {n + "_exponent" for n in names}
    assert all(found[n].dtype == torch.int8 for n in names)
    assert all(t.dtype == torch.int32 and t.shape == (1,) for n, t in found.items() if n.endswith("exponent"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unconvert_gives_exact_floats_in_the_original_classes(dtype):
    if dtype == torch.float64:
        with pytest.raises(NotImplementedError, match="conv"):
            ezo.convert_(Tiny().to(dtype), precision="int8")
        return
    plain = Tiny().to(dtype)
    plain.fc2.bias.requires_grad_(False)
    parameters = dict(plain.named_parameters())
    model = ezo.convert_(plain, head=["fc2"], precision="int8")
    want = {n: p.double() * 2.0 ** model.get_buffer(n + "_exponent").item() for n, p in model.named_parameters()}
    ezo.unconvert_(model)
    assert type(model.conv) is nn.Conv2d and type(model.fc1) is type(model.fc2) is nn.Linear
    assert set(model.state_dict()) == set(want) and not dict(model.named_buffers())
    for name, p in model.named_parameters():
        assert p is parameters[name] and p.dtype == dtype and torch.equal(p.double(), want[name])
        assert p.requires_grad == (name != "fc2.bias")
    assert model(torch.zeros(1, 2, 6, 6, dtype=dtype)).dtype == dtype
    ezo.convert_(model, head=["fc2"], precision="int8")
    assert all(torch.equal(p.double() * 2.0 ** model.get_buffer(n + "_exponent").item(), want[n])
               for n, p in model.named_parameters())  # fmt: skip


def test_conversion_rounds_to_the_least_exponent():
    """Halves away from zero, 127 at most, -7 for zeros; a bias of zeros takes its weight's exponent."""
    model = nn.Sequential(nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -0.5, 0.0234375, -0.0234375]]))
        model[0].bias.zero_()
    ezo.convert_(model, precision="int8")
    assert model[0].weight.tolist() == [[64, -32, 2, -2]] and model[0].weight_exponent.tolist() == [-6]
    assert model[0].bias.tolist() == [0] and model[0].bias_exponent.tolist() == [-6]


def test_a_lone_layer_is_a_model():
    assert ezo.convert_(nn.Linear(4, 1), precision="int8").weight.dtype == torch.int8


def test_methods_that_the_conversion_allows_are_there():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return x.add(self.a(x))

    model = ezo.convert_(Added(), precision="int8")
    ezo.ElasticZOInt8(model).train_step(ints((3, 4), 0), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("precision", ["int8", "float"])
def test_a_second_conversion_is_refused(precision):
    model = tiny()
    before = state(model)
    with pytest.raises(ValueError, match="already"):
        ezo.convert_(model, precision=precision)
    with pytest.raises(ValueError, match="already"):
        ezo.convert_(nn.Sequential(model.fc1, nn.Linear(5, 2)), precision=precision)
    assert same(before, state(model))


def test_quantize_images_is_plain_integers():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    for name, offset in (("mnist", 33), ("fashion_mnist", 73), ("digits", 57)):
        x = quantize_images(images, name)
        want = [(1 if p >= offset else -1) * ((abs(p - offset) + 1) // 2) for p in range(256)]
        assert x.values.flatten().tolist() == want and x.exponent.tolist() == [-5] and x.shape == (1, 1, 16, 16)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("stepped", [False, True])
def test_copies_of_a_converted_model_are_models(copied, stepped):
    model = tiny(("fc2",))
    if stepped:
        ezo.ElasticZOInt8(model).train_step(*tiny_batch())
    other = copied(model)
    assert same(state(model), state(other))
    before = state(other)
    ezo.ElasticZOInt8(model, bits=4, head_bits=4).train_step(*tiny_batch(1))
    assert same(state(other), before), "they share memory"
    ezo.ElasticZOInt8(other, bits=4, head_bits=4).train_step(*tiny_batch(1))
    assert same(state(model), state(other)) and not same(state(other), before)


@pytest.mark.parametrize("precision", ["int8", "float"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_a_model_that_is_watched_are_not_watched(copied, precision):
    model = ezo.convert_(Tiny(), head=0, precision=precision)
    watch = ezo.Diagnostics((ezo.ElasticZOInt8 if precision == "int8" else ezo.ElasticZO)(model))
    hooks = [h for m in copied(model).modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert len(hooks) == 5 and all(hook(None, (), None) is None and hook.may_be_left_out for hook in hooks)
    watch.close()


# ---- a converted model in use


def test_layers_run_outside_a_step_with_the_weights_as_they_are():
    model = lenet(("fc3",))
    x, _ = lenet_batch(4)
    before = model(x)
    steps(ezo.ElasticZOInt8(model, bits=-8, head_bits=-8, rounding="nearest", head_rounding="nearest"), 1)
    after = model(x)
    assert torch.equal(before.values, after.values) and torch.equal(before.exponent, after.exponent)


def test_closure_steps_are_train_steps():
    """The same g and weights, the loss called by the user, once a group."""
    ours, theirs = tiny(), tiny()
    a, b = ezo.ElasticZOInt8(ours, queries=2, bits=4), ezo.ElasticZOInt8(theirs, queries=2, bits=4)
    for i in range(3):
        x, y = tiny_batch(i)
        a.train_step(x, y)
        b.step(lambda x=x, y=y: ezo.ops.int8_cross_entropy(theirs(x), y))
        assert torch.equal(a.losses, b.losses) and torch.equal(a.g, b.g)
    assert same(state(ours), state(theirs))


def test_a_float_loss_decides_the_sign_alone():
    model, other = tiny(), tiny()
    x, y = tiny_batch()
    opt = ezo.ElasticZOInt8(model, loss="float_cross_entropy", bits=4)
    opt.train_step(x, y)
    assert opt.losses.is_floating_point() and opt.g.dtype == torch.int32
    again = ezo.ElasticZOInt8(other, loss="float_cross_entropy", bits=4)
    again.train_step(x, y, loss_fn=lambda logits, y: -F.cross_entropy(logits, y))
    assert torch.equal(opt.g, -again.g) and opt.g.item()
    moves = [
        {n: p.int() - q for (n, p), q in zip(m.named_parameters(), tiny().parameters(), strict=True)}
        for m in (model, other)
    ]
    assert all(torch.equal(moves[0][n], -moves[1][n]) for n in moves[0])


def test_a_frozen_layer_of_integers_is_shown_in_its_kernel():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    frozen, trained = ezo.summary(ezo.convert_(model, head=0, precision="int8")).rows
    assert (
        (frozen.trained, frozen.backend)
        == ("frozen", "int8 reference (numba + torch)")
        == (frozen.trained, trained.backend)
    )


@pytest.mark.parametrize("strategy", ["auto", "buffer", "twice"])
def test_torch_saves_a_model_and_its_optimizer_without_the_last_step(strategy, tmp_path):
    """Accumulators are int32 in the memory of int8 values, which torch.save refuses; and activations are not the model."""
    sizes = []
    for rows in (4, 64):
        model = lenet(("fc3",))
        opt = ezo.ElasticZOInt8(model, strategy=strategy, head_remainder=True)
        x, y = lenet_batch(rows)
        opt.train_step(x, y)
        torch.save(model, tmp_path / "model")
        torch.save(opt, tmp_path / "opt")
        sizes.append((tmp_path / "model").stat().st_size)
        again = torch.load(tmp_path / "opt", weights_only=False)
        assert torch.equal(again.g, opt.g) and torch.equal(again.losses, opt.losses)
        other = torch.load(tmp_path / "model", weights_only=False)
        twin = ezo.ElasticZOInt8(other, strategy=strategy, head_remainder=True)
        twin.load_state_dict(opt.state_dict())
        for one in (opt, again, twin):
            one.train_step(x, y)
        assert same(state(model), state(again.model)) and same(state(model), state(other))
    assert abs(sizes[1] - sizes[0]) < 4096, sizes

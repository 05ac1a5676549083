"""Where perturbed int8 weights are made: the choice, the slabs, too little memory, and that a name changes no bit."""

from __future__ import annotations

import pytest
import torch

import ezo_kernels as ezo
from ezo_kernels import ops
from ezo_kernels.ops import IntegerPerturbation, Noise, _int8_slab
from ezo_kernels.ops._int8_slab import Way, choose, pitch_of, reserve, slabs_of
from ezo_kernels.ops._tiles import SLAB_BYTES
from ezo_kernels.ops.noise import key_tensor
from tests.int8_models import exponents, given, lenet, lenet_batch, randint, same, state

PAIR = (1, -1)


@pytest.mark.parametrize(
    ("rows", "outputs", "columns", "conv", "want"),
    [
        (2048, 4096, 4096, False, "slab"),
        (8192, 8192, 8192, False, "slab"),
        (192, 4096, 4096, False, "slab"),
        (191, 4096, 4096, False, "fused"),
        (64, 8192, 8192, False, "fused"),
        (2048, 4096, 4095, False, "fused"),  # rows of x begin anywhere: the plain kernel would read bytes, too
        (256, 120, 784, False, "fused"),  # LeNet-5
        (256 * 784, 6, 25, True, "fused"),
        (256 * 196, 16, 150, True, "fused"),
        (128 * 56 * 56, 64, 576, True, "slab"),
        (128 * 32 * 32, 256, 2304, True, "slab"),
        (1, 1, 0, False, "fused"),
    ],
)
def test_the_choice(rows, outputs, columns, conv, want):
    assert choose(rows, outputs, columns, PAIR, conv=conv).name == want
    assert choose(rows, outputs, columns, (0,), conv=conv, asked="slab").name == "fused"
    for signs in (PAIR, (1,), (-1,)):
        assert choose(rows, outputs, columns, signs, conv=conv, asked="fused") == Way("fused")
        assert choose(rows, outputs, columns, signs, conv=conv).name == want, "the signs of a pass do not choose"
    if columns:
        assert choose(rows, outputs, columns, PAIR, conv=conv, asked="slab").name == "slab"


@pytest.mark.parametrize("signs", [PAIR, (1,)])
@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (130, 35), (4096, 4096), (8192, 8192), (50_257, 99_336)])
def test_slabs_cover_every_output_once_within_their_memory(outputs, columns, signs):
    way = choose(1 << 14, outputs, columns, signs, conv=False, asked="slab")
    row = len(signs) * pitch_of(columns)
    slabs = slabs_of(outputs, way.workspace_bytes // row)
    assert [first for first, _ in slabs] == [sum(h for _, h in slabs[:i]) for i in range(len(slabs))]
    assert sum(height for _, height in slabs) == outputs and max(h for _, h in slabs) * row == way.workspace_bytes
    assert way.workspace_bytes <= SLAB_BYTES and pitch_of(columns) % 16 == 0 and pitch_of(columns) - columns < 16
    assert len(slabs) == 1 or all(height % 128 == 0 for _, height in slabs[:-1])


def test_a_convolution_is_one_slab():
    assert choose(1 << 14, 512, 4608, PAIR, conv=True).workspace_bytes == 2 * 512 * 4608


@pytest.mark.filterwarnings("ignore:int8_linear. no memory for 500 bytes")
def test_too_little_memory_makes_a_smaller_slab_and_says_so(monkeypatch):
    of, asked = torch.empty, []

    def empty(size, **how):
        asked.append(size)
        if size > 300:
            raise torch.OutOfMemoryError("no")
        return of(size, **how)

    monkeypatch.setattr(_int8_slab.torch, "empty", empty)
    x = torch.zeros(1)
    with pytest.warns(RuntimeWarning, match="int8_linear: no memory for 1000 bytes"):
        assert reserve(Way("slab", 1000), x, 32, "int8_linear").numel() == 250
    with pytest.warns(RuntimeWarning):
        assert reserve(Way("slab", 1000), x, 400, "int8_linear") is None
    assert asked == [1000, 500, 250, 1000, 500]


def test_a_name_changes_no_bit_and_another_is_refused():
    """On a CPU as in the interpreter and on a GPU, where other tests ask for it."""
    p = IntegerPerturbation(key_tensor(1, 2), Noise("sparse_int8", p_zero=0.5), 0, 1, PAIR)
    x, w, b = given(2, 3, 40), randint(9, 40), randint(9)
    how = {"weight_exponent": exponents(-8), "bias_exponent": exponents(-9), "site": 1, "bias_site": 2}
    one, two = (ops.int8_linear(x, w, b, p, weights=name, **how) for name in ("fused", "slab"))
    assert torch.equal(one.values, two.values) and torch.equal(one.exponent, two.exponent)
    with pytest.raises(ValueError, match="weights must be one of auto, fused, slab, got 'memory'"):
        ops.int8_linear(x, w, b, p, weights="memory", **how)
    with pytest.raises(ValueError, match="weights must be one of"):
        ezo.ElasticZOInt8(lenet(), weights="memory")


def test_the_optimizer_hands_the_name_to_its_layers():
    found = []
    for name in ("auto", "fused", "slab"):
        model = lenet(("fc3",))
        opt = ezo.ElasticZOInt8(model, weights=name)
        opt.train_step(*lenet_batch(8))
        assert {layer.weights for layer in (model.conv1, model.fc1, model.fc3)} == {name}
        found.append(state(model))
    assert same(*found[:2]) and same(*found[1:])


def test_a_forward_rounds_as_the_steps_do_before_the_first_one_too():
    """So that a model that goes on from a file gives what it gave."""
    model = lenet()
    opt = ezo.ElasticZOInt8(model, activation_rounding="pseudo")
    x, y = lenet_batch(8)
    opt.train_step(x, y)
    again = lenet()
    again.load_state_dict(model.state_dict())
    ezo.ElasticZOInt8(again, activation_rounding="pseudo").load_state_dict(opt.state_dict())
    assert torch.equal(model(x).values, again(x).values)

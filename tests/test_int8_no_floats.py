"""Between a uint8 image and an int8 weight there is no floating-point number: every operator of a step is looked at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ezo_kernels as ezo
from ezo_kernels.data import quantize_images
from ezo_kernels.ops import Int8Tensor, _int8_conv_cpu, _int8_cpu, _int8_loss_cpu, _library
from tests.int8_models import LENET_HEADS, exponents, lenet, lenet_batch, randint, steps
from tests.test_int8_networks import drawn


def leaves(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


class NoFloats(TorchDispatchMode):
    """Fails at the first floating-point tensor that an operator reads or writes, inside our operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        out = func(*args, **(kwargs or {}))
        for t in leaves((args, kwargs, out)):
            assert not t.is_floating_point() and not t.is_complex(), f"{func} on {t.dtype} {tuple(t.shape)}"
        return out


@pytest.fixture
def inside(monkeypatch):
    """A mode that is on within the CPU implementations as well, where the dispatcher has turned it off."""

    def enter(mode):
        for (name, key), implementation in list(_library.implementations.items()):

            def run(*args, _run=implementation, **kwargs):
                with mode:
                    return _run(*args, **kwargs)

            if name.startswith("int8") and key == "CPU":
                monkeypatch.setitem(_library.implementations, (name, key), run)
        return mode

    return enter


@pytest.mark.parametrize("head", LENET_HEADS, ids=str)
@pytest.mark.parametrize("mode", ["stacked", "sequential"])
def test_no_floating_point_number_in_a_step(head, mode, inside):
    opt = ezo.ElasticZOInt8(lenet(head), mode=mode)
    steps(opt, 1)
    x, y = lenet_batch(8, 1)
    with inside(NoFloats()) as watched:
        opt.train_step(x, y)
    assert {"ezo.int8_linear.default", "ezo.int8_update_.default", "aten.empty.memory_format"} <= watched.seen


@pytest.mark.parametrize("seed", [0, 1, 2, 7])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_no_floating_point_number_in_any_network(seed, loss, inside):
    """Sums of two paths, averages, one-dimensional convolutions, maxima over points; both integer losses."""
    _, model, x, y, recipe = drawn(seed)
    opt = ezo.ElasticZOInt8(model, loss=loss, **recipe)
    target = y if loss == "cross_entropy" else Int8Tensor(randint(len(x), 4), exponents(-6))
    opt.train_step(x, target)
    with inside(NoFloats()) as watched:
        opt.train_step(x, target)
    assert "ezo.int8_linear.default" in watched.seen


def test_no_floating_point_number_between_the_pixels_and_the_weights(inside):
    images = np.random.default_rng(0).integers(0, 256, (8, 28, 28), dtype=np.uint8)
    opt, y = ezo.ElasticZOInt8(lenet(("fc3",))), torch.arange(8)
    opt.train_step(quantize_images(images, "mnist"), y)
    with inside(NoFloats()) as watched:
        opt.train_step(quantize_images(images, "mnist"), y)
    assert "ezo.int8_conv2d.default" in watched.seen


def test_no_numba_kernel_takes_a_float():
    steps(ezo.ElasticZOInt8(lenet(("fc3",)), loss="cross_entropy"), 1)
    compiled = {
        n: f
        for n, f in (vars(_int8_cpu) | vars(_int8_conv_cpu) | vars(_int8_loss_cpu)).items()
        if getattr(f, "nopython_signatures", None)
    }
    assert len(compiled) > 8
    for name, f in compiled.items():
        assert "float" not in str(f.nopython_signatures), name

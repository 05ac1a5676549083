"""Whole integer steps on the kernels: the bits of the reference, for every head, whatever the tile."""

from __future__ import annotations

import dataclasses

import pytest

import ezo_kernels as ezo
from ezo_kernels.ops import Int8UpdatePlan, _int8_conv2d_triton, _int8_matmul_triton, _library
from ezo_kernels.ops._int8_update_triton import update_table
from tests.int8_models import same, state, tiny, tiny_batch


@pytest.fixture(autouse=True)
def plans(monkeypatch, cuda_kernels):
    """Plans with a table of addresses, as CUDA parameters have."""

    def build(cls, params, sites, layouts):
        return cls(tuple(sites), tuple(layouts), tuple(map(cls._address, params)), update_table(params, sites, layouts))

    monkeypatch.setattr(Int8UpdatePlan, "build", classmethod(build))


def run(head, steps: int = 2, **options):
    model = tiny(head)
    opt = ezo.ElasticZOInt8(model, r_max=15, p_zero=0.3, bits=2, head_bits=3, seed=9, **options)
    losses = []
    for i in range(steps):
        opt.train_step(*tiny_batch(i))
        losses.append((opt.losses.tolist(), opt.g.tolist()))
    return losses, state(model)


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ((), {"queries": 2, "strategy": "buffer"}),
        ((), {"rounding": "pseudo", "strategy": "twice", "activation_rounding": "pseudo"}),
        (("fc1", "fc2"), {"mode": "sequential", "queries": 2}),
        (("fc2",), {"queries": 3, "antithetic": False}),
        (("fc1", "fc2"), {"head_grad": "minus", "head_rounding": "pseudo", "fraction_bits": 0}),
    ],
)
def test_steps_are_the_references_bit_for_bit(head, options, on_cpu):
    ours, theirs = run(head, **options), on_cpu(run, head, **options)
    assert ours[0] == theirs[0] and same(ours[1], theirs[1])


@pytest.mark.parametrize("options", [{"head_grad": "minus", "queries": 3}], ids=str)
def test_biases_that_the_update_adds_up(monkeypatch, on_cpu, options):
    """As a GPU has it: errors are kept, and no launch is made for their sum."""
    theirs = on_cpu(run, ("fc1", "fc2"), **options)
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: True)
    ours = run(("fc1", "fc2"), **options)
    assert ours[0] == theirs[0] and same(ours[1], theirs[1])


@pytest.mark.parametrize("size", [16, 64])
def test_tiles_leave_every_bit_alone(monkeypatch, size, on_cpu):
    linear, conv = _int8_matmul_triton.int8_tile, _int8_conv2d_triton.int8_conv_tiles
    monkeypatch.setattr(
        _int8_matmul_triton, "int8_tile", lambda *a: dataclasses.replace(linear(*a), bm=size, bn=size, swap=size == 16)
    )
    monkeypatch.setattr(
        _int8_conv2d_triton, "int8_conv_tiles", lambda *a: dataclasses.replace(conv(*a), bm=size, bn=16, bk=32)
    )
    ours, theirs = run(("fc2",), 1), on_cpu(run, ("fc2",), 1)
    assert ours[0] == theirs[0] and same(ours[1], theirs[1])

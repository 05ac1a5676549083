"""The update in CUDA C++ as NVRTC compiles it: the bits of the reference, inline PTX included."""

from __future__ import annotations

import contextlib
import types

import numpy as np
import pytest
import torch

from bench import csrc
from ezo_kernels import ops
from ezo_kernels.ops import _cuda
from ezo_kernels.ops._update_triton import update_table
from ezo_kernels.ops.noise import Noise, key_tensor
from tests.ptx import machine
from tests.ptx.memory import GlobalMemory
from tests.ptx.parse import parse
from tests.tolerance import assert_bitwise_equal

SITE, F32, F16, BF16 = 0xFEDCBA98, torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def cupy(monkeypatch):
    """CuPy's compilation and launch, by the machine."""

    def function(file, entry, defines, device):
        kernel = parse(csrc.ptx(file, _cuda.compile_options(defines), 90))
        assert kernel.name == entry

        def launch(grid, block, arguments):
            assert block == (kernel.threads,)
            words = [np.atleast_1d(a).view(f"u{a.dtype.itemsize}") for a in arguments]
            machine.launch(kernel, words, (*grid, 1, 1), 0, GlobalMemory([]))

        return launch

    stub = types.SimpleNamespace(cuda=types.SimpleNamespace(Device=lambda index: contextlib.nullcontext()))
    monkeypatch.setattr(_cuda, "require", lambda: stub)
    monkeypatch.setattr(_cuda, "current_stream", lambda cupy, device: contextlib.nullcontext())
    monkeypatch.setattr(_cuda, "_function", function)


def plan(params, layouts, noise, z_dtypes):
    sites = [SITE + i for i in range(len(params))]
    rounded = tuple(name != "float32" for name in z_dtypes or ["float32"] * len(params))
    table = update_table(params, sites, layouts, noise, _cuda.TILE, rounded)
    where = tuple(map(ops.UpdatePlan._address, params))
    return ops.UpdatePlan(tuple(sites), tuple(layouts), where, table, "cuda", rounded, ())


def weights(dtypes):
    params = [torch.randn(35, 264), torch.randn(36, 20).t(), torch.randn(300), torch.randn(6, 5, 3, 3)]
    made = [w.clone() for w in params]
    return [w.to(dtypes[i % len(dtypes)]) for i, w in enumerate(made)], ["matrix", "matrix", "matrix", "conv"]


def check(on_cpu, noise, dtypes, keys, coef, z_dtypes=None):
    params, layouts = weights(dtypes)
    ours, theirs = ([w.clone() for w in params] for _ in "ab")
    how = {"sites": [SITE + i for i in range(len(params))], "layouts": layouts, "noise": noise}
    ops.update_(ours, keys, coef, plan=plan(ours, layouts, noise, z_dtypes), **how)
    on_cpu(ops.update_, theirs, keys, coef, z_dtypes=z_dtypes, **how)
    for a, b, w in zip(ours, theirs, params, strict=True):
        assert_bitwise_equal(a, b)
        assert not torch.equal(a, w)


@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F32, F16, BF16)], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "clt4", "uniform", "hadamard", "rademacher", "sparse"])
def test_noises(on_cpu, key, name, dtypes):
    noise = Noise(name, 7, 0.7 if name == "sparse" else 0.0)
    check(on_cpu, noise, dtypes, key, torch.tensor([0.01]))


def test_several_steps_and_queries(on_cpu):
    keys = torch.stack([key_tensor(5, 6), key_tensor(1 << 63, 1 << 40)])
    check(on_cpu, Noise("gaussian", 10), (F32, BF16), keys, torch.tensor([[0.1, -0.2], [0.0, 0.3]]))


def test_z_of_the_weights_dtype(on_cpu, key):
    check(on_cpu, Noise("gaussian"), (BF16,), key, torch.tensor([0.3]), ["bfloat16"] * 4)

"""The kernels on CPU tensors, in a process of its own, started by tests/test_interpreter.py: interpreted, or compiled.

The fixture ``cuda_kernels`` makes the public functions run their CUDA launchers on CPU tensors; ``on_cpu(fn)``
runs the CPU reference inside such a test, for comparison. The interpreter proves indexing, masks, shapes and strides in
fp32, fp16 and int8; it is wrong for bf16 and its fma is not fused, so the gaussian is compared to 2e-6.
"""

from __future__ import annotations

import os

import pytest

from ezo_kernels.ops import _library
from ezo_kernels.ops.noise import Noise, key_tensor

if ARCH := int(os.environ.get("EZO_TESTS_PTX", "0")):
    from tests.ptx.driver import install

    install(ARCH)
elif os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]

#: Every noise that a float weight takes, sparse with its own p_zero. Then the error allowed: none where it is exact.
NOISES = {
    "gaussian": (Noise("gaussian"), 2e-6),
    "clt4": (Noise("clt4"), 0.0),
    "uniform": (Noise("uniform"), 0.0),
    "hadamard": (Noise("hadamard"), 0.0),
    "rademacher": (Noise("rademacher"), 0.0),
    "sparse": (Noise("sparse", p_zero=0.7), 8e-6),
}


@pytest.fixture(autouse=True)
def cuda_kernels(monkeypatch):
    """Route the CPU key of every operator to its CUDA launcher."""
    for name, key in list(_library.implementations):
        if key == "CPU":
            monkeypatch.setitem(_library.implementations, (name, "CPU"), _library.implementations[name, "CUDA"])


#: The CPU implementations as they were imported, before the fixture.
_REFERENCE = dict(_library.implementations)


@pytest.fixture
def on_cpu(cuda_kernels):
    """``on_cpu(fn, *args, **kwargs)`` calls fn with the CPU reference in place."""

    def call(fn, *args, **kwargs):
        routed = dict(_library.implementations)
        _library.implementations.update(_REFERENCE)
        try:
            return fn(*args, **kwargs)
        finally:
            _library.implementations.update(routed)

    return call


@pytest.fixture(params=list(NOISES))
def noise(request):
    return NOISES[request.param]


@pytest.fixture
def key():
    return key_tensor(0x0123456789ABCDEF, 77)

"""The CUDA C++ compiled for GPUs that are not here, by the compiler that CuPy uses."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton's disassembler")

from bench import csrc  # noqa: E402
from ezo_kernels.ops import _cuda, update  # noqa: E402
from ezo_kernels.ops._noise_triton import NOISE_ID  # noqa: E402
from ezo_kernels.ops._variants import ARCHS  # noqa: E402

pytestmark = pytest.mark.compile
needs_nvrtc = pytest.mark.skipif(csrc.nvrtc() is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")
FLOAT = [name for name in NOISE_ID if name != "sparse_int8"]

#: (noise, dtype) -> instructions for one weight on sm_90, as counted and a little more.
BOUNDS = {
    ("gaussian", "bf16"): 46.5,
    ("gaussian", "bf16 z"): 48.0,
    ("gaussian", "fp32"): 39.5,
    ("clt4", "bf16"): 30.5,
    ("clt4", "fp16 z"): 45.5,
    ("gaussian_fast", "bf16"): 30.5,
    ("rademacher", "bf16"): 24.0,
    ("hadamard", "bf16"): 25.5,
    ("sparse", "fp16"): 71.0,
}


@needs_nvrtc
@pytest.mark.parametrize(("noise", "dtype"), BOUNDS)
def test_machine_code_for_sm_90(noise, dtype):
    row = csrc.update(noise, dtype, 90)
    assert not row.faults()
    assert row.per_weight <= BOUNDS[noise, dtype]


@needs_nvrtc
@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != 90])
def test_every_architecture_compiles_without_spills(arch):
    assert not csrc.update("gaussian", "bf16", arch).faults()


@needs_nvrtc
@pytest.mark.parametrize(("noise", "dtype"), [("gaussian", "bf16"), ("hadamard", "fp16"), ("sparse", "fp32")])
def test_several_steps_compile_without_spills(noise, dtype):
    assert not csrc.update(noise, dtype, 90, one=False, rounds=10, stochastic=False).faults()
    assert not csrc.update(noise, dtype, 90, one=False).faults()
    if dtype != "fp32":
        assert not csrc.update(noise, dtype + " z", 90, one=False).faults()


@needs_nvrtc
def test_what_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="EZO_"):
        csrc.cubin("update.cu", _cuda.OPTIONS, 90)


def test_a_source_has_its_headers_in_it_once():
    text = _cuda.source("update.cu")
    assert not re.search(r'^#include "', text, re.M)
    assert text.count("namespace ezo {") == 2 and text.index("philox(") < text.index("advance(") < text.index(
        "ezo_update("
    )
    assert "--fmad=false" in _cuda.compile_options({})


def test_a_noise_that_is_cheaper_here_is_one_that_exists():
    assert set(update.FASTER_IN_CUDA) <= set(FLOAT)


@pytest.mark.parametrize("version", [13, 14])
def test_torchs_stream_goes_to_cupy_by_what_it_has(version, monkeypatch):
    """ExternalStream(address, device) up to CuPy 13; from 14 on it warns, and there is Stream.from_external."""
    protocol = {"from_external": staticmethod(lambda stream: ("from_external", *stream.__cuda_stream__()))}
    stream = type("Stream", (), protocol if version == 14 else {})
    cupy = SimpleNamespace(cuda=SimpleNamespace(Stream=stream, ExternalStream=lambda *args: ("ExternalStream", *args)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0xABC))
    wanted = ("ExternalStream", 0xABC, 1) if version == 13 else ("from_external", 0, 0xABC)
    assert _cuda.current_stream(cupy, torch.device("cuda", 1)) == wanted


def test_importing_the_package_imports_no_cupy():
    code = "import sys, ezo_kernels, ezo_kernels.ops._cuda; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0

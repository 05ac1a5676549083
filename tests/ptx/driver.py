"""A driver of Triton whose GPU is :mod:`.machine`: launches on CPU tensors compile as for a GPU, and their PTX runs here."""

from __future__ import annotations

import collections
import struct
import types

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from . import machine
from .memory import GlobalMemory
from .parse import parse

#: what a launch may ask of a GPU of each kind: bytes of shared memory and multiprocessors of an A100 and an H100
PROPERTIES = {
    80: {"max_shared_mem": 166912, "multiprocessor_count": 108},
    90: {"max_shared_mem": 232448, "multiprocessor_count": 132},
}
_INTEGERS = {
    "i1": "u1",
    "i8": "i1",
    "i16": "i2",
    "i32": "i4",
    "i64": "i8",
    "u8": "u1",
    "u16": "u2",
    "u32": "u4",
    "u64": "u8",
}


def _argument(value, kind: str) -> np.ndarray:
    """The bytes of an argument as one unsigned word."""
    if kind.startswith("*"):
        return np.array([0 if value is None else value.data_ptr()], np.uint64)
    if kind in _INTEGERS:
        own = np.array([int(value)]).astype(_INTEGERS[kind])
        return own.view(f"u{own.dtype.itemsize}")
    if kind == "fp32":
        return np.frombuffer(struct.pack("f", value), np.uint32)
    raise NotImplementedError(f"an argument of type {kind}")


class PTXDriver:
    """As much of a CUDA driver as a launch asks for."""

    def __init__(self, arch: int):
        self.arch = arch
        self.launcher_cls = self._launcher
        #: name of a kernel -> how often it ran, and how many instructions in all
        self.launches, self.instructions = collections.Counter(), collections.Counter()
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: PROPERTIES[arch], load_binary=self._load
        )

    def _launcher(self, source, metadata):
        kinds = list(source.signature.values())

        def launch(x, y, z, stream, function, packed, launch_metadata, on_enter, on_exit, *values):
            kernel, shared = function
            given = [(v, k) for v, k in zip(values, kinds, strict=True) if k != "constexpr"]
            arguments = [_argument(v, k) for v, k in given]
            arguments += [np.zeros(1, np.uint64)] * (
                len(kernel.parameters) - len(arguments)
            )  # scratch that none asks for
            tensors = [v for v, _ in given if isinstance(v, torch.Tensor)]
            ordered = any("acq_rel" in instruction.opcode for instruction in kernel.code)
            memory = GlobalMemory(tensors, apart=not ordered)
            steps = machine.launch(kernel, arguments, (x, y, z), shared, memory)
            self.launches[source.fn.__name__] += 1
            self.instructions[source.fn.__name__] += steps

        return launch

    @staticmethod
    def _load(name, code, shared, device):
        return "module", (parse(code.decode()), shared), 0, 0, 1024

    def get_current_device(self):
        return self.arch << 20  # no number that a GPU of this machine has

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


def install(arch: int) -> PTXDriver:
    """Take every launch of this process from now on. The cache of compiled kernels must be its own: it will hold PTX."""
    CUDABackend.make_cubin = lambda self, source, metadata, options, capability: source.encode()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is full of NaN, or of the largest integer
    driver = PTXDriver(arch)
    triton.runtime.driver.set_active(driver)
    return driver

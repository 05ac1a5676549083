"""A pytest plugin: tests of a GPU where there is none. What asks for CUDA gets a CPU tensor, an operator of ours its compiled
kernel, whose PTX is carried out here.

    EZO_TESTS_PTX=90 TRITON_CACHE_DIR=$(mktemp -d) python -m pytest -p tests.ptx.as_gpu tests/test_gpu_head.py

It finds a wrong number and a tolerance that a right kernel would miss; with many processors it takes tens of minutes for all.
z of a comparison stays the reference's (``materialize``), but any other operator of ours on the CPU is the kernel itself here.
Waits, graphs, streams, CUDA's libraries and the assembler's part are not seen, and ``gaussian_fast`` is not there.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .driver import install


def _here(value):
    """``value``, or the CPU where it names a CUDA device."""
    return torch.device("cpu") if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value


class OnCPU(TorchFunctionMode):
    """Devices of CUDA are the CPU, whose tensors say that they are on CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        if func == torch.Tensor.is_cuda.__get__:
            return True
        kwargs = {name: _here(value) for name, value in (kwargs or {}).items()}
        return func(*map(_here, args), **kwargs)


def pytest_configure(config):
    install(int(os.environ["EZO_TESTS_PTX"]))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu"):  # conftest has found no GPU
            item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "skip"]


@pytest.fixture(autouse=True)
def _as_gpu(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    from ezo_kernels.ops import _library

    for name, key in list(_library.implementations):
        if key == "CPU" and name != "noise":
            monkeypatch.setitem(_library.implementations, (name, key), _library.implementations[name, "CUDA"])
    monkeypatch.setattr(_library, "bound_by_launches", lambda device: device.type != "meta")
    monkeypatch.setattr(nn.Module, "cuda", lambda self, *_: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with OnCPU():
        yield

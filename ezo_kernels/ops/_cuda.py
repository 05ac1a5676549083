"""The update in CUDA C++ (csrc/update.cu), compiled by NVRTC through CuPy and launched on torch's current stream.

CuPy is optional (extras ``cuda12``, ``cuda13``) and imported by the first launch. A module is kept for each (defines,
architecture); CuPy's own cache on disk goes by the source, which has the headers in it.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import numpy as np
import torch

from ._noise_triton import NOISE_ID, noise_args
from ._tiles import ElementTile
from ._update_triton import FIELDS, FLAGS, code_of

FOLDER = Path(__file__).with_name("csrc")
#: Wide tiles: a thread keeps its columns over several rows, so that what depends on the column alone is made once.
TILE = ElementTile(32, 256, 4)
#: Fusion would round the forward's z unlike the update's.
OPTIONS = ("--std=c++17", "--fmad=false")
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.M)


@functools.cache
def source(name: str) -> str:
    """A file of csrc with the headers it includes in their place, each once."""
    seen = set()

    def inline(match) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return _INCLUDE.sub(inline, (FOLDER / match[1]).read_text().replace("#pragma once\n", ""))

    return _INCLUDE.sub(inline, (FOLDER / name).read_text())


def update_defines(noise_id: int, rounds: int, stochastic: bool, one: bool, codes) -> dict[str, int]:
    """What update.cu is compiled with.

    Args:
        noise_id: of ``NOISE_ID``.
        stochastic: rounding of 16-bit weights.
        one: one step of one query.
        codes: of the parameters, those that occur (``_update_triton.code_of``).
    """
    hadamard, sparse = noise_id == NOISE_ID["hadamard"], noise_id == NOISE_ID["sparse"]
    return {
        "EZO_NOISE": noise_id,
        "EZO_ROUNDS": rounds,
        "EZO_STOCHASTIC": int(stochastic),
        "EZO_ONE": int(one),
        "EZO_R": TILE.rows,
        "EZO_C": TILE.columns,
        "EZO_THREADS": 32 * TILE.warps,
        # registers that a thread may have, as blocks an SM must hold
        "EZO_BLOCKS": 2 if hadamard else 5 if sparse else 6,
        **{f"EZO_{flag}": int(code in codes) for code, flag in enumerate(FLAGS)},
    }


def compile_options(defines: dict[str, int]) -> tuple[str, ...]:
    """Options of NVRTC for ``defines``."""
    return (*OPTIONS, *(f"-D{name}={value}" for name, value in defines.items()))


@functools.cache
def available() -> bool:
    """Whether CuPy is installed; it is not imported."""
    return importlib.util.find_spec("cupy") is not None


def require():
    """CuPy, or ImportError naming the extra that installs it."""
    if not available():
        raise ImportError("strategy 'cuda' needs CuPy: pip install ezo-kernels[cuda12] (or [cuda13])")
    import cupy

    return cupy


_functions: dict[tuple, object] = {}


def _function(file: str, entry: str, defines: dict[str, int], device: torch.device):
    cupy = require()
    capability = torch.cuda.get_device_capability(device)
    key = (file, entry, tuple(defines.items()), capability, device.index)
    if key not in _functions:
        module = cupy.RawModule(code=source(file), options=compile_options(defines), backend="nvrtc")
        _functions[key] = module.get_function(entry)
    return _functions[key]


class _Torchs:
    """The address of a stream by the protocol of CUDA streams, which those of torch 2.8 do not speak."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


def current_stream(cupy, device: torch.device):
    """torch's current stream as one of CuPy's; ExternalStream is deprecated from CuPy 14 on."""
    address = torch.cuda.current_stream(device).cuda_stream
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Torchs(address))
    return cupy.cuda.ExternalStream(address, device.index)


def launch_update(params, keys, coef, table, rounded, query, stochastic, noise) -> None:
    """As ``_update_triton.launch_update``, with a table of :data:`TILE`."""
    programs = table.numel() - len(params) * FIELDS
    if programs <= 0:
        return
    cupy = require()
    threshold, scale = noise_args(noise)
    steps, queries = coef.shape
    codes = {code_of(w.dtype, rounds_z, noise) for w, rounds_z in zip(params, rounded, strict=True)}
    defines = update_defines(NOISE_ID[noise.name], noise.rounds, stochastic, steps == 1 and queries == 1, codes)
    ints = [np.int32(n) for n in (len(params), steps, queries, query, threshold)]
    pointers = [np.uint64(t.data_ptr()) for t in (table, keys, coef)]
    with cupy.cuda.Device(table.device.index), torch.cuda.device_of(table):
        function = _function("update.cu", "ezo_update", defines, table.device)
        with current_stream(cupy, table.device):
            function((programs,), (32 * TILE.warps,), (*pointers, *ints, np.float32(scale)))

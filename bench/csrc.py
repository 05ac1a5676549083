"""The CUDA C++ of the library compiled by NVRTC for GPUs that are not here, and what became of it.

``python -m bench.csrc`` prints a row for each (noise, dtype, architecture). NVRTC is the compiler that CuPy uses; it comes
as a wheel (``nvidia-cuda-nvrtc-cu12``, extra ``dev``) and needs no driver.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from bench import static
from ezo_kernels.ops import _cuda
from ezo_kernels.ops._noise_triton import NOISE_ID
from ezo_kernels.ops._variants import ARCHS

#: dtype of the weights, and of z -> code of the table
DTYPES = {"fp32": 0, "bf16": 1, "fp16": 2, "bf16 z": 3, "fp16 z": 4}
#: What CuPy adds to the options of every module, behind them.
CUPY = ("-ftz=true", "--device-as-default-execution-space")
#: Arithmetic that would see a subnormal as zero; other comparisons and roundings to an integer may.
FLUSHES = re.compile(r"(FADD|FMUL|FFMA|FSETP\.(NEU|EQ))\b.*\.FTZ")


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """NVRTC of the wheel, or None."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
    except ModuleNotFoundError:
        spec = None
    folders = map(Path, spec.submodule_search_locations) if spec else ()
    found = next((p for folder in folders for p in folder.glob("lib/libnvrtc.so.*")), None)
    return ctypes.CDLL(str(found)) if found else None


def cubin(name: str, options, arch: int) -> bytes:
    """Machine code of a file of csrc.

    Raises:
        RuntimeError: what NVRTC says of it.
    """
    return _compiled(name, options, f"sm_{arch}", "CUBIN")


def ptx(name: str, options, arch: int) -> str:
    """The PTX of a file of csrc; raises as :func:`cubin`."""
    return _compiled(name, options, f"compute_{arch}", "PTX").rstrip(b"\0").decode()


def _compiled(name: str, options, target: str, kind: str) -> bytes:
    lib, program = nvrtc(), ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(program), _cuda.source(name).encode(), name.encode(), 0, None, None)
    options = [option.encode() for option in (*options, *CUPY, f"-arch={target}")]
    failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    what = "ProgramLog" if failed else kind
    read = (getattr(lib, f"nvrtcGet{what}Size"), getattr(lib, f"nvrtcGet{what}"))
    size = ctypes.c_size_t()
    read[0](program, ctypes.byref(size))
    out = ctypes.create_string_buffer(size.value)
    read[1](program, out)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(out.value.decode())
    return out.raw


@dataclass(frozen=True)
class Count:
    """One compiled update.

    ``per_weight``: instructions of the loop over rows of 16-byte accesses, for one weight a thread; the few that only a NaN
    runs are in it, what a program does once is not.
    """

    registers: int
    local_bytes: int
    spills: int
    calls: int
    flushes: int
    wide_loads: int
    wide_stores: int
    philox_multiplies: int
    per_weight: float

    def faults(self) -> list[str]:
        """What is wrong with it: empty if nothing is."""
        found = [f"{n} {what}" for n, what in (
            (self.local_bytes, "bytes of local memory"), (self.spills, "spills"), (self.calls, "calls"),
            (self.flushes, "operations that flush subnormals"),
        ) if n]  # fmt: skip
        found += [f"no {what}" for n, what in (
            (self.wide_loads, "16-byte load"), (self.wide_stores, "16-byte store"), (self.philox_multiplies, "noise"),
        ) if not n]  # fmt: skip
        return found


def update(noise: str, dtype: str, arch: int, stochastic: bool = True, one: bool = True, rounds: int = 7) -> Count:
    """Compile the update for weights of one dtype (``bf16 z``: z is rounded to it), and count."""
    defines = _cuda.update_defines(NOISE_ID[noise], rounds, stochastic, one, {DTYPES[dtype]})
    usage, sass = static.disassemble(cubin("update.cu", _cuda.compile_options(defines), arch))
    instructions, loops = static.parse(sass)
    opcodes = [opcode for opcode, _ in instructions]

    def wide(first, last, kind):
        return sum(o.startswith(kind) and o.endswith(".128") for o in opcodes[first : last + 1])

    columns = max(4 if dtype == "fp32" else 8, {"hadamard": 32, "sparse": 8}.get(noise, 4))
    rows = [last - first + 1 for first, last in loops if wide(first, last, "LDG")]
    everything = (0, len(opcodes))
    return Count(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        local_bytes=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        spills=sum(o.startswith(("STL", "LDL")) for o in opcodes),
        calls=sum(map(static.is_call, instructions)),
        flushes=sum(bool(FLUSHES.match(o)) for o in opcodes),
        wide_loads=wide(*everything, "LDG"),
        wide_stores=wide(*everything, "STG"),
        philox_multiplies=static.philox_multiplies(instructions),
        per_weight=round(min(rows) / columns, 2) if rows else float("nan"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    args = parser.parse_args()
    faulty = 0
    for arch in args.arch:
        for dtype in DTYPES:
            for noise in (n for n in NOISE_ID if n != "sparse_int8"):
                row = update(noise, dtype, arch)
                faulty += bool(row.faults())
                print(
                    f"sm_{arch} {dtype} {noise:14} {row.per_weight:6.2f} a weight, {row.registers:3} registers, "
                    f"{row.wide_loads} LDG.128, {row.wide_stores} STG.128 {'; '.join(row.faults())}",
                    flush=True,
                )
    return 1 if faulty else 0


if __name__ == "__main__":
    raise SystemExit(main())

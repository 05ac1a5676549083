"""What a kernel is compiled as: one launch configuration, as the static report and the compile tests see it.

Each ``_*_triton.py`` yields its own from ``variants()``, built by the code that also chooses its launches, so that what
is counted without a GPU is what runs on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Compute capabilities that kernels are compiled for: A100, A10 / 30xx, L4 / 40xx, H100 / H200, B200, 50xx.
ARCHS = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Args:
        kernel: the ``jit`` function.
        name: unique in the library, ``kernel/dtype/noise/...``: a row of the static report.
        signature: run-time argument -> Triton type (``*fp32``, ``i32``, ...).
        constexprs: argument -> value; also the arguments that are passed as None. With ``signature`` it names every
            argument of the kernel.
        num_warps, num_stages: as launched.
        maxnreg: most registers a thread, as launched; 0: the assembler chooses, which may spill a few to run more programs at
            a time on a multiprocessor.
        archs: compute capabilities that the variant is for, among :data:`ARCHS`.
        expects: what the SASS must have: ``mma`` (a matrix instruction), ``integer mma`` (an int8 one), ``ieee`` (none of
            floats: no tensor core multiplies fp32 without rounding it first), ``multiply``
            (Philox's wide multiplies: proof that the noise was not folded away). And what it may have, which is a fault
            elsewhere: ``call`` (an exact division has a routine for operands that are nearly denormal).
        z_per_loop: values of z that one iteration of the innermost loop makes, over the whole program; 0 if unknown.
        loop_warps: that run this loop; 0: all.
        z_per_program: the same of a program without a loop.
        divisible: integer arguments known to be multiples of 16; pointers always are.
        representative: compiled by the tests too, for sm_90 and once elsewhere; the others are the report's alone.
    """

    kernel: Any
    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    archs: tuple[int, ...] = ARCHS
    expects: tuple[str, ...] = ("multiply",)
    z_per_loop: int = 0
    loop_warps: int = 0
    z_per_program: int = 0
    divisible: tuple[str, ...] = ()
    maxnreg: int = 0
    representative: bool = True

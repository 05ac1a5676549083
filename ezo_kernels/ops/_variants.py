"""What a kernel is compiled as: one launch configuration, as the static report and the compile tests see it.

Each ``_*_triton.py`` yields its own from ``variants()``, built by the code that also builds its launches, so that what is
counted without a GPU is what runs on one.
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
        name: unique among the library's variants, ``kernel/dtype/noise/...``: a row of the static report.
        signature: run-time argument -> Triton type (``*fp32``, ``i32``, ...). Arguments in neither this nor ``constexprs``
            are an error.
        constexprs: argument -> value; also arguments passed as None.
        num_warps, num_stages: as launched.
        archs: compute capabilities that the variant is for, among :data:`ARCHS`.
        expects: what the SASS must have: ``mma`` (a matrix instruction), ``multiply`` (Philox's wide multiplies), ``integer
            mma`` (an int8 one).
        z_per_loop: noise values that one iteration of the innermost loop makes, over the whole program; 0 if there is no
            loop, and then instructions a z are counted over the whole kernel with ``z_per_program``.
        z_per_program: noise values of a program without a loop.
        divisible: integer arguments known to be multiples of 16; pointers always are.
        representative: one of the few that the compile tests build for sm_90 and elsewhere; the others are the report's.
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
    z_per_program: int = 0
    divisible: tuple[str, ...] = ()
    representative: bool = True

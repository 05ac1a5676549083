"""What each step of making noise costs: a ladder of generators, from what a library's randn does to the contract's cheapest.

    acc[r, c] += z(row r, column c)      over tiles of BLOCK columns, so that nothing but the noise is made

| value | shape |
|---|---|
| acc, z of a tile | fp32 [ROWS, BLOCK] |
| out, summed | fp32 [rows] |
| out, stored | fp32 [rows, columns] |

A rung differs from the one above by one thing and says which. Those whose bits are the contract's are compared with it, the
others with the moments of a normal, before they are timed (``bench/bench_ladder.py``). ``python -m bench ladder`` counts
instructions a value without a GPU; one of them is the addition to acc.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import static
from ezo_kernels.ops import _noise_triton as N
from ezo_kernels.ops._triton import constexpr, jit, tl
from ezo_kernels.ops._variants import Variant
from ezo_kernels.ops.noise import Noise

ROWS, BLOCK, WARPS = 64, 64, 4
SITE = 3
ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Rung:
    """One way of making z.

    Args:
        name: as tables have it.
        noise: whose z it makes; None for raw words.
        reason: what it changes against the rung that it is compared with.
        contract: whether its bits are those of docs/rng.md.
    """

    name: str
    noise: str | None
    reason: str
    contract: bool
    rounds: int = 7
    wide: bool = True  # inline wide multiplies
    linear: bool = False  # one counter for every block, as a library's rand has it
    transform: str = "own"


RUNGS = (
    Rung("words, linear counter", None, "10 rounds, 64-bit products as LLVM splits them", False, 10, False, True),
    Rung("words, wide multiply", None, "one multiply a product, inline", False, 10, True, True),
    Rung("words, rows and columns", None, "the contract's counter: three rounds leave the loop or the tile", False, 10),
    Rung("words", None, "7 rounds", False),
    Rung("gaussian, libdevice", "gaussian", "log, sqrt, sin, cos of CUDA's library", False, transform="library"),
    Rung("gaussian", "gaussian", "the contract's polynomials: the same bits everywhere", True),
    Rung("gaussian_fast", "gaussian_fast", "the special function unit", False),
    Rung("clt4, shifts", "clt4", "the bytes of a word summed by shifts and masks", True, transform="shifts"),
    Rung("clt4", "clt4", "by one dp4a", True),
    Rung("uniform", "uniform", "no transform: a conversion and a product", True),
    Rung("rademacher, bit by bit", "rademacher", "every column shifts its own bit", True, transform="bits"),
    Rung("rademacher", "rademacher", "32 columns a word, by joins", True),
    Rung("hadamard, bf16", "hadamard", "bytes mixed by bf16 products", True, transform="bf16"),
    Rung("hadamard", "hadamard", "by int8 products", True),
)  # fmt: skip

_WORDS, _LIBRARY, _SHIFTS, _BITS, _BF16 = constexpr(-1), constexpr(-2), constexpr(-3), constexpr(-4), constexpr(-5)
_CODES = {"library": -2, "shifts": -3, "bits": -4, "bf16": -5}


@jit
def _library_pair(w0, w1):
    u = tl.fma(w0.to(tl.float32), N._TWO_M32, N._TWO_M33)
    r = tl.sqrt(tl.log(u) * -2.0)
    angle = w1.to(tl.int32, bitcast=True).to(tl.float32) * (N._TWO_M32 * 2.0 * N._PI)
    return r * tl.cos(angle), r * tl.sin(angle)


@jit
def _tile(
    k0, k1, site, rows, first, columns, KIND: tl.constexpr, ROUNDS: tl.constexpr, WIDE: tl.constexpr, LINEAR: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """z fp32 [ROWS, BLOCK] of the tile at column ``first``, of query 0."""
    units = (first + tl.arange(0, BLOCK // UNIT) * UNIT).to(tl.uint32)[None, :]
    if KIND == _WORDS:
        if LINEAR:
            zero = units * 0
            w0, w1, w2, w3 = N.philox(
                rows * columns.to(tl.uint32) + (units >> 2), zero, site + zero, zero, k0, k1, ROUNDS, WIDE
            )
        else:
            w0, w1, w2, w3 = N.philox(site, units >> 2, site * 0, rows, k0, k1, ROUNDS, WIDE)
        z = N._interleave4(w0, w1, w2, w3).to(tl.float32, bitcast=True)
    elif KIND == _LIBRARY:
        w0, w1, w2, w3 = N.philox(site, units >> 2, site * 0 + N._S_GAUSSIAN, rows, k0, k1, ROUNDS, WIDE)
        z0, z1 = _library_pair(w0, w1)
        z2, z3 = _library_pair(w2, w3)
        z = N._interleave4(z0, z1, z2, z3)
    elif KIND == _SHIFTS:
        w0, w1, w2, w3 = N.philox(site, units >> 2, site * 0 + N._S_CLT4, rows, k0, k1, ROUNDS, WIDE)
        z = N._interleave4(N._clt4(w0, False), N._clt4(w1, False), N._clt4(w2, False), N._clt4(w3, False))
    elif KIND == _BITS:
        word = N.rademacher_words(k0, k1, site, site * 0, rows, units, ROUNDS, WIDE)
        c = tl.arange(0, 32)[None, None, :].to(tl.uint32)
        bit = (word[:, :, None] >> ((c & 1) * 16 + (c >> 1))) & 1
        z = tl.reshape(((bit << 31) | 0x3F800000).to(tl.float32, bitcast=True), (word.shape[0], BLOCK))
    elif KIND == _BF16:
        block = (units >> 4)[:, :, None] + tl.arange(0, 2)[None, None, :].to(tl.uint32)
        block = tl.reshape(block, (1, BLOCK // UNIT * 2))
        w0, w1, w2, w3 = N.philox(site, block, site * 0 + N._S_HADAMARD, rows, k0, k1, ROUNDS, WIDE)
        words = N._interleave4(w0, w1, w2, w3).to(tl.int32, bitcast=True)
        octets = N._interleave4(words, words >> 8, words >> 16, words >> 24).to(tl.int8)
        mixed = tl.dot(octets.to(tl.bfloat16), N._sylvester(BLOCK).to(tl.bfloat16))
        z = tl.where(((tl.arange(0, BLOCK) & 31) == 0)[None, :], mixed + 16.0, mixed) * N._HADAMARD
    else:
        z = N.z_units(k0, k1, site, site * 0, rows, units, KIND, ROUNDS, UNIT, ASM, 0, 1.0)
    return z


@jit
def ladder_kernel(
    key_ptr, out_ptr, site, columns, KIND: tl.constexpr, ROUNDS: tl.constexpr, WIDE: tl.constexpr, LINEAR: tl.constexpr,
    UNIT: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    k0, k1 = N.load_key(key_ptr)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = at.to(tl.uint32)[:, None]
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, columns, BLOCK):
        z = _tile(k0, k1, site.to(tl.uint32), rows, first, columns, KIND, ROUNDS, WIDE, LINEAR, UNIT, BLOCK, ASM)
        if STORE:
            tl.store(out_ptr + at[:, None] * columns + first + tl.arange(0, BLOCK)[None, :], z)
        else:
            acc += z
    if not STORE:
        tl.store(out_ptr + at, tl.sum(acc, axis=1))


def constexprs(rung: Rung, store: bool, asm: bool) -> dict:
    kind = -1 if rung.noise is None else _CODES.get(rung.transform, N.NOISE_ID[rung.noise])
    unit = 4 if rung.noise is None else N.UNIT[rung.noise]
    return {
        "KIND": kind, "ROUNDS": rung.rounds, "WIDE": rung.wide and asm, "LINEAR": rung.linear, "UNIT": unit,
        "STORE": store, "ROWS": ROWS, "BLOCK": BLOCK, "ASM": asm,
    }  # fmt: skip


def make(rung: Rung, key: torch.Tensor, rows: int, columns: int, *, store: bool = False) -> torch.Tensor:
    """Run a rung: the sum of each row's z, fp32 [rows], or with ``store`` z itself, fp32 [rows, columns].

    Args:
        key: int32 [2], folded.
        rows, columns: multiples of 64.
    """
    if rows % ROWS or columns % BLOCK or rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be positive multiples of {ROWS} and {BLOCK}, got {rows} and {columns}")
    out = torch.empty((rows, columns) if store else (rows,), device=key.device)
    ladder_kernel[(rows // ROWS,)](
        key, out, SITE, columns, **constexprs(rung, store, N.ASM), num_warps=WARPS, enable_fp_fusion=False
    )
    return out


def check(rung: Rung, z: torch.Tensor, truth: torch.Tensor) -> None:
    """AssertionError unless ``z``, as stored, is what the rung says: the contract's ``truth``, or normal to a few moments."""
    if rung.contract:
        assert torch.equal(z, truth) or (rung.noise == "gaussian" and (z - truth).abs().max() < 2e-6), rung.name
    elif rung.noise is None:
        words = z.view(torch.int32).double() / 2.0**31
        assert abs(words.mean()) < 0.01 and abs(words.square().mean() - 1 / 3) < 0.01, rung.name
    else:
        assert abs(z.mean()) < 0.02 and abs(z.square().mean() - 1) < 0.03 and abs(z.pow(4).mean() - 3) < 0.2, rung.name


def variant(rung: Rung) -> Variant:
    """The summing kernel of a rung, for :func:`bench.static.measure`."""
    return Variant(
        kernel=ladder_kernel,
        name=f"ladder/{rung.name}",
        signature={"key_ptr": "*i32", "out_ptr": "*fp32", "site": "i32", "columns": "i32"},
        constexprs=constexprs(rung, False, True),
        num_warps=WARPS,
        num_stages=1,
        z_per_loop=ROWS * BLOCK,
        divisible=("columns",),
    )


def spec(rung: Rung) -> Noise:
    """The contract's noise that a rung of the contract makes."""
    return Noise(rung.noise, rung.rounds)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS, help="only these architectures")


def run(args: argparse.Namespace) -> int:
    import triton

    rows = []
    for rung in RUNGS:
        for arch in args.arch:
            row = static.measure(variant(rung), arch)
            rows.append({"rung": asdict(rung), **asdict(row)})
            print(
                f"{rung.name:26} sm_{arch} {row.instructions_per_z:6.1f} a value {row.registers:4} registers",
                flush=True,
            )
            if row.spill_bytes or row.local_bytes:
                print(
                    f"{rung.name} on sm_{arch}: {row.spill_bytes} bytes spilled, {row.local_bytes} local",
                    file=sys.stderr,
                )
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    return 0

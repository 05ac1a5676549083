"""Compile every kernel for GPUs that need not be there, and count what the compiler made of it.

Each row of the report is one (variant, architecture): registers, shared memory, stack, spills, matrix instructions,
wide multiplies and instructions a value of z, read from the SASS by Triton's own cuobjdump and nvdisasm. Nothing runs.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import importlib
import json
import multiprocessing
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field

from ezo_kernels import ops
from ezo_kernels.ops._variants import ARCHS, Variant

BUDGETS = pathlib.Path(__file__).with_name("budgets.json")
#: What a recorded bound adds to what was counted, so that a compiler's whim fails nothing: registers.
REGISTER_SLACK = 8

MATRIX = re.compile(r"^(?:[HIDQOB]MMA|[HIQB]GMMA|UTC[A-Z]*MMA)$")
INTEGER_MATRIX = re.compile(r"^(?:IMMA|IGMMA|UTCIMMA)$")
WIDE = re.compile(r"^U?IMAD\.(?:WIDE|HI)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9_]+)*)([^;]*)")
#: Opcodes that work on floats, or convert from or to them. FLO, which looks for a leading one, is none, nor I2IP, which packs.
FLOAT = re.compile(
    r"^U?(?:[DFH](?:ADD|MUL|FMA|SET|SETP|MNMX|SEL|CHK|SWZADD)[0-9]*|MUFU|FRND|F2[FI]P?|I2FP?|[DH]MMA|[HQ]GMMA|UTC[HQ]MMA)$"
)
#: A half-precision multiply-add of zeros: how ptxas loads a constant through a unit that has nothing else to do.
CONSTANT = re.compile(r"\bR[Z0-9]+, -RZ, RZ, ")
LABEL = re.compile(r"^\s*(\.L_x?_?\w+):")
#: What a kernel of specialised warps has: loads by TMA, and registers that one kind of warps hands to another.
SPECIAL = ("UTMALDG", "USETMAXREG")
#: The Philox multipliers as SASS writes them: an immediate of a wide multiply.
PHILOX = re.compile(r"-?0x(?:d2511f53|2daee0ad|cd9e8d57|326172a9)\b")


@dataclass(frozen=True)
class Row:
    """One compiled variant on one architecture."""

    kernel: str
    variant: str
    arch: int
    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    multiplies: int
    philox_multiplies: int
    calls: int
    float_instructions: dict[str, int]
    instructions: int
    loop_instructions: int
    instructions_per_z: float | None
    num_warps: int
    num_stages: int
    compile_seconds: float
    #: Of :data:`SPECIAL`, in kernels that have them; and waits between the matrix instructions of their loops.
    special: dict[str, int] = field(default_factory=dict)

    def faults(self, variant: Variant) -> list[str]:
        """What is wrong with it, whatever its budget: empty if nothing is."""
        found = []
        if self.spill_bytes or self.local_bytes:
            found.append(f"spills {self.spill_bytes} bytes, {self.local_bytes} bytes of stack")
        if self.calls and "call" not in variant.expects:
            found.append(f"{self.calls} calls")
        if "mma" in variant.expects and not self.matrix_instructions:
            found.append("no matrix instruction")
        if "integer mma" in variant.expects and not any(map(INTEGER_MATRIX.match, self.matrix_instructions)):
            found.append(f"no integer matrix instruction, only {self.matrix_instructions}")
        rounding = sorted(m for m in self.matrix_instructions if not INTEGER_MATRIX.match(m))
        if "ieee" in variant.expects and rounding:
            found.append(f"fp32 is rounded for {', '.join(rounding)}")
        if "multiply" in variant.expects and not self.philox_multiplies:
            found.append("no multiply by Philox's constants: the noise was folded away")
        if "no float" in variant.expects and self.float_instructions:
            found.append(f"float instructions: {self.float_instructions}")
        if "specialized" in variant.expects:
            found += [f"no {opcode}" for opcode in SPECIAL if not self.special.get(opcode)]
            if self.special.get("waits"):
                found.append(f"{self.special['waits']} waits between the matrix instructions of a tile")
        return found


# -------------------------------------------------------------------------------------------------------- compilation


@functools.cache
def variants() -> dict[str, Variant]:
    """Every variant that the library's Triton and Gluon modules declare, by name."""
    found: dict[str, Variant] = {}
    for info in pkgutil.iter_modules(ops.__path__):
        if not info.name.endswith(("_triton", "_gluon")) or info.name in ("_triton", "_gluon"):
            continue
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        for variant in getattr(module, "variants", tuple)():
            if variant.name in found:
                raise ValueError(f"two variants are called {variant.name!r}")
            found[variant.name] = variant
    return found


def launched() -> list[tuple[str, str]]:
    """(kernel, file) of every ``name[grid](...)`` in the library's Triton and Gluon modules."""
    found = []
    for folder in ops.__path__:
        for path in sorted((*pathlib.Path(folder).glob("_*_triton.py"), *pathlib.Path(folder).glob("_*_gluon.py"))):
            found += [(name, path.name) for name in re.findall(r"^ +(\w+)\[[^\n]*\]\(\s*$", path.read_text(), re.M)]
    return found


def cubin(variant: Variant, arch: int) -> tuple[bytes, int]:
    """The machine code of ``variant`` for ``arch``, and its shared memory in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    known = {**dict.fromkeys(variant.constexprs, "constexpr"), **variant.signature}
    if set(known) != set(names) or set(variant.signature) & set(variant.constexprs):
        raise ValueError(
            f"{variant.name}: arguments {sorted(set(known) ^ set(names))} are declared twice or not at all"
        )
    aligned = [["tt.divisibility", 16]]
    if variant.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(
        fn=variant.kernel,
        signature={name: known[name] for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constexprs.items()},
        attrs={
            (i,): aligned for i, name in enumerate(names) if known[name].startswith("*") or name in variant.divisible
        },
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": False}
    if variant.maxnreg:
        options["maxnreg"] = variant.maxnreg
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return kernel.asm["cubin"], kernel.metadata.shared


def disassemble(code: bytes) -> tuple[str, str]:
    """Resource usage and SASS of ``code``."""
    import triton.backends.nvidia as nvidia

    tools = pathlib.Path(nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        pathlib.Path(path).write_bytes(code)
        return tuple(
            subprocess.run([tools / tool, option, path], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )


# ------------------------------------------------------------------------------------------------------------ counting


def parse(sass: str) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    """Instructions (opcode, operands) and loops (first, last instruction) of a listing."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append((found[1], found[2]))
    while instructions and instructions[-1][0] == "NOP":  # padding
        instructions.pop()
    loops = []
    for last, (opcode, operands) in enumerate(instructions):
        target = re.search(r"\.L_x?_?\w+", operands) if opcode.startswith("BRA") else None
        if target and labels.get(target[0], last + 1) <= last:
            loops.append((labels[target[0]], last))
    return instructions, loops


def main_loop(instructions, loops, least: int = 16) -> list[tuple[str, str]]:
    """Body of the innermost loop with the most Philox multiplies.

    Loops shorter than ``least`` spin on a barrier; what has an EXIT inside is no loop but a jump back from code that
    was moved behind the end.
    """
    exits = [i for i, (opcode, _) in enumerate(instructions) if opcode == "EXIT"]
    loops = [loop for loop in loops if loop[1] - loop[0] >= least and not any(loop[0] < i < loop[1] for i in exits)]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [instructions[first : last + 1] for first, last in inner]
    return max(bodies, key=lambda body: (philox_multiplies(body), len(body)), default=[])


def waits_between_products(instructions, loops) -> int:
    """Waits for the tensor core before the last matrix instruction of an innermost loop, in all loops that have some.

    A wait for an earlier iteration's product, behind the last, is none of these.
    """
    count = 0
    for first, last in loops:
        body = [opcode for opcode, _ in instructions[first : last + 1]]
        products = [i for i, opcode in enumerate(body) if MATRIX.match(opcode.split(".")[0])]
        inner = [i for i in loops if i != (first, last) and first <= i[0] and i[1] <= last]
        if products and not any(MATRIX.match(o.split(".")[0]) for a, b in inner for o, _ in instructions[a : b + 1]):
            count += sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in body[products[0] : products[-1]])
    return count


def philox_multiplies(body) -> int:
    return sum(1 for opcode, operands in body if WIDE.match(opcode) and PHILOX.search(operands))


def is_float(instruction: tuple[str, str]) -> bool:
    """Whether it computes with floats."""
    opcode, operands = instruction
    base = opcode.split(".")[0]
    return bool(FLOAT.match(base)) and not (base == "HFMA2" and CONSTANT.search(operands))


def is_call(instruction: tuple[str, str]) -> bool:
    """Whether it calls a function, such as the slow path of a square root.

    ptxas also leaves loops by a CALL to a label, and guards tensor memory on sm_100 by calls to traps.
    """
    opcode, operands = instruction
    return opcode.startswith("CALL") and "$" in operands and "guardrail" not in operands


def _bytes(opcode: str) -> int:
    return next((int(width) // 8 for width in ("128", "64") if opcode.endswith("." + width)), 4)


def measure(variant: Variant, arch: int) -> Row:
    """Compile and count one variant."""
    start = time.perf_counter()
    code, shared = cubin(variant, arch)
    seconds = time.perf_counter() - start
    usage, sass = disassemble(code)
    instructions, loops = parse(sass)
    opcodes = [opcode for opcode, _ in instructions]
    body = main_loop(instructions, loops) if variant.z_per_loop else []
    z, counted = (variant.z_per_loop, len(body)) if body else (variant.z_per_program, len(opcodes))
    warps = (body and variant.loop_warps) or variant.num_warps
    matrix = collections.Counter(base for o in opcodes if MATRIX.match(base := o.split(".")[0]))
    special = collections.Counter(base for o in opcodes if (base := o.split(".")[0]) in SPECIAL)
    if special:
        special["waits"] = waits_between_products(instructions, loops)
    return Row(
        kernel=variant.kernel.__name__,
        variant=variant.name,
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spill_bytes=sum(_bytes(o) for o in opcodes if o.startswith("STL")),
        local_bytes=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        shared_bytes=shared,
        matrix_instructions=dict(sorted(matrix.items())),
        multiplies=sum(1 for o in opcodes if WIDE.match(o)),
        philox_multiplies=philox_multiplies(instructions),
        calls=sum(map(is_call, instructions)),
        float_instructions=dict(
            sorted(collections.Counter(i[0].split(".")[0] for i in instructions if is_float(i)).items())
        ),
        instructions=len(opcodes),
        loop_instructions=len(body),
        instructions_per_z=round(counted * 32 * warps / z, 2) if z else None,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        compile_seconds=round(seconds, 2),
        special=dict(sorted(special.items())),
    )


def _job(job: tuple[str, int]) -> Row:
    return measure(variants()[job[0]], job[1])


def measure_all(jobs: list[tuple[str, int]], workers: int = 1):
    """Rows of ``jobs`` (variant name, arch), in order, as they are ready."""
    if workers == 1:
        yield from map(_job, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_job, jobs)


def tested() -> list[tuple[str, int]]:
    """What the tests compile: representative variants for sm_90, each kernel once for sm_80, and those of matrix instructions,
    which differ, once for sm_100 and sm_120, too.

    The whole report counts every variant on each architecture. (sm_86 and sm_89 have the code of sm_80.)
    """
    jobs, seen = [], set()
    for name, variant in variants().items():
        if not variant.representative:
            continue
        for arch in variant.archs:
            differs = arch == 80 or arch in (100, 120) and any("mma" in what for what in variant.expects)
            if arch == 90 or differs and (variant.kernel.__name__, arch) not in seen:
                seen.add((variant.kernel.__name__, arch))
                jobs.append((name, arch))
    return jobs


# -------------------------------------------------------------------------------------------------------------- budgets


def read_budgets() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(BUDGETS.read_text())


def merge(path: pathlib.Path, rows: list[dict]) -> list[dict]:
    """The rows of an earlier report that were not counted again, and these."""
    counted = {(row["variant"], row["arch"]) for row in rows}
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in old if (row["variant"], row["arch"]) not in counted] + rows


def write_budgets(rows: list[Row], keep: bool = False) -> None:
    """Record bounds on registers and shared memory: what was counted, and a little slack.

    Args:
        keep: leave those of rows that were not counted as they are.
    """
    budgets = read_budgets() if keep else {}
    for row in rows:
        budgets.setdefault(row.variant, {})[str(row.arch)] = {
            "registers": min(255, row.registers + REGISTER_SLACK),
            "shared_bytes": row.shared_bytes,
        }
    BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")


# --------------------------------------------------------------------------------------------------------- command line


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, help="only these architectures")
    parser.add_argument("--kernel", metavar="NAME", help="only variants whose name contains NAME")
    parser.add_argument("--only", metavar="NAME", help="as --kernel, and other rows of FILE and of the bounds stay")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--tested", action="store_true", help="only what the compile tests build")
    parser.add_argument("--write-budgets", action="store_true", help="record the bounds that the tests hold")


def run(args: argparse.Namespace) -> int:
    import triton

    jobs = tested() if args.tested or args.write_budgets else [(n, a) for n, v in variants().items() for a in v.archs]
    part = args.only or args.kernel or ""
    jobs = [(name, arch) for name, arch in jobs if (not args.arch or arch in args.arch) and part in name]
    if not jobs:
        raise SystemExit(f"python -m bench static: no variant of these architectures has {part!r} in its name")
    rows, faulty = [], 0
    for row in measure_all(jobs, args.jobs):
        rows.append(row)
        faults = row.faults(variants()[row.variant])
        faulty += bool(faults)
        kinds = " ".join(f"{n} {kind}" for kind, n in row.matrix_instructions.items()) or "no mma"
        cost = "" if row.instructions_per_z is None else f"{row.instructions_per_z:.1f} a z, "
        print(
            f"{row.variant:56} sm_{row.arch} {row.registers:3} registers {row.shared_bytes:6} B shared, {kinds}, {cost}"
            f"{row.philox_multiplies} philox multiplies" + "".join(f"; FAULT: {f}" for f in faults),
            flush=True,
        )
    if args.json:
        path, counted = pathlib.Path(args.json), [asdict(row) for row in rows]
        report = {"triton": triton.__version__, "rows": merge(path, counted) if args.only else counted}
        path.write_text(json.dumps(report, indent=1) + "\n")
    if args.write_budgets:
        write_budgets(rows, keep=bool(args.only))
    print(f"{len(rows)} rows, {faulty} with faults", file=sys.stderr)
    return 1 if faulty else 0

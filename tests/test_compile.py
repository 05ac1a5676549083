"""Every kernel compiled for GPUs that are not here: sm_90, once sm_80, and with matrix instructions sm_100 and sm_120, too.

Variants that say ``representative`` are built; every dtype, noise and architecture is the static report's
(``python -m bench static``). Each test compiles its own, so that test processes share them. Bounds are in
bench/budgets.json, written by ``python -m bench static --write-budgets``.
"""

from __future__ import annotations

import collections
import functools
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from bench import static  # noqa: E402
from ezo_kernels.ops import _gluon  # noqa: E402

pytestmark = pytest.mark.compile
JOBS = static.tested()


@functools.cache
def measured(name: str, arch: int) -> static.Row:
    return static.measure(static.variants()[name], arch)


@functools.cache
def compiled(name: str):
    """Instructions and loops of a variant on sm_90."""
    return static.parse(static.disassemble(static.cubin(static.variants()[name], 90)[0])[1])


gluon = pytest.mark.skipif(bool(_gluon.MISSING), reason=_gluon.MISSING or "there is Gluon")


@pytest.mark.parametrize(("name", "arch"), JOBS, ids=[f"{name}-sm_{arch}" for name, arch in JOBS])
def test_machine_code(name, arch):
    row = measured(name, arch)
    assert not row.faults(static.variants()[name])
    budget = static.read_budgets().get(name, {}).get(str(arch))
    assert budget, "no bounds recorded: run python -m bench static --write-budgets"
    assert row.registers <= budget["registers"], f"{row.registers} registers, bound {budget['registers']}"
    assert row.shared_bytes <= budget["shared_bytes"], f"{row.shared_bytes} bytes, bound {budget['shared_bytes']}"


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(
    ("noise", "most"),
    [("clt4", 19), ("gaussian_fast", 19), ("gaussian", 36), ("hadamard", 9), ("rademacher", 6)],
)
def test_instructions_for_one_weight_at_few_rows(noise, rows, most):
    """The whole loop of the two-product kernel on sm_90, bf16: loads, noise, both products."""
    name = f"linear_small/bf16/{noise}/{rows}/pair/sm_90"
    row = measured(name, 90)
    assert not row.faults(static.variants()[name])
    assert "HGMMA" in row.matrix_instructions
    assert row.instructions_per_z <= most


@pytest.mark.parametrize(
    ("variant", "product"),
    [("16/pair/peak/nearest", "IMMA"), ("64/pair/peak/nearest/sm_90", "IGMMA"), ("16/tail/peak/nearest", "IMMA")],
)
def test_instructions_for_one_integer_weight_at_few_rows(variant, product):
    """The whole loop on sm_90: loads, 32 bits of noise, both signs clamped and packed, both products."""
    row = measured(f"int8_linear/{variant}", 90)
    assert any(name.startswith(product) for name in row.matrix_instructions)
    assert row.instructions_per_z <= (18 if "tail" not in variant else 34)


@gluon
@pytest.mark.parametrize(
    ("noise", "rows", "most"),
    [
        ("clt4", 512, 19),
        ("gaussian_fast", 512, 20),
        ("gaussian", 512, 38),
        ("gaussian", 128, 36),
        ("hadamard", 512, 15),
        ("rademacher", 512, 13),
    ],
)
def test_specialised_warps_keep_both_units_busy(noise, rows, most):
    """The loop that makes z, all of it; and those that multiply: 8 (16) products in a row, nothing spilled, no forced wait."""
    name = f"linear_specialized/bf16/{noise}/{rows}/pair"
    variant, (instructions, loops) = static.variants()[name], compiled(name)
    made = static.main_loop(instructions, loops)
    assert len(made) * 32 * variant.loop_warps <= most * variant.z_per_loop
    assert not any(opcode.startswith(("HGMMA", "LDL", "STL", "LDG")) for opcode, _ in made)
    wide = 16 if variant.constexprs["BM"] == 256 else 8
    bodies = [[opcode for opcode, _ in instructions[first : last + 1]] for first, last in loops]
    bodies = [body for body in bodies if sum(o.startswith("HGMMA") for o in body) == wide and len(body) < 128]
    assert len(bodies) == 2, "one for each sign"
    for body in bodies:
        products = [i for i, opcode in enumerate(body) if opcode.startswith("HGMMA")]
        waits = [i for i, opcode in enumerate(body) if opcode.startswith("WARPGROUP.DEPBAR")]
        assert len(waits) == 1 and waits[0] > products[-1], "for the tile before, behind the products of this one"
        assert not any(o.startswith(("LDL", "STL", "BAR", "SYNCS")) for o in body[products[0] : products[-1]])


@gluon
@pytest.mark.parametrize(("noise", "shared"), [("clt4", False), ("clt4", True), ("gaussian", False)])
def test_warps_wait_for_each_other_before_they_let_go(noise, shared):
    """Without a bias: all warps have waited when one says that a buffer is free, or writes outputs where they read weights."""
    variant = static.variants()[f"linear_specialized/bf16/{noise}/512/pair"]
    variant = replace(variant, constexprs=variant.constexprs | {"BIAS": False, "SHARED": shared})
    instructions, _ = static.parse(static.disassemble(static.cubin(variant, 90)[0])[1])
    opcodes = [opcode for opcode, _ in instructions]
    arrivals = [i for i, opcode in enumerate(opcodes) if opcode.startswith("SYNCS.ARRIVE.TRANS64.A1T0")]
    assert len(arrivals) == 6, "two of each sign, two of those that make z"
    for i in arrivals:
        back = next(
            opcodes[j] for j in range(i - 1, 0, -1) if opcodes[j].split(".")[0] in ("BAR", "HGMMA", "STS", "LDS")
        )
        assert back.startswith("BAR"), i
    stores = [i for i, opcode in enumerate(opcodes) if opcode.startswith("STSM")]
    ends = [i for i, (opcode, of) in enumerate(instructions) if opcode.startswith("WARPGROUP.DEPBAR") and "0x0" in of]
    assert len(ends) == 2
    for end in ends:
        first = next(i for i in stores if i > end)
        assert any(opcode.startswith("BAR.SYNC") for opcode in opcodes[end:first])


@gluon
def test_a_wait_between_products_is_found():
    body = ["HGMMA.64x128x16.F32.BF16", "WARPGROUP.DEPBAR.LE", "HGMMA.64x128x16.F32.BF16", "WARPGROUP.DEPBAR.LE", "BRA"]
    instructions = [(opcode, "") for opcode in body]
    assert static.waits_between_products(instructions, [(0, 4)]) == 1
    assert static.waits_between_products(instructions[2:], [(0, 2)]) == 0
    variant = static.variants()["linear_specialized/bf16/clt4/512/pair"]
    row = measured("embedding/bf16/gaussian/0/shared", 90)
    assert [f.split()[-1] for f in row.faults(variant)][-2:] == ["UTMALDG", "USETMAXREG"]
    assert "2 waits" in replace(row, special={"UTMALDG": 3, "USETMAXREG": 9, "waits": 2}).faults(variant)[-1]


@pytest.mark.parametrize(("dtype", "noise"), [("bf16", "gaussian"), ("bf16", "hadamard"), ("fp32", "clt4")])
@pytest.mark.parametrize(
    ("form", "copies"),
    [("update/{}/{}/stochastic", 1), ("perturb/{}/{}/matrix/pair", 2), ("perturb/{}/{}/conv3x3/pair", 2)],
)
def test_weights_move_sixteen_bytes_at_a_time(form, copies, dtype, noise):
    """Loads and stores of 16 bytes cover the tile, in the update and in what writes slabs, which has no others."""
    name = form.format(dtype, noise)
    variant, (instructions, _) = static.variants()[name], compiled(name)
    opcodes = collections.Counter(opcode for opcode, _ in instructions)
    tile = variant.constexprs["R"] * variant.constexprs["C"] * (2 if dtype == "bf16" else 4)
    moved = 16 * 32 * variant.num_warps
    assert opcodes["LDG.E.128"] * moved == tile and opcodes["STG.E.128"] * moved == copies * tile
    if "update" not in form:  # whose table may hold parameters of any strides
        assert [o for o in opcodes if o.startswith("STG")] == ["STG.E.128"]
        assert sum(n for o, n in opcodes.items() if o.startswith("LDG") and o != "LDG.E.128") == 3, "the key and eps"


@pytest.mark.parametrize("noise", ["gaussian", "clt4"])
def test_noise_is_written_sixteen_bytes_at_a_time(noise):
    name = f"noise/{noise}/matrix"
    variant, (instructions, _) = static.variants()[name], compiled(name)
    stores = [opcode for opcode, _ in instructions if opcode.startswith("STG")]
    assert set(stores) == {"STG.E.128"}
    assert len(stores) * 16 * 32 * variant.num_warps == variant.constexprs["R"] * variant.constexprs["C"] * 4


def test_every_kernel_declares_variants_for_sm_90():
    """A jit function that is launched and compiled nowhere would be found by its first user."""
    kernels = {variant.kernel.__name__ for variant in static.variants().values() if 90 in variant.archs}
    assert {name for name, _ in static.launched()} <= kernels


def test_planted_faults_are_found():
    variants = static.variants()
    silent = variants["embedding/bf16/gaussian/0/shared"]
    row = static.measure(replace(silent, expects=("multiply", "mma")), 90)
    faults = row.faults(replace(silent, expects=("multiply", "integer mma", "mma")))
    assert [fault.split()[1] for fault in faults] == ["matrix", "integer", "multiply"]
    rounded = replace(row, matrix_instructions={"IMMA": 2, "UTCHMMA": 4}).faults(replace(silent, expects=("ieee",)))
    assert rounded == ["fp32 is rounded for UTCHMMA"]
    assert "spills" in " ".join(replace(row, spill_bytes=4).faults(silent))
    assert "calls" in " ".join(replace(row, calls=1).faults(silent))


LISTING = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 IMAD.WIDE.U32 R2, R3, -0x2daee0ad, RZ ;
        /*0020*/                   STL.64 [R1], R2 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0050*/              @UP0 BRA `(.L_x_0) ;
        /*0060*/                   CALL.REL.NOINC `(.L_x_1) ;
        /*0070*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
        /*0080*/                   EXIT ;
        /*0090*/                   IADD3 R2, R3, 0x1, RZ ;
        /*00a0*/                   BRA `(.L_x_0);
        /*00b0*/                   BRA `(.L_x_2);
        /*00c0*/                   NOP;
"""


def test_integers_that_are_packed_are_no_floats():
    for opcode, floats in (
        ("I2IP.S8.S32.SAT", False),
        ("I2FP.F32.U32", True),
        ("F2I.S64", True),
        ("I2F", True),
        ("F2FP", True),
    ):
        assert static.is_float((opcode, "")) == floats, opcode


def test_listing_is_read():
    instructions, loops = static.parse(LISTING)
    assert [opcode for opcode, _ in instructions][-3:] == ["IADD3", "BRA", "BRA"]
    assert loops == [(1, 3), (0, 5), (0, 10)]
    assert [static.is_call(i) for i in instructions].index(True) == 7 and sum(map(static.is_call, instructions)) == 1
    assert static.philox_multiplies(instructions) == 1
    assert static.main_loop(instructions, loops, least=2) == instructions[1:4]
    assert static.main_loop(instructions, loops, least=3) == instructions[0:6]

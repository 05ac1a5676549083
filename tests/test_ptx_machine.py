"""The machine that carries out PTX (tests/ptx): its arithmetic against exact numbers, and what it must refuse."""

from __future__ import annotations

import fractions
import math

import numpy as np
import pytest
import torch

from tests.ptx import machine
from tests.ptx.arithmetic import Unknown, compute, fma
from tests.ptx.memory import Fault, GlobalMemory
from tests.ptx.parse import parse

HEAD = ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u32 k_param_1\n)\n.reqntid {threads}\n{{\n"


def execute(body: str, tensor: torch.Tensor, value: int = 0, threads: int = 32, grid=(1, 1, 1), shared: int = 256):
    """Runs ``body`` with the address of ``tensor`` in %rd1, ``value`` in %r1 and the thread in %r2."""
    start = "ld.param.b64 %rd1, [k_param_0];\nld.param.b32 %r1, [k_param_1];\nmov.u32 %r2, %tid.x;\n"
    kernel = parse(HEAD.format(threads=threads) + start + body + "\nret;\n}\n")
    arguments = [np.array([tensor.data_ptr()], np.uint64), np.array([value & 0xFFFFFFFF], np.uint32)]
    machine.launch(kernel, arguments, grid, shared, GlobalMemory([tensor]))
    return tensor


def rounded(exact: fractions.Fraction) -> float:
    """fp32 nearest to an exact number, ties to even, of the normal range."""
    if not exact:
        return 0.0
    exponent = math.frexp(float(exact))[1] - 24
    scaled = exact / fractions.Fraction(2) ** exponent
    return float(np.float32(math.ldexp(round(scaled), exponent)))


def test_fma_rounds_once():
    """Among numbers where rounding the product first, or the sum to fp64 and then to fp32, would give another."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(1 << 23, 1 << 24, 4000).astype(np.float32) for _ in "ab")
    c = -(a.astype(np.float64) * b).astype(np.float32) * rng.choice([1.0, 0.5, 2.0**-24, 2.0**-30, -(2.0**-25)], 4000)
    c = c.astype(np.float32)
    exact = [
        fractions.Fraction(float(x)) * fractions.Fraction(float(y)) + fractions.Fraction(float(z))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    want = np.array([rounded(e) for e in exact], np.float32)
    assert (fma(a, b, c) == want).all()
    assert (fma(a, b, c) != a * b + c).any()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_rounding_to_sixteen_bits(kind):
    bits = np.random.default_rng(1).integers(0, 1 << 32, 20000, dtype=np.uint32)
    bits = bits[np.isfinite(bits.view(np.float32))]
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    want = torch.from_numpy(bits.view(np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert (compute(f"cvt.rn.{kind}.f32")[0](bits).view(np.uint16) == want).all()
    both = compute(f"cvt.rn.{kind}x2.f32")[0](bits, bits[::-1])
    assert ((both & 0xFFFF) == want[::-1]).all() and ((both >> 16) == want).all()


EDGES = [0, 1, -1, 2, 7, -8, 127, -128, 255, (1 << 31) - 1, -(1 << 31), 0x12345678, -0x7ABCDEF0]


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize(
    ("opcode", "exact"),
    [
        ("add.s32", lambda a, b: a + b),
        ("sub.s32", lambda a, b: a - b),
        ("mul.lo.s32", lambda a, b: a * b),
        ("mul.hi.s32", lambda a, b: a * b >> 32),
        ("mul.wide.s32", lambda a, b: a * b),
        ("mul.wide.u32", lambda a, b: (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF)),
        ("min.s32", min),
        ("max.u32", lambda a, b: max(a & 0xFFFFFFFF, b & 0xFFFFFFFF)),
        ("max.relu.s32", lambda a, b: max(a, b, 0)),
        ("div.s32", truncated),
        ("rem.s32", lambda a, b: a - truncated(a, b) * b),
        ("xor.b32", lambda a, b: a ^ b),
        ("shl.b32", lambda a, b: a << min(b & 0xFFFFFFFF, 40)),
        ("shr.s32", lambda a, b: a >> min(b & 0xFFFFFFFF, 40)),
        ("shr.u32", lambda a, b: (a & 0xFFFFFFFF) >> min(b & 0xFFFFFFFF, 40)),
    ],
)
def test_integers(opcode, exact):
    pairs = [(a, b) for a in EDGES for b in EDGES if b or opcode[:3] not in ("div", "rem")]
    a, b = (np.array(column, np.int64).astype(np.uint32) for column in zip(*pairs, strict=True))
    function, bits = compute(opcode)
    found = function(a, b)
    assert [int(v) for v in found] == [exact(x, y) & (1 << bits) - 1 for x, y in pairs]


def test_a_narrow_signed_number_keeps_its_sign_in_a_wider_register():
    got = execute(
        "cvt.s8.s32 %rs1, %r1;\ncvt.s32.s16 %r3, %rs1;\nst.global.b32 [%rd1], %r3;",
        torch.zeros(1, dtype=torch.int32),
        0xF3,
    )
    assert got.item() == -13


def test_ways_that_part_and_meet_again():
    """Odd threads go round a loop as often as their number says, then all pass a barrier and read their neighbour."""
    body = """
        .reg .pred %p<3>;
        and.b32 %r3, %r2, 1;
        mov.b32 %r4, 0;
        setp.eq.b32 %p1, %r3, 0;
        @%p1 bra $L_join;
    $L_loop:
        add.s32 %r4, %r4, 1;
        setp.lt.s32 %p2, %r4, %r2;
        @%p2 bra $L_loop;
    $L_join:
        shl.b32 %r5, %r2, 2;
        st.shared.b32 [%r5], %r4;
        bar.sync 0;
        xor.b32 %r6, %r5, 4;
        ld.shared.b32 %r7, [%r6];
        mul.wide.u32 %rd2, %r2, 4;
        add.s64 %rd3, %rd1, %rd2;
        st.global.b32 [%rd3], %r7;
    """
    got = execute(body, torch.zeros(64, dtype=torch.int32), threads=64)
    assert got.tolist() == [t + 1 if t % 2 == 0 else 0 for t in range(64)]


STORE = "mul.wide.s32 %rd2, %r1, 1;\nadd.s64 %rd3, %rd1, %rd2;\nst.global.b32 [%rd3], %r2;"


@pytest.mark.parametrize(
    ("body", "value", "match"),
    [
        (STORE, 64, "reach beyond|in no tensor"),
        (STORE, -4, "in no tensor"),
        (STORE, 2, "no multiple of the 4 bytes"),
        ("st.shared.b32 [%r1], %r2;", 256, "shared memory has 256 bytes"),
        ("setp.lt.s32 %p1, %r2, %r1;\n@%p1 bra $L;\nret;\n$L:\nbar.sync 0;", 5, "others have returned"),
        ("setp.lt.s32 %p1, %r2, %r1;\n@%p1 shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;", 5, "part of a warp"),
        ("trap;", 0, "trap"),
    ],
)
def test_faults(body, value, match):
    tensor = torch.zeros(16, dtype=torch.int32)
    with pytest.raises(Fault, match=match):
        execute(body, tensor, value)


NEIGHBOUR = """
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.b32 [%rd3], %r2;
    {barrier}
    xor.b32 %r4, %r2, 32;
    mul.wide.u32 %rd4, %r4, 4;
    add.s64 %rd5, %rd1, %rd4;
    ld.global.b32 %r5, [%rd5];
    bar.sync 0;
    st.global.b32 [%rd3], %r5;
"""


def test_a_race_of_two_warps():
    """What another warp stored is there behind a barrier, and without one only in lockstep."""
    got = execute(NEIGHBOUR.format(barrier="bar.sync 0;"), torch.zeros(64, dtype=torch.int32), threads=64)
    assert got.tolist() == [t ^ 32 for t in range(64)]
    with pytest.raises(Fault, match="a race"):
        execute(NEIGHBOUR.format(barrier=""), torch.zeros(64, dtype=torch.int32), threads=64)


@pytest.mark.parametrize("first", ["st.global.b32 [%rd1], %r3;", "ld.global.b32 %r4, [%rd1];"])
def test_a_race_of_two_programs(first):
    body = f"mov.u32 %r3, %ctaid.x;\n{first}\nbar.sync 0;\nst.global.b32 [%rd1], %r3;"
    execute(body, torch.zeros(1, dtype=torch.int32), grid=(1, 1, 1))
    with pytest.raises(Fault, match="a race"):
        execute(body, torch.zeros(1, dtype=torch.int32), grid=(2, 1, 1))


def test_what_is_not_written_down_is_refused():
    for opcode in ("add.sat.s32", "add.rz.f32", "bfind.u32", "fma.rn.relu.f32"):
        with pytest.raises(Unknown):
            compute(opcode)


def test_shared_memory_begins_as_nan():
    got = execute("mov.b32 %r3, 0;\nld.shared.b32 %r4, [%r3];\nst.global.b32 [%rd1], %r4;", torch.zeros(1))
    assert got.isnan().all()

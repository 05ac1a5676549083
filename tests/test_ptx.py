"""The PTX inside of integer kernels, carried out by rules written down from the PTX manual: every byte, every word's edge."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs triton")

SIGNED = range(-128, 128)


def prmt(a: int, b: int, selector: int) -> int:
    """Byte i is byte (nibble i) & 7 of b:a, or eight times its sign where the nibble's highest bit is set."""
    sources, out = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")], []
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = sources[nibble & 7]
        out.append((0xFF if byte >> 7 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def signed(word: int) -> int:
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def pack(a: int, b: int, c: int) -> int:
    """cvt.pack.sat.s8.s32.b32: a and b saturated, b in the lowest byte, a in the next, the low half of c above."""
    low, high = (max(-128, min(127, signed(v))) & 0xFF for v in (b, a))
    return low | high << 8 | (c & 0xFFFF) << 16


def dp2a_lo(a: int, b: int, c: int) -> int:
    """Both halves of a, unsigned, times the two lowest bytes of b, and c."""
    return (c + (a & 0xFFFF) * (b & 0xFF) + (a >> 16) * (b >> 8 & 0xFF)) & 0xFFFFFFFF


OPCODES = {
    "prmt.b32": prmt,
    "add.s32": lambda a, b: (a + b) & 0xFFFFFFFF,
    "sub.s32": lambda a, b: (a - b) & 0xFFFFFFFF,
    "max.s32": lambda a, b: max(signed(a), signed(b)) & 0xFFFFFFFF,
    "cvt.pack.sat.s8.s32.b32": pack,
    "dp2a.lo.u32.u32": dp2a_lo,
}


def run(text: str, operands: list[int], outputs: int) -> list[int]:
    """What straight-line code leaves in its first operands, given the others as words."""
    registers = {f"${outputs + i}": value & 0xFFFFFFFF for i, value in enumerate(operands)}
    for line in re.findall(r"[^;{}]+;", text):
        opcode, *rest = line.strip(" ;").replace(",", " ").split()
        if opcode == ".reg":
            continue
        to, *values = rest
        values = [registers[v] if v in registers else int(v, 0) & 0xFFFFFFFF for v in values]
        registers[to] = OPCODES[opcode](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def clamp(v: int) -> int:
    return max(-127, min(127, v))


@pytest.mark.parametrize(("name", "signs"), [("_BOTH", (1, -1)), ("_PLUS", (1,)), ("_MINUS", (-1,))])
def test_four_perturbed_bytes(name, signs):
    """Every weight with every z from -127 to 127, in every place of the four."""
    from ezo_kernels.ops import _int8_triton

    text, rng = getattr(_int8_triton, name).value, np.random.default_rng(0)
    pairs = np.array([(w, z) for w in SIGNED for z in SIGNED[1:]])
    columns = np.stack([rng.permutation(pairs) for _ in range(4)], 1)
    for four in columns[:: 1 if len(signs) == 1 else 2]:
        word = int.from_bytes(bytes(int(w) & 0xFF for w, _ in four), "little")
        found = run(text, [word, *(int(z) for _, z in four)], len(signs))
        for sign, out in zip(signs, found, strict=True):
            expected = [clamp(int(w) + sign * int(z)) & 0xFF for w, z in four]
            assert list(out.to_bytes(4, "little")) == expected, four.tolist()


@pytest.mark.parametrize("r_max", [1, 3, 15, 63, 127])
def test_value_of_a_word(r_max):
    """One dot product and a shift are ((low half * (2 r_max + 1)) >> 16) - r_max, whatever the high half."""
    import inspect

    from ezo_kernels.ops import _noise_triton

    text = re.search(r'"(dp2a[^"]*)"', inspect.getsource(_noise_triton._sparse_int8.fn)).group(1)
    words = [high << 16 | low for high in (0, 1, 0x7FFF, 0x8000, 0xFFFF) for low in range(0, 1 << 16, 7)]
    for word in (*words, 0xFFFFFFFF):
        (found,) = run(text, [word, 2 * r_max + 1, -(r_max << 16)], 1)
        assert signed(found) >> 16 == ((word & 0xFFFF) * (2 * r_max + 1) >> 16) - r_max


@pytest.mark.compile
@pytest.mark.parametrize(
    ("module", "name", "left"),
    [
        ("_int8_matmul_triton", "int8_linear/16/pair/once", "st.global"),
        ("_int8_loss_triton", "int8_cross_entropy/10/8/pair", "gpu.relaxed"),
        ("_int8_loss_triton", "int8_squared_error/gradient/pair", "gpu.relaxed"),
    ],
)
def test_the_last_program_reads_after_all_have_written(monkeypatch, module, name, left):
    """All threads' stores or additions, a barrier, one thread's release and acquire of the GPU's scope, a barrier, loads."""
    import triton

    from bench import static

    made, compile_ = [], triton.compile
    monkeypatch.setattr(triton, "compile", lambda *a, **k: made.append(compile_(*a, **k)) or made[-1])
    variants = importlib.import_module(f"ezo_kernels.ops.{module}").variants()
    static.cubin(next(v for v in variants if v.name.startswith(name)), 90)
    lines = [line.strip() for line in made[0].asm["ptx"].splitlines()]
    words = ("st.global", "ld.global", "gpu.relaxed", "bar.sync", "acq_rel")
    kinds = [(i, k) for i, line in enumerate(lines) for k in words if k in line]
    (arrival,) = [i for i, kind in kinds if kind == "acq_rel"]
    assert "atom.global.gpu.acq_rel.add" in lines[arrival]
    before = [kind for i, kind in kinds if i < arrival]
    after = [kind for i, kind in kinds if i > arrival]
    assert before[-1] == "bar.sync" and left in before
    assert after[0] == "bar.sync" and {"ld.global", "st.global"} <= set(after)

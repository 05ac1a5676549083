"""PTX text as instructions: what Triton's compiler writes for one kernel, and no more."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    """A register by name; in a scope of inline assembly by the scope's number, too."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or a float by its bits (``single`` of 32, else of 64)."""

    bits: int
    single: bool = False


@dataclass(frozen=True)
class Symbol:
    """A parameter, a label, a variable in shared memory, or a special register."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | Immediate
    offset: int = 0


@dataclass
class Instruction:
    """One line: ``@guard opcode operands``; ``source`` is where in Python it comes from."""

    opcode: str
    operands: list
    guard: str | None
    negated: bool
    text: str
    source: str


@dataclass
class Kernel:
    """An entry: its parameters in order with their types, its code, and where its labels are."""

    name: str
    parameters: list[tuple[str, str]]
    threads: int
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)


_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\{", re.S)
_PARAMETER = re.compile(r"\.param \.(\w+)[^,]*?(\w+_param_\d+)")
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_LOC = re.compile(r"\.loc\s+\d+ \d+ \d+.*?//\s*(\S+)")


def _split(text: str) -> list[str]:
    """Operands between commas that are in no bracket."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and not depth:
            parts.append(text[begin:i])
            begin = i + 1
    return [part.strip() for part in (*parts, text[begin:]) if part.strip()]


def _operand(text: str, scope: dict[str, str]):
    if text.startswith("{"):
        return [_operand(part, scope) for part in _split(text[1:-1])]
    if text.startswith("["):
        base, *rest = re.split(r"(?<=[\w%$.])\s*([+-])\s*", text[1:-1].strip(), maxsplit=1)
        offset = int(rest[1], 0) * (-1 if rest[0] == "-" else 1) if rest else 0
        base = _operand(base.strip(), scope)
        return Address(base, offset)
    if text[:2].lower() == "0f":
        return Immediate(int(text[2:], 16), True)
    if text[:2].lower() == "0d":
        return Immediate(int(text[2:], 16))
    if _NUMBER.match(text):
        return Immediate(int(text.rstrip("U"), 0))
    if "|" in text:
        return [_operand(part.strip(), scope) for part in text.split("|")]
    if text in scope:
        return Register(scope[text])
    if text.startswith("%") and re.match(r"%(?:rd|rs|rl|rq|r|f|fd|p|h|b)\d+$", text):
        return Register(text)
    return Symbol(text)


def parse(text: str) -> Kernel:
    """The one entry of a module.

    Raises:
        ValueError: no entry.
    """
    entry = _ENTRY.search(text)
    if entry is None:
        raise ValueError("no entry in this PTX")
    threads = re.search(r"\.(?:req|max)ntid (\d+)", entry[3])
    kernel = Kernel(entry[1], [(n, t) for t, n in _PARAMETER.findall(entry[2])], int(threads[1]))
    body = text[entry.end() :]
    scopes, number, source, table = [{}], 0, "", None
    held = ""
    for raw in body.splitlines():
        if found := _LOC.search(raw):
            source = found[1]
            continue
        line = f"{held} {re.sub(r'//.*', '', raw)}".strip()
        held = "" if not line or line[-1] in ";:{}" else line
        if held:
            continue
        if re.match(r"[\w$]+:$", line):
            table = None
        for piece in re.findall(r"[\w$]+:|\{(?=\s*(?:\.reg|[a-z@]|$))|\}(?!\s*,|\s*;)|[^;]+;", line) if line else ():
            piece = piece.strip()
            if piece == "{":
                scopes.append({})
                number += 1
            elif piece == "}":
                if len(scopes) == 1:
                    return kernel
                scopes.pop()
            elif piece.endswith(":"):
                kernel.labels[piece[:-1]] = len(kernel.code)
                table = piece[:-1]
            else:
                _statement(kernel, piece.rstrip("; "), scopes, number, source, table)
    return kernel


def _statement(kernel: Kernel, piece: str, scopes: list, number: int, source: str, table: str | None) -> None:
    if piece.startswith(".branchtargets"):
        kernel.tables[table] = _split(piece.removeprefix(".branchtargets"))
        return
    if piece.startswith(".reg"):
        if len(scopes) > 1:
            names = _split(piece.split(None, 2)[2])
            scopes[-1].update({name: f"{name}@{number}" for name in names})
        return
    if piece.startswith("."):
        return
    scope = {name: own for one in scopes for name, own in one.items()}
    guard, negated = None, False
    if piece.startswith("@"):
        flag, piece = piece[1:].split(None, 1)
        negated, flag = flag.startswith("!"), flag.lstrip("!")
        guard = scope.get(flag, flag)
    opcode, _, rest = piece.strip().partition(" " if "\t" not in piece.split(" ")[0] else "\t")
    operands = [_operand(part, scope) for part in _split(rest.strip())]
    kernel.code.append(Instruction(opcode.strip(), operands, guard, negated, piece, source))

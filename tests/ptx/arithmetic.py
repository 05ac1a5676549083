"""What each arithmetic opcode of PTX does to arrays of values, one a thread, by the rules of NVIDIA's manual.

``compute(opcode)`` gives a function of arrays of unsigned words and the width of what it returns. Rounding is IEEE's where the
manual says so, ``fma`` included; where it says ``approx`` the value is that of fp64, rounded once.
"""

from __future__ import annotations

import functools

import numpy as np

#: bits of a type's name
WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}
for _bits in (8, 16, 32, 64):
    WIDTHS.update({f"{kind}{_bits}": _bits for kind in "us"})
WIDTHS.update({"f16": 16, "bf16": 16, "f32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32, "tf32": 32})
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
DTYPES = {f"{k}{b}": np.dtype(f"{'i' if k == 's' else 'u'}{b // 8}") for k in "usb" for b in (8, 16, 32, 64)}
DTYPES.update(f16=np.dtype("f2"), f32=np.dtype("f4"), f64=np.dtype("f8"), bf16=np.dtype("u2"), tf32=np.dtype("f4"))


class Unknown(NotImplementedError):
    """An opcode that is not written down here."""


def words(values: np.ndarray) -> np.ndarray:
    """The bits of values, unsigned."""
    return values if values.dtype == bool else values.view(UNSIGNED[8 * values.dtype.itemsize])


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of fp32, rounded once: the product is exact in fp64, and the sum is rounded to odd there."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    other = total - product
    error = (product - (total - other)) + (c - other)
    inexact = np.isfinite(total) & np.isfinite(error) & (error != 0) & (total.view(np.int64) & 1 == 0)
    away = np.where((error > 0) == (total > 0), 1, -1)
    return (total.view(np.int64) + np.where(inexact, away, 0)).view(np.float64).astype(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 to bf16, to nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _flush(x: np.ndarray) -> np.ndarray:
    """A subnormal is a zero of its sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _approximately(function):
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


_FLOAT_UNARY = {
    "abs": np.abs,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "ex2": _approximately(np.exp2),
    "lg2": _approximately(np.log2),
    "sin": _approximately(np.sin),
    "cos": _approximately(np.cos),
    "rcp": _approximately(lambda x: 1 / x),
    "rsqrt": _approximately(lambda x: 1 / np.sqrt(x)),
    "tanh": _approximately(np.tanh),
}
_BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.fmax, "min": np.fmin}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b of integers towards zero; all ones by a divisor of zero, as the GPU leaves it."""
    wide = a.astype(object) if a.dtype.itemsize == 8 else a.astype(np.int64)
    divisor = np.where(b == 0, 1, b).astype(wide.dtype)
    quotient = np.sign(wide) * np.sign(divisor) * (np.abs(wide) // np.abs(divisor))
    return np.where(b == 0, -1, quotient).astype(np.int64).astype(a.dtype)


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        return (a.astype(np.int64 if a.dtype.kind == "i" else np.uint64) * b >> bits).astype(a.dtype)
    exact = (a.astype(object) * b.astype(object)) >> 64
    return exact.astype(a.dtype)


def _wide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    to = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(to) * b.astype(to)


def _shift_left(a, count):
    bits = 8 * a.dtype.itemsize
    return np.where(count >= bits, a.dtype.type(0), a << np.minimum(count, bits - 1).astype(a.dtype))


def _shift_right(a, count):
    bits = 8 * a.dtype.itemsize
    kept = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return kept if a.dtype.kind == "i" else np.where(count >= bits, a.dtype.type(0), kept)


def _extract(a, start, length):
    """bfe: ``length`` bits from ``start`` on, with the sign of the highest for a signed type."""
    bits = 8 * a.dtype.itemsize
    start, length = start & 0xFF, length & 0xFF
    wide = a.astype(np.int64 if a.dtype.kind == "i" else np.uint64)
    if not (start + length <= bits).all():
        raise Unknown("bfe beyond the word")
    up = (64 - start - length).astype(wide.dtype)
    left = wide << np.minimum(up, 63).astype(wide.dtype)
    shifted = left >> np.minimum(64 - length, 63).astype(wide.dtype)
    return np.where(length == 0, wide.dtype.type(0), shifted).astype(a.dtype)


def _permute(a, b, selector):
    source = np.stack(np.broadcast_arrays(*((w >> s) & 0xFF for w in (a, b) for s in (0, 8, 16, 24))))
    out = np.zeros_like(source[0])
    for i in range(4):
        nibble = np.broadcast_to(selector >> np.uint32(4 * i) & 15, out.shape)
        byte = np.take_along_axis(source, (nibble & 7).astype(np.int64)[None], 0)[0]
        byte = np.where(nibble & 8, np.where(byte >> 7, 0xFF, 0), byte).astype(np.uint32)
        out |= byte << np.uint32(8 * i)
    return out


def _look_up(a, b, c, table):
    out = np.zeros_like(a | b | c)
    for i in range(8):
        if int(table.ravel()[0]) >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _bytes(word: np.ndarray, signed: bool) -> list[np.ndarray]:
    parts = [(word >> np.uint32(s) & np.uint32(0xFF)).astype(np.uint8) for s in (0, 8, 16, 24)]
    return [p.view(np.int8).astype(np.int64) if signed else p.astype(np.int64) for p in parts]


def _halves(word: np.ndarray, signed: bool) -> list[np.ndarray]:
    parts = [(word >> np.uint32(s) & np.uint32(0xFFFF)).astype(np.uint16) for s in (0, 16)]
    return [p.view(np.int16).astype(np.int64) if signed else p.astype(np.int64) for p in parts]


def _sum_of_products(base: str, mods: list[str]):
    """dp4a and dp2a: c and the products of bytes, or of halves of a and two bytes of b."""
    first, second = (m == "s32" for m in mods[-2:])

    def run(a, b, c):
        own = _bytes(b, second)
        if base == "dp4a":
            pairs = zip(_bytes(a, first), own, strict=True)
        else:
            pairs = zip(_halves(a, first), own[:2] if "lo" in mods else own[2:], strict=True)
        return (c.astype(np.int64) + sum(x * y for x, y in pairs)).astype(np.uint32)

    return run, 32


def _saturated(a, b, c):
    """cvt.pack.sat.s8.s32.b32: a and b saturated, b in the lowest byte, and the low half of c above."""
    low, high = (np.clip(v.view(np.int32), -128, 127).astype(np.int8).view(np.uint8).astype(np.uint32) for v in (b, a))
    return low | high << np.uint32(8) | (c & np.uint32(0xFFFF)) << np.uint32(16)


def _read(kind: str):
    dtype = DTYPES[kind]
    return lambda w: (
        w.view(dtype) if w.dtype.itemsize == dtype.itemsize else w.astype(UNSIGNED[8 * dtype.itemsize]).view(dtype)
    )


def _convert(mods: list[str]):
    if mods[:2] == ["pack", "sat"]:
        return _saturated, 32
    to, of = mods[-2:]
    if to in ("bf16x2", "f16x2"):
        half = to_bf16 if to == "bf16x2" else (lambda x: x.astype(np.float16).view(np.uint16))

        def pack(high, low):
            return half(high.view(np.float32)).astype(np.uint32) << np.uint32(16) | half(low.view(np.float32))

        return pack, 32
    read = _read(of)
    rounded = next((m for m in mods[:-2] if m in ("rni", "rzi", "rmi", "rpi")), None)
    nearest = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, None: lambda x: x}[rounded]

    def run(w):
        x = read(w)
        if of == "bf16":
            x = from_bf16(x)
        if "ftz" in mods and x.dtype == np.float32:
            x = _flush(x)
        if to == "bf16":
            return to_bf16(x.astype(np.float32))
        if to == "tf32":
            bits = x.view(np.uint32)
            near = bits + np.uint32(0x1000) & np.uint32(0xFFFFE000)  # rna: to nearest, ties away
            return np.where(np.isfinite(x), near, bits)
        goal = DTYPES[to]
        if x.dtype.kind == "f" and goal.kind != "f":
            limits = np.iinfo(goal)
            whole = np.nan_to_num(nearest(x.astype(np.float64)), nan=0.0)
            top = whole >= float(limits.max) + (1 if limits.bits == 64 else 0)
            kept = np.clip(whole, limits.min, limits.max if limits.bits < 64 else 0x7FFFFFFFFFFFFC00).astype(goal)
            return np.where(top, limits.max, kept).astype(goal)
        if x.dtype.kind != "f" and goal == np.float32:
            # an integer of 32 bits is exact in fp64, so it is rounded once
            return words(x.astype(np.float64).astype(goal) if x.dtype.itemsize < 8 else x.astype(goal))
        out = (nearest(x) if x.dtype.kind == "f" else x).astype(goal)
        return out if goal.kind == "i" else words(out)  # in a wider register it keeps its sign

    return run, WIDTHS[to]


def _set_predicate(mods: list[str]):
    relation, kind = mods[0], mods[-1]
    if not set(mods[1:-1]) <= {"ftz"}:
        raise Unknown(f"setp.{'.'.join(mods)}")
    read = _read(kind)
    value = (lambda w: from_bf16(read(w))) if kind == "bf16" else read
    if relation in ("num", "nan"):
        ordered = relation == "num"
        return lambda a, b: (np.isnan(value(a)) | np.isnan(value(b))) != ordered, 1
    unordered = relation[:-1] in _COMPARE and relation.endswith("u") and kind[0] in "bf"
    compare = _COMPARE[relation[:-1] if unordered else relation]
    floats = kind in ("f16", "bf16", "f32", "f64")

    def run(a, b):
        x, y = value(a), value(b)
        out = compare(x, y)
        if floats:
            nan = np.isnan(x) | np.isnan(y)
            out = out | nan if unordered else out & ~nan
        return out

    return run, 1


@functools.cache
def compute(opcode: str):
    """(function of words, bits of its result) of an opcode with one result.

    Raises:
        Unknown: it is not here.
    """
    base, *mods = opcode.split(".")
    kind = mods[-1] if mods else ""
    if base == "cvt":
        return _convert(mods)
    if base == "setp":
        return _set_predicate(mods)
    if base in ("dp4a", "dp2a"):
        return _sum_of_products(base, mods)
    if base == "prmt":
        return _permute, 32
    if base == "lop3":
        return _look_up, 32
    if base in ("selp", "not", "shl", "shr", "bfe", "popc", *_LOGIC) and len(mods) != 1:
        raise Unknown(opcode)
    if base == "selp":
        bits = WIDTHS[kind]
        return (lambda a, b, p: np.where(p, a.astype(UNSIGNED[bits]), b.astype(UNSIGNED[bits]))), bits
    if base in _LOGIC:
        return _LOGIC[base], WIDTHS[kind]
    if base == "not":
        return (np.logical_not if kind == "pred" else np.invert), WIDTHS[kind]
    if kind in ("bf16", "bf16x2", "f16x2") or kind not in WIDTHS:
        raise Unknown(opcode)
    read, bits = _read(kind), WIDTHS[kind]
    if base in ("shl", "shr"):
        shift = _shift_left if base == "shl" else _shift_right
        return (lambda a, n: words(shift(read(a), n.astype(np.uint32)))), bits
    if base == "bfe":
        return (lambda a, s, n: words(_extract(read(a), s.astype(np.int64), n.astype(np.int64)))), bits
    if base == "popc":
        return (lambda a: np.bitwise_count(a).astype(np.uint32)), 32
    if kind[0] == "f":
        return _float(base, mods, read), bits
    return _integer(base, mods, read, bits)


def _float(base: str, mods: list[str], read):
    if not set(mods[:-1]) <= {"rn", "ftz", "approx", "full", "NaN"}:
        raise Unknown(".".join((base, *mods)))
    flush = _flush if "ftz" in mods else (lambda x: x)

    def apply(function):
        return lambda *operands: words(flush(function(*(flush(read(w)) for w in operands))))

    if base == "fma":
        return apply(fma)
    if base in _FLOAT_UNARY:
        return apply(_FLOAT_UNARY[base])
    if base in ("max", "min") and "NaN" in mods:
        return apply({"max": np.maximum, "min": np.minimum}[base])
    if base not in _BINARY:
        raise Unknown(".".join((base, *mods)))
    return apply(_BINARY[base])


def _integer(base: str, mods: list[str], read, bits: int):
    if base in ("max", "min") and mods[:-1] == ["relu"]:
        return (lambda a, b: words(np.maximum(_BINARY[base](read(a), read(b)), 0))), bits
    if not set(mods[:-1]) <= {"lo", "hi", "wide"}:
        raise Unknown(".".join((base, *mods)))
    if base in ("add", "sub", "max", "min"):
        return (lambda a, b: words(_BINARY[base](read(a), read(b)))), bits
    if base in ("neg", "abs"):
        return (lambda a: words({"neg": np.negative, "abs": np.abs}[base](read(a)))), bits
    if base in ("div", "rem"):

        def run(a, b):
            quotient = _truncated(x := read(a), y := read(b))
            return words(quotient if base == "div" else (x - quotient * y).astype(x.dtype))

        return run, bits
    if base in ("mul", "mad"):
        product = {"lo": np.multiply, "hi": _high, "wide": _wide}[mods[0]]
        total = 2 * bits if mods[0] == "wide" else bits
        if base == "mul":
            return (lambda a, b: words(product(read(a), read(b)))), total
        return (lambda a, b, c: words(product(read(a), read(b))) + c.astype(UNSIGNED[total])), total
    raise Unknown(".".join((base, *mods)))

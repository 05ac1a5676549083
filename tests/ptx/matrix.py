"""Tensor core instructions of whole warps: fragments as the manual draws them, sums in fp64 or integers.

Lane 4 g + t of a warp. Of an A of 16 rows, register r holds row g + 8 (r & 1) and as many columns as fit into 32 bits, from
e t + 4 e (r >> 1) on; of a B of 8 columns, column g and rows from e t + 4 e r on; of C and D, row g + 8 (r >> 1) and column
2 t + (r & 1).
"""

from __future__ import annotations

import re

import numpy as np

from .arithmetic import Unknown, from_bf16

#: values in 32 bits
PER_WORD = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4, "u8": 4}
#: bytes in a row, by the two highest bits of a descriptor: of the swizzles of 128, 64 and 32 bytes
_PITCH = {1: 128, 2: 64, 3: 32}
_G, _T = np.arange(32) // 4, np.arange(32) % 4


def elements(registers: np.ndarray, kind: str) -> np.ndarray:
    """uint32 [..., n] as the values in them, fp64 or int64 [..., n * e]."""
    words = np.ascontiguousarray(registers)
    if kind == "bf16":
        return from_bf16(words.view(np.uint16)).astype(np.float64)
    if kind == "f16":
        return words.view(np.float16).astype(np.float64)
    if kind == "tf32":  # the lowest 13 bits do not count
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return words.view({"s8": np.int8, "u8": np.uint8}[kind]).astype(np.int64)


def _scattered(registers: list, kind: str, rows: int, k: int) -> np.ndarray:
    """A of a warp's registers: [warps, 16, k] by rows of A, [warps, k, 8] by columns of B (``rows`` 8)."""
    e = PER_WORD[kind]
    out = np.zeros((registers[0].shape[0], rows, k), np.float64 if kind[0] not in "su" else np.int64)
    for r, register in enumerate(registers):
        values = elements(register[..., None], kind)
        row, first = (_G + 8 * (r & 1), 4 * e * (r >> 1)) if rows == 16 else (_G, 4 * e * r)
        for i in range(e):
            out[:, row, e * _T + first + i] = values[..., i]
    return out


def _accumulated(opcode: str, product: np.ndarray, c: list) -> list[np.ndarray]:
    """The registers of D: the products [warps, 16, n] and those of C."""
    out = []
    for r, register in enumerate(c):
        own = product[:, _G + 8 * (r >> 1 & 1), 8 * (r >> 2) + 2 * _T + (r & 1)]
        if product.dtype == np.int64:
            total = own + register.view(np.int32)
            total = np.clip(total, -(2**31), 2**31 - 1) if "satfinite" in opcode else total
            out.append(total.astype(np.int64).astype(np.uint32))
        else:
            out.append((own + register.view(np.float32)).astype(np.float32).view(np.uint32))
    return out


def mma(opcode: str, a: list, b: list, c: list) -> list[np.ndarray]:
    """``mma.sync`` of registers uint32 [warps, 32] each: D as registers."""
    kind, k = opcode.split(".")[-3], int(re.search(r"m16n8k(\d+)", opcode)[1])
    left, right = _scattered(a, kind, 16, k), _scattered(b, kind, 8, k)
    return _accumulated(opcode, left @ right.swapaxes(1, 2), c)


def ldmatrix(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """Of an 8 x 8 matrix of 16 bits, uint16 [warps, 8, 8], what each lane gets: uint32 [warps, 32]."""
    matrix = rows.swapaxes(1, 2) if transposed else rows
    return np.ascontiguousarray(matrix).view(np.uint32).reshape(rows.shape[0], 32)


def unpack_matrix(register: np.ndarray, transposed: bool) -> np.ndarray:
    """The inverse of :func:`ldmatrix`, for ``stmatrix``."""
    matrix = np.ascontiguousarray(register).view(np.uint16).reshape(register.shape[0], 8, 8)
    return matrix.swapaxes(1, 2) if transposed else matrix


def described(descriptor: int, rows: int, k: int, width: int, transposed: bool) -> np.ndarray:
    """Where in shared memory a matrix of ``wgmma`` lies: the address of each element, int64 [rows, k].

    Descriptor: bits 0 to 13 the start, 16 to 29 and 32 to 45 the leading and the stride offset, in 16 bytes each; 62 and 63 the
    swizzle, by which bits 4 to 6 of an address are exclusively or'ed with bits 7 to 9. Rows of 8 go together; ``transposed``:
    k is the slower dimension.
    """
    start, leading, stride = (16 * (descriptor >> s & 0x3FFF) for s in (0, 16, 32))
    if descriptor >> 49 & 7:
        raise Unknown("a descriptor with a base offset")
    r, byte = np.arange(rows)[:, None], width * np.arange(k)[None]
    pitch = _PITCH.get(descriptor >> 62)
    if transposed:
        if pitch is None:
            raise Unknown("a transposed matrix without a swizzle")
        row, k = width * r, np.arange(k)[None]
        linear = start + row % pitch + row // pitch * leading + k % 8 * pitch + k // 8 * stride
    elif pitch is None:
        return start + r // 8 * stride + byte // 16 * leading + r % 8 * 16 + byte % 16
    else:
        linear = start + r // 8 * stride + r % 8 * pitch + byte
    return linear ^ (linear >> 3 & (pitch - 1) & 0x70)


def wgmma(opcode: str, left: np.ndarray | list, right: np.ndarray, c: list) -> list[np.ndarray]:
    """``wgmma.mma_async`` of four warps each: D as registers [4 * groups, 32].

    Args:
        left: bits of A, unsigned [groups, 64, k]; or its registers, uint32 [4 * groups, 32].
        right: bits of B, unsigned [groups, n, k].
        c: the registers of D as they were.
    """
    kind, k = opcode.split(".")[-2], right.shape[2]
    b = elements(right, kind)
    if isinstance(left, list):
        a = _scattered(left, kind, 16, k).reshape(-1, 64, k)
    else:
        a = elements(left, kind)
    product = a @ b.swapaxes(1, 2)
    return _accumulated(opcode, product.reshape(-1, 16, product.shape[2]), c)

"""What whole warps do together: exchange values, load and store matrices, multiply them."""

from __future__ import annotations

import re

import numpy as np

from . import matrix
from .arithmetic import DTYPES, Unknown, words
from .memory import Fault
from .parse import Immediate


class Warps:
    """A part of :class:`tests.ptx.machine.Machine`."""

    def _warps(self, mask) -> np.ndarray:
        """Which warps take part."""
        if mask is None:
            return np.ones(self.lanes // 32, bool)
        own = mask.reshape(-1, 32)
        if (own.any(1) != own.all(1)).any():
            raise Fault("a part of a warp takes part in what is the whole warp's")
        return own.all(1)

    def _by_warp(self, operand) -> np.ndarray:
        return np.broadcast_to(self._get(operand, 32), (self.lanes,)).reshape(-1, 32)

    def _shfl_(self, instruction, mask) -> None:
        self._warps(mask)
        mode = instruction.opcode.split(".")[2]
        to, of, by, clamp = instruction.operands[:4]
        value, by = self._by_warp(of), self._by_warp(by).astype(np.int64) & 31
        if not isinstance(clamp, Immediate) or clamp.bits not in (31, 0):
            raise Unknown(f"{instruction.opcode} in segments")
        lane = np.arange(32)[None]
        source = {"bfly": lane ^ by, "idx": by + 0 * lane, "down": lane + by, "up": lane - by}[mode]
        inside = (source >= 0) & (source < 32)
        got = np.take_along_axis(value, np.where(inside, source, lane), 1)
        results = to if isinstance(to, list) else [to]
        self._put(results[0], got.ravel(), mask)
        if len(results) > 1:
            self._put(results[1], np.broadcast_to(inside, got.shape).ravel().copy(), mask)

    def _redux_(self, instruction, mask) -> None:
        self._warps(mask)
        _, _, name, kind = instruction.opcode.split(".")
        value = self._by_warp(instruction.operands[1]).astype(np.uint32).view(DTYPES[kind])
        reduce = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or, "and": np.bitwise_and}[name]
        total = reduce.reduce(value, axis=1, dtype=value.dtype)
        self._put(instruction.operands[0], words(np.repeat(total, 32)), mask)

    def _put_warps(self, operand, value: np.ndarray, warps: np.ndarray, mask) -> None:
        """A register of the warps that take part, [warps, 32]."""
        whole = np.zeros((self.lanes // 32, 32), np.uint32)
        whole[warps] = value
        self._put(operand, whole.ravel(), mask)

    def _matrices(self, at, registers, warps: np.ndarray):
        """Of each register the program and the address of every 16 bits of its matrix: uint64 [warps, 8, 8]."""
        address = self._address(at).reshape(-1, 32)[warps]
        if (address & np.uint64(15)).any():
            raise Fault("a row of a matrix is no multiple of 16 bytes")
        program = self.program.reshape(-1, 32)[warps][:, 0][:, None, None]
        for i, register in enumerate(registers if isinstance(registers, list) else [registers]):
            own = address[:, 8 * i : 8 * i + 8, None] + 2 * np.arange(8, dtype=np.uint64)
            yield register, np.broadcast_to(program, own.shape), own

    def _ldmatrix_(self, instruction, mask) -> None:
        warps, (to, at) = self._warps(mask), instruction.operands
        for register, program, address in self._matrices(at, to, warps):
            rows = self.shared.load(program, address, 2)
            self._put_warps(register, matrix.ldmatrix(rows, ".trans" in instruction.opcode), warps, mask)

    def _stmatrix_(self, instruction, mask) -> None:
        warps, (at, of) = self._warps(mask), instruction.operands
        for register, program, address in self._matrices(at, of, warps):
            rows = matrix.unpack_matrix(self._by_warp(register)[warps], ".trans" in instruction.opcode)
            self.shared.store(program, address, rows)

    def _mma_(self, instruction, mask) -> None:
        warps = self._warps(mask)
        to, *of = instruction.operands
        a, b, c = ([self._by_warp(r)[warps] for r in (o if isinstance(o, list) else [o])] for o in of)
        for register, own in zip(to, matrix.mma(instruction.opcode, a, b, c), strict=True):
            self._put_warps(register, own, warps, mask)

    def _wgmma_(self, instruction, mask) -> None:
        if not instruction.opcode.startswith("wgmma.mma_async"):
            return
        warps = self._warps(mask)
        if (warps.reshape(-1, 4).any(1) != warps.reshape(-1, 4).all(1)).any():
            raise Fault("a part of four warps takes part in what is all four's")
        to, a, b, scale, *flags = instruction.operands
        kind = instruction.opcode.split(".")[-2]
        e, n = matrix.PER_WORD[kind], int(re.search(r"n(\d+)k", instruction.opcode)[1])
        transposed = [flag.bits == 1 for flag in flags[2:]] or [False]
        program = self.program.reshape(-1, 128)[:, 0][warps[::4]]

        def shared(operand, rows: int, across: bool) -> np.ndarray:
            descriptors = np.broadcast_to(self._get(operand, 64), (self.lanes,)).reshape(-1, 128)[warps[::4]]
            if (descriptors != descriptors[:, :1]).any():
                raise Fault("the descriptors of four warps differ")
            at = np.stack([matrix.described(int(d), rows, 8 * e, 4 // e, across) for d in descriptors[:, 0]])
            return self.shared.load(np.broadcast_to(program[:, None, None], at.shape), at, 4 // e)

        left = [self._by_warp(r)[warps] for r in a] if isinstance(a, list) else shared(a, 64, transposed[0])
        keep = np.broadcast_to(self._get(scale, 1), (self.lanes,)).reshape(-1, 32)[warps]
        before = [np.where(keep, self._by_warp(r)[warps] if keep.any() else 0, 0).astype(np.uint32) for r in to]
        own = matrix.wgmma(instruction.opcode, left, shared(b, n, transposed[-1]), before)
        for register, value in zip(to, own, strict=True):
            self._put_warps(register, value, warps, mask)

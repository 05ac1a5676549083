"""Runs the PTX of one kernel on the CPU: all threads of some programs in lockstep, as far as their ways are one.

A register is an array of one word a thread. Threads whose ways part run in the order of their program counters, those that
lie behind first, so that they meet again. A barrier holds the threads of a program until all of them have come. What the
machine refuses is a fault: an address outside of every tensor or of shared memory, one that is not aligned, a barrier that
some threads never reach, an exchange inside a warp that is not whole.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import DTYPES, UNSIGNED, WIDTHS, Unknown, compute, words
from .memory import Fault, GlobalMemory, SharedMemory, Who
from .parse import Address, Immediate, Instruction, Kernel, Register, Symbol
from .warps import Warps

#: threads that run side by side
LANES = 1 << 14
_CLASSES = (("%rd", 64), ("%rs", 16), ("%r", 32), ("%fd", 64), ("%f", 32))
#: that do nothing here, where every load and store has happened before the next instruction
_NOTHING = ("membar", "fence", "prefetch", "prefetchu", "discard", "applypriority", "nanosleep", "griddepcontrol")
_NO_COPIES = ("cp.async.commit_group", "cp.async.wait_group", "cp.async.wait_all")
_CONTROL = {"bra", "brx", "ret", "exit", "trap", "bar", "barrier"}
_SPACES = ("global", "shared", "param")


def _width_of(register: str) -> int | None:
    return next((bits for prefix, bits in _CLASSES if register.startswith(prefix)), None)


class Machine(Warps):
    """The programs ``first`` to ``first + count`` of a launch."""

    def __init__(
        self,
        kernel: Kernel,
        arguments: list[np.ndarray],
        grid,
        shared: int,
        memory: GlobalMemory,
        first: int,
        count: int,
    ):
        self.kernel, self.threads, self.memory = kernel, kernel.threads, memory
        self.arguments = {name: a for (name, _), a in zip(kernel.parameters, arguments, strict=True)}
        self.lanes = count * kernel.threads
        self.shared = SharedMemory(count, shared)
        self.program = np.repeat(np.arange(count), kernel.threads)
        index, thread = first + self.program, np.tile(np.arange(kernel.threads), count)
        x, y, z = grid
        special = {
            "%tid.x": thread, "%tid.y": 0, "%tid.z": 0, "%laneid": thread % 32, "%warpid": thread // 32,
            "%ctaid.x": index % x, "%ctaid.y": index // x % y, "%ctaid.z": index // (x * y),
            "%ntid.x": kernel.threads, "%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z, "global_smem": 0,
        }  # fmt: skip
        self.special = {name: np.atleast_1d(np.asarray(v, np.uint32)) for name, v in special.items()}
        self.barriers, self.warp = np.zeros(self.lanes, np.int32), (thread // 32).astype(np.int32)
        self.number = index.astype(np.int32)
        self.registers: dict[str, np.ndarray] = {}
        self.pc = np.zeros(self.lanes, np.int64)
        self.done, self.waiting = np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
        self.steps = 0

    # ---------------------------------------------------------------------------------------------------- control

    def run(self) -> None:
        """Until every thread has returned."""
        with np.errstate(all="ignore"):
            while not self.done.all():
                ready = ~(self.done | self.waiting)
                if not ready.any():
                    self._release()
                    continue
                at = int(self.pc[ready].min())
                active = ready & (self.pc == at)
                behind = self.pc[ready & ~active]
                self._go(at, active, int(behind.min()) if behind.size else -1)

    def _release(self) -> None:
        if (self.done != self.done.reshape(-1, self.threads).all(1)[self.program]).any():
            raise Fault(f"{self.kernel.name}: some threads wait at a barrier, and others have returned")
        self.waiting[:] = False

    def _go(self, at: int, active: np.ndarray, others: int) -> None:
        """Run ``active`` from ``at`` until they part, end, wait, or meet others at ``others``."""
        mask = None if active.all() else active
        code = self.kernel.code
        while at != others:
            instruction = code[at]
            self.steps += 1
            base = instruction.opcode.partition(".")[0]
            if base not in _CONTROL:
                self._one(instruction, base, mask)
                at += 1
                continue
            taken = self._guarded(instruction, mask)
            if base in ("bra", "brx"):
                self._branch(instruction, at, active, taken)
                if (self.pc[active] == (to := int(self.pc[active][0]))).all() and (others < 0 or to < others):
                    at = to
                    continue
                return
            if base in ("ret", "exit"):
                self.done |= active if taken is None else taken
                self.pc[active] = at + 1
                return
            if base == "trap":
                raise Fault(f"{self.kernel.name}: trap at {instruction.source}")
            at += 1
            if instruction.opcode.startswith("bar.warp"):
                continue
            self.barriers[active] += 1
            whole = active.reshape(-1, self.threads)
            if (whole.all(1) | ~whole.any(1)).all():
                continue
            self.waiting |= active
            break
        self.pc[active] = at

    def _branch(self, instruction: Instruction, at: int, active: np.ndarray, taken: np.ndarray | None) -> None:
        labels = self.kernel.labels
        if instruction.opcode.startswith("brx"):
            index, table = instruction.operands
            targets = np.array([labels[name] for name in self.kernel.tables[table.name]])
            own = np.broadcast_to(self._get(index, 32), (self.lanes,))
            self.pc[active] = targets[own[active]]
            return
        to = labels[instruction.operands[0].name]
        self.pc[active] = to if taken is None else np.where(taken, to, at + 1)[active]

    def _guarded(self, instruction: Instruction, mask: np.ndarray | None) -> np.ndarray | None:
        if instruction.guard is None:
            return mask
        flag = self.registers[instruction.guard]
        flag = ~flag if instruction.negated else flag
        return flag if mask is None else flag & mask

    # --------------------------------------------------------------------------------------------------- operands

    def _get(self, operand, bits: int) -> np.ndarray:
        if isinstance(operand, Register):
            held = self.registers.get(operand.name)
            if held is None:  # a value that the compiler knows not to matter
                bits = _width_of(operand.name) or bits
                held = np.full(self.lanes, 0xCDCDCDCDCDCDCDCD & (1 << bits) - 1, UNSIGNED[bits])
            return held
        if isinstance(operand, Immediate):
            if bits == 1:
                return np.array([operand.bits != 0])
            return np.array([operand.bits & (1 << bits) - 1], UNSIGNED[bits])
        held = self.special[operand.name]
        return held if bits == 32 else held.astype(UNSIGNED[bits])

    def _put(self, operand, value: np.ndarray, mask: np.ndarray | None) -> None:
        if isinstance(operand, Symbol):
            if operand.name != "_":
                raise Unknown(f"a result in {operand.name}")
            return
        if value.dtype != bool:
            bits = _width_of(operand.name) or 8 * value.dtype.itemsize
            if value.dtype != UNSIGNED[bits]:
                value = words(value) if value.dtype.itemsize * 8 == bits else value.astype(UNSIGNED[bits])
        if value.shape != (self.lanes,):
            value = np.broadcast_to(value, (self.lanes,)).copy()
        if mask is not None:
            old = self.registers.get(operand.name)
            value = np.where(mask, value, np.zeros_like(value) if old is None else old)
        self.registers[operand.name] = value

    def _address(self, operand: Address, bits: int = 64) -> np.ndarray:
        base = self._get(operand.base, bits).astype(np.int64)
        return np.broadcast_to(base + operand.offset, (self.lanes,)).astype(np.uint64)

    # ----------------------------------------------------------------------------------------------- instructions

    def _one(self, instruction: Instruction, base: str, mask: np.ndarray | None) -> None:
        mask = self._guarded(instruction, mask)
        if mask is not None and not mask.any():
            return
        try:
            special = getattr(self, f"_{base}_", None)
            if special is not None:
                special(instruction, mask)
            elif base not in _NOTHING:
                self._compute(instruction, mask)
        except (Fault, Unknown) as error:
            raise type(error)(f"{error}\n  {instruction.text}\n  {instruction.source}") from error

    def _compute(self, instruction: Instruction, mask) -> None:
        mods = instruction.opcode.split(".")[1:]
        bits = WIDTHS.get(mods[-1], 32) if mods else 32
        to, *operands = instruction.operands
        if isinstance(to, list):  # two predicates of two halves
            for i, operand in enumerate(to):
                halves = [(self._get(o, 32) >> np.uint32(16 * i)).astype(np.uint16) for o in operands]
                self._put(operand, compute(instruction.opcode.removesuffix("x2"))[0](*halves), mask)
            return
        function, _ = compute(instruction.opcode)
        values = []
        for i, operand in enumerate(operands):
            own = 2 * bits if "wide" in mods and i == 2 else bits
            if instruction.opcode.startswith("selp") and i == 2:
                own = 1
            values.append(self._get(operand, own))
        self._put(to, function(*values), mask)

    def _mov_(self, instruction, mask) -> None:
        to, of = instruction.operands
        bits = WIDTHS[instruction.opcode.split(".")[-1]]
        if isinstance(of, list):
            part = bits // len(of)
            total = np.zeros(1, UNSIGNED[bits])
            for i, operand in enumerate(of):
                total = total | self._get(operand, part).astype(UNSIGNED[bits]) << UNSIGNED[bits](i * part)
            self._put(to, total, mask)
        elif isinstance(to, list):
            value, part = self._get(of, bits), bits // len(to)
            for i, operand in enumerate(to):
                own = (value >> UNSIGNED[bits](i * part)).astype(UNSIGNED[part])
                self._put(operand, own, mask)
        else:
            self._put(to, self._get(of, bits), mask)

    def _cvta_(self, instruction, mask) -> None:
        self._put(instruction.operands[0], self._get(instruction.operands[1], 64), mask)

    def _place(self, mods: list[str]) -> tuple[str, np.dtype, int]:
        """Space, type and number of elements of a load or store."""
        space = next((s for s in _SPACES if any(m.split("::")[0] == s for m in mods)), "global")
        count = next((int(m[1]) for m in mods if m in ("v2", "v4", "v8")), 1)
        return space, DTYPES[mods[-1]], count

    def _ld_(self, instruction, mask) -> None:
        space, dtype, count = self._place(instruction.opcode.split(".")[1:])
        to, at = instruction.operands[:2]
        if space == "param":
            value = self.arguments[at.base.name]
            self._put(to, value.astype(UNSIGNED[8 * dtype.itemsize]).view(dtype), mask)
            return
        address = self._address(at)
        for i, operand in enumerate(to if isinstance(to, list) else [to]):
            value = self._load(space, address + np.uint64(i * dtype.itemsize), dtype, mask, count)
            self._put(operand, value.view(dtype), mask)

    def _who(self, own) -> Who:
        return Who(self.number, self.warp, self.barriers)[own]

    def _load(self, space: str, address, dtype, mask, count: int = 1, atomic: bool = False) -> np.ndarray:
        own = slice(None) if mask is None else mask
        address, width = address[own], dtype.itemsize
        if count > 1 and (address & np.uint64(width - 1)).any():
            raise Fault(f"a vector of {count} lies across its alignment")
        if space == "shared":
            got = self.shared.load(self.program[own], address, width)
        else:
            got = self.memory.load(address, width, None if atomic else self._who(own))
        if mask is None:
            return got
        out = np.zeros(self.lanes, got.dtype)
        out[own] = got
        return out

    def _st_(self, instruction, mask) -> None:
        space, dtype, _ = self._place(instruction.opcode.split(".")[1:])
        at, of = instruction.operands[:2]
        address = self._address(at)
        for i, operand in enumerate(of if isinstance(of, list) else [of]):
            value = np.broadcast_to(self._get(operand, 8 * dtype.itemsize), (self.lanes,))
            self._store(
                space, address + np.uint64(i * dtype.itemsize), value.astype(UNSIGNED[8 * dtype.itemsize]), mask
            )

    def _store(self, space: str, address, value, mask, atomic: bool = False) -> None:
        own = slice(None) if mask is None else mask
        if space == "shared":
            self.shared.store(self.program[own], address[own], value[own])
        else:
            self.memory.store(address[own], value[own], None if atomic else self._who(own))

    def _atom_(self, instruction, mask) -> None:
        mods = instruction.opcode.split(".")[1:]
        space, dtype, _ = self._place(mods)
        name = next(m for m in mods if m in ("add", "max", "min", "or", "and", "xor", "exch", "cas"))
        has_result = instruction.opcode.startswith("atom")
        to, at, *operands = instruction.operands if has_result else [None, *instruction.operands]
        address, out = self._address(at), np.zeros(self.lanes, dtype)
        values = [
            np.broadcast_to(self._get(o, 8 * dtype.itemsize), (self.lanes,))
            .astype(UNSIGNED[8 * dtype.itemsize])
            .view(dtype)
            for o in operands
        ]
        change = {
            "add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or, "and": np.bitwise_and,
            "xor": np.bitwise_xor, "exch": lambda old, new: new,
        }.get(name)  # fmt: skip
        for lane in range(self.lanes) if mask is None else np.flatnonzero(mask):
            one = np.zeros(self.lanes, bool)
            one[lane] = True
            old = self._load(space, address, np.dtype(UNSIGNED[8 * dtype.itemsize]), one, atomic=True).view(dtype)
            new = np.where(old == values[0], values[1], old) if name == "cas" else change(old, values[0])
            self._store(space, address, words(new.astype(dtype)), one, atomic=True)
            out[lane] = old[lane]
        if has_result:
            self._put(to, out, mask)

    _red_ = _atom_

    def _cp_(self, instruction, mask) -> None:
        if instruction.opcode.startswith(_NO_COPIES):
            return
        if not instruction.opcode.startswith(("cp.async.ca.shared.global", "cp.async.cg.shared.global")):
            raise Unknown(instruction.opcode)
        to, of, size, *rest = instruction.operands
        target, source = self._address(to), self._address(of)
        kept = np.broadcast_to(self._get(rest[0] if rest else size, 32), (self.lanes,))
        for offset in range(0, size.bits, 4):
            own = kept > offset if mask is None else mask & (kept > offset)
            value = np.zeros(self.lanes, np.uint32)
            if own.any():
                value = np.where(own, self._load("global", source + np.uint64(offset), np.dtype(np.uint32), own), 0)
            self._store("shared", target + np.uint64(offset), value.astype(np.uint32), mask)


def launch(kernel: Kernel, arguments: list[np.ndarray], grid, shared: int, memory: GlobalMemory) -> int:
    """Run all programs of a launch; how many instructions it took, of all threads in lockstep."""
    total, side = grid[0] * grid[1] * grid[2], max(1, LANES // kernel.threads)
    steps = 0
    for first in range(0, total, side):
        machine = Machine(kernel, arguments, grid, shared, memory, first, min(side, total - first))
        machine.run()
        steps += machine.steps
    return steps

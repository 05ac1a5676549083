"""What a kernel may touch: the bytes of tensors that live on this machine, and its programs' shared memory."""

from __future__ import annotations

import ctypes
import gc

import numpy as np
import torch

from .arithmetic import UNSIGNED

#: what nothing was written to holds: a NaN of every float
POISON = 0xFF


class Fault(AssertionError):
    """What a GPU would answer with an error, or with numbers that mean nothing."""


class Span:
    """Bytes in a row from an address on, aligned as an allocation of CUDA's is."""

    def __init__(self, start: int, content: np.ndarray):
        self.start, self.end = start, start + content.size
        self._views = {
            width: content[: content.size // width * width].view(UNSIGNED[8 * width]) for width in (1, 2, 4, 8)
        }

    def at(self, address: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        return self._views[width], (address.astype(np.int64) - self.start) // width


def _check_alignment(address: np.ndarray, width: int) -> None:
    if (address & np.uint64(width - 1)).any():
        raise Fault(f"an address is no multiple of the {width} bytes that are asked of it")


class Who:
    """Which threads of a launch access memory, and how many barriers their programs have passed."""

    def __init__(self, program: np.ndarray, warp: np.ndarray, barriers: np.ndarray):
        self.program, self.warp, self.barriers = program, warp, barriers

    def __getitem__(self, own) -> Who:
        return Who(self.program[own], self.warp[own], self.barriers[own])


class Touched:
    """Who read and who wrote each byte of a span last, in one launch: a program, a warp of it, and its barriers till then."""

    def __init__(self, size: int):
        self._read, self._written = (np.full((3, size), -1, np.int32) for _ in "rw")

    def check(
        self, at: np.ndarray, width: int, who: Who, values: np.ndarray | None, held: np.ndarray, apart: bool
    ) -> None:
        """Refuse what depends on which of two threads comes first.

        Not seen is a store after a load of another warp of the same program: where a value has copies in several warps, as the
        compiler likes it, all of them load it and one stores what came of it.

        Args:
            values: what is written, or None for a load.
            held: what is there. To write it again does no harm, as threads do that hold copies of one value.
            apart: programs of this launch are not ordered among themselves.
        """
        harmless = np.zeros(at.shape, bool) if values is None else values == held
        for byte in range(width):
            program, warp, barriers = self._written[:, at + byte]
            raced = (program == who.program) & (warp != who.warp) & (barriers == who.barriers)
            if apart:
                raced |= (program >= 0) & (program != who.program)
                if values is not None:
                    reader = self._read[0, at + byte]
                    raced |= (reader >= 0) & (reader != who.program)
            if (raced & ~harmless).any():
                what = "read" if values is None else "written"
                raise Fault(f"a byte is {what} that another thread touches, and no barrier is between them: a race")
            (self._read if values is None else self._written)[:, at + byte] = who.program, who.warp, who.barriers


class GlobalMemory:
    """Tensors by address. One that no argument names, but a table of addresses does, is looked for among all that live.

    Args:
        apart: programs are not ordered by atomics; then none may read or write what another one writes.
    """

    def __init__(self, tensors, apart: bool = True):
        self._apart = apart
        self._touched: dict[int, Touched] = {}
        self._spans: list[Span] = []
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> Span | None:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return None
        held = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
        self._spans.append(Span(storage.data_ptr(), np.frombuffer(held, np.uint8)))
        return self._spans[-1]

    def _find(self, address: int) -> Span:
        for span in self._spans:
            if span.start <= address < span.end:
                return span
        for found in gc.get_objects():
            if type(found) in (torch.Tensor, torch.nn.Parameter):  # isinstance would ask whatever lives
                storage = found.untyped_storage()
                if storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes():
                    return self._add(found)
        raise Fault(f"address {address:#x} is in no tensor")

    def _pieces(self, address: np.ndarray, width: int):
        """(view, index, which addresses, who touched them) for every span that they lie in."""
        _check_alignment(address, width)
        left = np.ones(address.shape, bool)
        while left.any():
            lowest = int(address[left].min())
            span = self._find(lowest)
            own = left & (address < span.end)
            if int(address[own].max()) + width > span.end:
                raise Fault(f"{width} bytes at {int(address[own].max()):#x} reach beyond the end of a tensor's memory")
            view, index = span.at(address[own], width)
            touched = self._touched.setdefault(span.start, Touched(span.end - span.start))
            yield view, index, own, touched
            left &= ~own

    def load(self, address: np.ndarray, width: int, who: Who | None = None) -> np.ndarray:
        """Words at addresses; without ``who`` by an atomic, which may touch what others do."""
        out = np.zeros(address.shape, UNSIGNED[8 * width])
        for view, index, own, touched in self._pieces(address, width):
            out[own] = view[index]
            if who is not None:
                touched.check(index * width, width, who[own], None, out[own], self._apart)
        return out

    def store(self, address: np.ndarray, values: np.ndarray, who: Who | None = None) -> None:
        width = values.dtype.itemsize
        for view, index, own, touched in self._pieces(address, width):
            before = view[index]
            view[index] = values[own]
            if (view[index] != values[own]).any():
                raise Fault("two threads write different values to one place at once: a race")
            if who is not None:
                touched.check(index * width, width, who[own], values[own], before, self._apart)


class SharedMemory:
    """That of several programs side by side, full of :data:`POISON`; an address is a program's own."""

    def __init__(self, programs: int, size: int):
        self.size, self._stride = size, -(-max(size, 16) // 16) * 16
        self._span = Span(0, np.full(programs * self._stride, POISON, np.uint8))

    def _at(self, program: np.ndarray, address: np.ndarray, width: int):
        address = address.astype(np.uint64)
        _check_alignment(address, width)
        if address.size and int(address.max()) + width > self.size:
            raise Fault(f"shared memory has {self.size} bytes, and byte {int(address.max()) + width - 1} is asked for")
        return self._span.at(program.astype(np.uint64) * np.uint64(self._stride) + address, width)

    def load(self, program, address, width: int) -> np.ndarray:
        view, index = self._at(program, address, width)
        return view[index]

    def store(self, program, address, values) -> None:
        view, index = self._at(program, address, values.dtype.itemsize)
        view[index] = values

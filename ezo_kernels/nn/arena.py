"""One buffer for all intermediates of an integer pass, each given memory only while it lives.

The paper tallies every buffer as if it were allocated at once and never released, and names release by lifetime as future work
(its open question 3). Here a trial pass on the meta device records when each intermediate is made and dropped, a plan gives
each an offset such that no two live at once overlap, and the passes that follow take their memory from one buffer by that plan.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

#: Offsets are multiples of this many bytes: what vector loads and GPU transactions like.
ALIGNMENT = 64
#: Counters begin at multiples of this many int32: 16 bytes, as kernels are compiled for.
_WORDS = 4


@dataclass
class Interval:
    """One intermediate: its bytes, when it was made and dropped (event numbers), and the layer whose accumulators it is."""

    size: int
    start: int
    end: int | None = None
    owner: object = None
    offset: int = 0


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass
class ArenaPlan:
    """Offsets of the intermediates of one pass, in the order in which they are made.

    Attributes:
        intervals: in that order.
        planned_bytes: size of the buffer.
        all_at_once_bytes: the sum of all intermediates: what they take if none is released.
        live_bytes: the most that live at one time: no plan can do with less.
        counters: int32 words that start as zeros: peaks and sums, which are not counted among the bytes.
        measured_bytes: end of the highest intermediate that a pass by this plan was handed, plus whatever it asked for that
            was not in the plan.
    """

    intervals: list[Interval] = field(default_factory=list)
    planned_bytes: int = 0
    all_at_once_bytes: int = 0
    live_bytes: int = 0
    counters: int = 0
    measured_bytes: int = 0

    @classmethod
    def of(cls, intervals: list[Interval]) -> ArenaPlan:
        """Largest first, each at the lowest offset that is free while it lives."""
        last = 1 + max((i.start for i in intervals), default=0)
        for i in intervals:
            i.end = last + len(intervals) if i.end is None else i.end
        placed: list[Interval] = []
        for i in sorted(intervals, key=lambda i: (-i.size, i.start)):
            i.offset = 0
            for other in sorted(placed, key=lambda o: o.offset):
                apart = other.end <= i.start or i.end <= other.start
                if not apart and i.offset + _padded(i.size) > other.offset:
                    i.offset = max(i.offset, other.offset + _padded(other.size))
            placed.append(i)
        starts = [i.start for i in intervals]
        live = [sum(_padded(i.size) for i in intervals if i.start <= t < i.end) for t in starts]
        return cls(
            intervals,
            max((i.offset + _padded(i.size) for i in intervals), default=0),
            sum(_padded(i.size) for i in intervals),
            max(live, default=0),
        )

    def at_the_peak(self) -> set:
        """Owners of accumulators that live while the most memory does."""
        owners = set()
        for t in (i.start for i in self.intervals):
            living = [i for i in self.intervals if i.start <= t < i.end]
            if sum(_padded(i.size) for i in living) == self.live_bytes:
                owners.update(i.owner for i in living if i.owner is not None)
        return owners


class _Block:
    """Keeps one intermediate's place; its end gives the place back."""

    __slots__ = ("_arena", "_index", "_pass")

    def __init__(self, arena: Arena, index: int) -> None:
        self._arena, self._index, self._pass = arena, index, arena._pass

    def __del__(self) -> None:
        # torch.compile makes some without __init__
        if hasattr(self, "_arena"):
            self._arena._drop(self._index, self._pass)


class Arena:
    """Memory of the intermediates of one model's passes.

    Attributes:
        owner: the layer that runs, so that a plan knows whose accumulators a block holds.
    """

    def __init__(self) -> None:
        self.owner = None
        self.buffer: torch.Tensor | None = None
        self._pass = 0
        self._mode: str | None = None
        self._plan: ArenaPlan | None = None
        self._last: ArenaPlan | None = None
        self._places: dict = {}  # tensors over the buffer, by what asked for them: making one costs more than a small kernel
        self._recorded: list[Interval] = []
        self._clock = self._next = self._outside = self._counted = 0
        self._zeros: torch.Tensor | None = None
        self._live: dict[int, tuple[int, int]] = {}

    def __getstate__(self) -> dict:
        # a copy of a model, or its file, is of its weights: not of what its last step left in memory
        nothing = {"owner": None, "buffer": None, "_places": {}, "_zeros": None, "_live": {}}
        return {**self.__dict__, **nothing}

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[ArenaPlan]]:
        """Record a trial pass on the meta device; the list holds its plan afterwards."""
        self._start("record")
        found: list[ArenaPlan] = []
        try:
            yield found
        finally:
            self._mode = None
        plan = ArenaPlan.of(self._recorded)
        plan.counters = self._counted
        found.append(plan)

    @contextlib.contextmanager
    def running(self, plan: ArenaPlan, zeros: torch.Tensor) -> Iterator[None]:
        """Run a pass by ``plan``, on the device of ``zeros``.

        Args:
            zeros: int32 [plan.counters], what :meth:`counters` hands out. Of this pass alone, so that what a user keeps of a
                pass, such as its losses, is not zeroed by the next one.
        """
        device = zeros.device
        self._start("run")
        try:
            if self.buffer is None or self.buffer.device != device or len(self.buffer) < plan.planned_bytes:
                self.buffer = torch.empty(plan.planned_bytes, dtype=torch.int8, device=device)
                self._places = {}
            elif plan is not self._last:
                self._places = {}
            self._plan = self._last = plan
            self._zeros = zeros
            yield
        finally:
            self._mode = self._plan = self._zeros = None

    def _start(self, mode: str) -> None:
        if self._mode is not None:
            raise RuntimeError("a pass is already running in this arena")
        if self._live:
            # Whoever still holds an intermediate of an earlier pass keeps the earlier buffer, not us: a trial forgets who does.
            self.buffer, self._places = None, {}
        self._mode, self._recorded, self._live = mode, [], {}
        self._clock = self._next = self._outside = self._counted = 0
        self._pass += 1

    def allocate(self, shape, dtype: torch.dtype):
        """An uninitialised tensor, and what keeps its place while it is referred to."""
        size = math.prod(shape) * dtype.itemsize
        index = self._next
        self._next += 1
        self._clock += 1
        if self._mode == "record":
            accumulators = self.owner if dtype == torch.int32 else None
            self._recorded.append(Interval(size, self._clock, owner=accumulators))
            return torch.empty(shape, dtype=dtype, device="meta"), _Block(self, index)
        if self._mode is None:
            raise RuntimeError(
                "no pass is running in this arena: compute with a copy of what a step left, Int8Tensor(x.values.clone(), "
                "x.exponent)"
            )
        intervals = self._plan.intervals
        fits = index < len(intervals) and intervals[index].size == size
        offset = intervals[index].offset if fits else 0
        end = offset + _padded(size)
        if not fits or any(first < end and offset < last for first, last in self._live.values()):
            # A forward that does not do the same each time: correct, at the price of memory that is not planned.
            self._outside += _padded(size)
            self._measure(self._plan.planned_bytes)
            return torch.empty(shape, dtype=dtype, device=self.buffer.device), None
        self._live[index] = (offset, end)
        self._measure(end)
        where = (index, dtype, tuple(shape))
        place = self._places.get(where)
        if place is None:
            place = self._places[where] = self.buffer[offset : offset + size].view(dtype).view(shape)
        return place, _Block(self, index)

    def counters(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """``count`` zeros, int32 or int64."""
        first = -(-self._counted // _WORDS) * _WORDS
        self._counted = first + count * (dtype.itemsize // 4)
        if self._mode == "record":
            return torch.empty(count, dtype=dtype, device="meta")
        if self._zeros is None or self._counted > len(self._zeros):
            device = "cpu" if self.buffer is None else self.buffer.device
            return torch.zeros(count, dtype=dtype, device=device)
        return self._zeros[first : self._counted].view(dtype)

    def _measure(self, end: int) -> None:
        self._plan.measured_bytes = max(self._plan.measured_bytes, end + self._outside)

    def _drop(self, index: int, of_pass: int) -> None:
        if of_pass != self._pass:
            return
        if self._mode == "record":
            self._clock += 1
            self._recorded[index].end = self._clock
        else:
            self._live.pop(index, None)

"""Mini-batches of tensors that are in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..ops.int8_tensor import Int8Tensor
from .draws import check_count, check_seed


class Batches:
    """Shuffled mini-batches of (x, y); the order of an epoch is a function of (seed, epoch) alone.

    So a run resumed in the middle of an epoch sees what it would have seen. Iterating goes through epoch 0, then 1,
    ...; :meth:`epoch` gives one by number. A device's batches are gathered on it, from one permutation copied an epoch.

    Args:
        x: [n, ...], a tensor or an Int8Tensor of one group.
        y: [n, ...], on the same device.
        batch_size: rows of a batch.
        seed: any non-negative integer.
        drop_last: leave out the short batch at the end of an epoch (a captured step has one shape); kept by default.

    Raises:
        TypeError: x or y that is no tensor, a batch_size or a seed that is no integer.
        ValueError: x and y differ in length or are empty, batch_size < 1, seed < 0, or nothing left by drop_last.
    """

    def __init__(self, x, y, batch_size: int, seed: int = 0, *, drop_last: bool = False):
        for name, value in (("x", x), ("y", y)):
            if not isinstance(value, (torch.Tensor, Int8Tensor)):
                raise TypeError(f"{name} must be a tensor or an Int8Tensor, got {type(value).__name__}")
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x has {len(x)} rows and y has {len(y)}: as many are needed, and at least one")
        batch_size, seed = check_count(batch_size, "batch_size"), check_seed(seed)
        if drop_last and batch_size > len(x):
            raise ValueError(f"a batch of {batch_size} out of {len(x)} rows: drop_last would leave nothing")
        self.x, self.y, self.batch_size, self.seed, self.drop_last = x, y, batch_size, seed, drop_last
        self.next_epoch = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        whole, rest = divmod(len(self.x), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> torch.Tensor:
        """The permutation of an epoch: int64 [n], on the CPU."""
        epoch = check_seed(epoch, "epoch")
        # SeedSequence mixes the pair, so that (0, 1) and (1, 0) have nothing in common.
        mixed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
        return torch.randperm(len(self.x), generator=torch.Generator().manual_seed(mixed))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches ``start``, ``start + 1``, ... of an epoch; none if it has not as many.

        Raises:
            TypeError: an epoch or a start that is no integer. ValueError: a negative one.
        """
        order, start = self.order(epoch).to(self.x.device), check_seed(start, "start")
        size = self.batch_size
        return (self._read(epoch, order[i * size : (i + 1) * size]) for i in range(start, len(self)))

    def _read(self, epoch: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x.index_select(0, rows), self.y.index_select(0, rows)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        return self.epoch(epoch)

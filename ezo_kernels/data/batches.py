"""Mini-batches of tensors that are in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


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
        ValueError: x and y differ in length or are empty, batch_size < 1, seed < 0, or nothing left by drop_last.
    """

    def __init__(self, x, y, batch_size: int, seed: int = 0, *, drop_last: bool = False):
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x has {len(x)} rows and y has {len(y)}: as many are needed, and at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: at least 1 is needed")
        if seed < 0:
            raise ValueError(f"seed is {seed}: it must not be negative")
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
        # SeedSequence mixes the pair, so that (0, 1) and (1, 0) have nothing in common.
        mixed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
        return torch.randperm(len(self.x), generator=torch.Generator().manual_seed(mixed))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches ``start``, ``start + 1``, ... of an epoch."""
        order = self.order(epoch).to(self.x.device)
        for i in range(start, len(self)):
            rows = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield self.x.index_select(0, rows), self.y.index_select(0, rows)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        return self.epoch(epoch)

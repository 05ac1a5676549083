"""A machine without memory for slabs: tests of what is done then."""

from __future__ import annotations

import torch


class LittleMemory:
    """Flat tensors (a workspace is one) of more than ``most`` elements fail as on a full device; ``asked`` has all sizes."""

    def __init__(self, monkeypatch, most: int) -> None:
        self.most, self.asked, make = most, [], torch.Tensor.new_empty

        def new_empty(tensor, *size, **options):
            made = make(tensor, *size, **options)
            if made.dim() == 1:
                self.asked.append(made.numel())
                if made.numel() > self.most:
                    raise torch.OutOfMemoryError("injected")
            return made

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

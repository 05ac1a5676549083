"""Fused embedding: drop-in for nn.Embedding."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import perturbed_embedding
from .context import ZOContext
from .linear import become


class ZOEmbedding(nn.Embedding):
    """nn.Embedding that perturbs the rows it gathers during a zeroth-order pass.

    Shapes as nn.Embedding; in a stacked pass ids are [groups * B, ...], group-major, or positions, [1, T] or [T], which all
    rows have in common and get as [groups * B, T, D]. Outside a pass it is nn.Embedding.
    ``padding_idx`` has no gradient in torch; here its row is perturbed and updated like any other unless it is frozen.
    """

    zo: ZOContext
    site: int

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, zo: ZOContext, sites: dict[str, int]) -> ZOEmbedding:
        """Turn ``embedding`` into one, in place; ``sites`` maps "weight" to its id."""
        return become(embedding, cls, zo=zo, site=sites["weight"])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.zo.p is None:
            return super().forward(input)
        self.zo.visit(self.site)
        if self.zo.is_common(input):
            return self.zo.made(self._of_every_row(input))
        shared = self.zo.require_rows(input, "Embedding", self.site)
        y = perturbed_embedding(input, self.weight, self.zo.of(self.site), site=self.site, shared=shared)
        return self.zo.made(y)

    def _of_every_row(self, ids: torch.Tensor) -> torch.Tensor:
        p = self.zo.of(self.site)
        own = perturbed_embedding(ids, self.weight, p, site=self.site, shared=True)
        own = own.view(p.groups, 1, *(ids.shape if ids.dim() == 1 else ids.shape[1:]), own.shape[-1])
        y = own.expand(-1, self.zo.rows // p.groups, *own.shape[2:]).flatten(0, 1)
        if self.zo.common is not None:
            self.zo.common.mark(y)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, site={self.site}"

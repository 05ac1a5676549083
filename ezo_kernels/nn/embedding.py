"""Fused embedding: drop-in for nn.Embedding."""

from __future__ import annotations

import torch
from torch import nn

from ..ops import perturbed_embedding
from .context import ZOContext
from .linear import become


class ZOEmbedding(nn.Embedding):
    """nn.Embedding that perturbs the rows it gathers during a zeroth-order pass.

    Shapes as nn.Embedding; in a stacked pass ids are [groups * B, ...], group-major. Outside a pass it is nn.Embedding.
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
        shared = self.zo.require_rows(input, "Embedding", self.site)
        return perturbed_embedding(input, self.weight, self.zo.of(self.site), site=self.site, shared=shared)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, site={self.site}"

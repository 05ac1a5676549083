"""A decoder language model in plain torch, with random weights: the size is what is measured, not what it says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import ezo_kernels as ezo


@dataclass(frozen=True)
class Size:
    """Layers, width, heads, vocabulary, longest sequence."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    length: int


#: 1.31e9 parameters, OPT-1.3B's shape; and what a CPU runs in a test.
SIZES = {"cuda": Size(24, 2048, 32, 50272, 1024), "cpu": Size(2, 32, 2, 96, 16)}


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        w, self.heads = size.width, size.heads
        self.norm1, self.norm2 = nn.LayerNorm(w), nn.LayerNorm(w)
        self.qkv, self.out = nn.Linear(w, 3 * w), nn.Linear(w, w)
        self.up, self.down = nn.Linear(w, 4 * w), nn.Linear(4 * w, w)

    def forward(self, x):
        b, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, w))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """[B, T] ids -> [B, T, vocabulary] logits; the output layer is the embedding.

    Args:
        size: :class:`Size`.
        seed: of the weights, normal with a deviation of 0.02.
    """

    def __init__(self, size: Size, seed: int = 0, device="cpu", dtype=torch.float32) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embed, self.place = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.length, size.width)
            self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
            self.norm = nn.LayerNorm(size.width)
            self.logits = nn.Linear(size.width, size.vocabulary, bias=False)
            self.logits.weight = self.embed.weight
        self.to_empty(device=device).to(dtype)
        self.logits.weight = self.embed.weight  # to_empty keeps no ties
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    p.normal_(0.0, 0.02, generator=generator)
                else:
                    p.fill_(1.0 if name.endswith("weight") else 0.0)

    def forward(self, ids):
        # a place for each row: a pass of several groups stacks rows, and each has positions of its own group
        places = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).contiguous()
        x = self.embed(ids) + self.place(places)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


def loss_fn(logits, target):
    """Mean cross-entropy of [B, T, V] logits and [B, T] targets, by chunks: its fp32 softmax never exists as a whole."""
    return ezo.chunked_cross_entropy(logits.flatten(0, 1), target.flatten())

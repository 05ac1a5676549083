"""Dropout that draws one mask for all forwards whose losses are compared, so that their difference is not noise."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..ops._perturbation import NotStackedError
from ..ops.dropout import dropout_mask
from .context import ZOContext
from .linear import become

#: torch's dropouts that are converted, and whether they drop whole channels.
DROPOUTS: dict[type, bool] = {nn.Dropout: False, nn.Dropout1d: True, nn.Dropout2d: True, nn.Dropout3d: True}

#: Dropout modules are numbered above every parameter.
DROPOUT_SITE = 1 << 31
_CALLS = 1 << 8
#: Micro-batches draw their masks at queries this far apart.
_MICRO = 1 << 12


class ZODropout(nn.modules.dropout._DropoutNd):
    """A dropout of torch whose mask, in a zeroth-order pass, is that of its query for both signs, or one for all queries.

    Differentiable, so it serves in the head too. Outside a pass, or in eval mode, it is torch's own.
    """

    zo: ZOContext
    site: int
    plain_class: type

    @classmethod
    def from_dropout(cls, dropout: nn.Module, zo: ZOContext, index: int) -> ZODropout:
        """Turn ``dropout``, the ``index``-th of the model, into one, in place."""
        return become(dropout, cls, zo=zo, site=DROPOUT_SITE + index * _CALLS)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        zo = self.zo
        if zo.p is None or not self.training or self.p == 0:
            return self.plain_class.forward(self, input)
        if zo.undropped:
            return input
        if self.inplace and zo.is_shared(input):
            raise NotStackedError("Dropout: inplace=True writes into what all groups share")
        if self.p == 1:
            return self._times(input, 0.0)
        call = zo.calls.get(self.site, 0)
        if call >= _CALLS:
            raise NotImplementedError(f"a dropout module ran more than {_CALLS} times in one forward: give it copies")
        zo.calls[self.site] = call + 1
        p, queries = zo.p, [0] if zo.one_mask else range(zo.p.query, zo.p.query + zo.p.queries)
        shared = zo.is_shared(input)
        if shared and len(queries) > 1:
            input, shared = zo.made(torch.cat([input] * p.groups)), False
        if p.groups > 1 and not shared and (input.dim() == 0 or input.shape[0] % p.groups):
            raise NotStackedError(
                f"Dropout: x {tuple(input.shape)} does not hold the {p.groups} groups of this pass along dimension 0; run them "
                "one by one (mode='sequential')"
            )
        if input.dim() == 0:
            return self.forward(input[None])[0]
        rows = input.shape[0] // (1 if shared else p.groups)
        per_channel = DROPOUTS[self.plain_class] and input.dim() > 1
        # torch's forms without a batch, whose channels are dimension 0 (Dropout2d has none: it takes [N, C] and [N, C, L])
        alone = input.dim() == {nn.Dropout1d: 2, nn.Dropout3d: 4}.get(self.plain_class)
        shape = (rows, *input.shape[1 : 1 if alone else 2]) if per_channel else (rows, *input.shape[1:])
        features = math.prod(shape[1:])
        scale = 65536.0 / (65536 - round(65536 * self.p))
        masks = []
        for q in queries:
            mask = dropout_mask(
                rows, features, self.p, p.key, site=self.site + call, query=q + zo.micro * _MICRO, rounds=p.noise.rounds
            ).view(shape)
            masks += [mask] * (1 if shared else p.groups // len(queries))
        mask = torch.cat(masks) if len(masks) > 1 else masks[0]
        if per_channel:
            mask = mask.view(*mask.shape, *(1,) * (input.dim() - mask.dim()))
        return self._times(input, (mask * scale).to(input.dtype))

    def _times(self, input: torch.Tensor, factor) -> torch.Tensor:
        return input.mul_(factor) if self.inplace else input * factor

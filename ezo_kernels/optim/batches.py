"""Batches of any structure: stacking them for the groups of a pass, and taking one group's rows."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping

import torch
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from ..ops._perturbation import NotStackedError, aligned


def rows_of(x) -> int:
    """Rows of a batch: the first dimension of its first tensor that has one.

    Raises:
        ValueError: no tensor with a dimension, or an empty batch.
    """
    for leaf in (x,) if type(x) is torch.Tensor else pytree.tree_leaves(x):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            if leaf.shape[0] == 0:
                raise ValueError(f"the batch is empty: x has shape {tuple(leaf.shape)}")
            return leaf.shape[0]
    raise ValueError("the batch holds no tensor with a first dimension")


def stack(x, groups: int, rows: int):
    """``x`` with every tensor whose first dimension is the batch (``rows``) repeated ``groups`` times, group-major."""

    def repeat(leaf):
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == rows:
            return torch.cat([leaf] * groups)
        return leaf

    return pytree.tree_map(repeat, x) if groups > 1 else x


def picked(batch, rows: torch.Tensor, taken: int):
    """``batch``, of whose tensors those with ``taken`` rows have these ``rows`` alone."""

    def pick(leaf):
        of_batch = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == taken
        return leaf.index_select(0, rows) if of_batch else leaf

    return pytree.tree_map(pick, batch)


def copied(batch):
    """The batch with a copy of each of its tensors."""
    return pytree.tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, batch)


def lengths_of(x, kwargs) -> frozenset[int]:
    """Second dimensions of a batch's tensors."""
    leaves = (x,) if _is_plain(x, kwargs) else pytree.tree_leaves((x, kwargs))
    return frozenset(t.shape[1] for t in leaves if isinstance(t, torch.Tensor) and t.dim() > 1)


def _is_plain(x, kwargs) -> bool:
    """Whether a batch is one tensor: most are, and a step should not walk trees for them."""
    return not kwargs and type(x) is torch.Tensor


def dense(x, kwargs, rows: int):
    """A batch, of whose tensors those of its ``rows`` are copied that are not densely strided, or begin where a library's
    kernels may have other bits.
    """

    def own(leaf):
        if not (isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == rows):
            return leaf
        if leaf.layout != torch.strided:
            return leaf
        elsewhere = type(leaf) is torch.Tensor and leaf.device.type == "cpu" and leaf.data_ptr() % 64  # NumPy's, say
        return leaf if aligned(leaf) is leaf and not elsewhere else torch.cat([leaf])

    return (own(x), kwargs) if _is_plain(x, kwargs) else pytree.tree_map(own, (x, kwargs))


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all values are the same, NaN among them."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _has_values(t: torch.Tensor) -> bool:
    """Whether it can be compared element by element."""
    return t.layout == torch.strided and not t.is_meta and not isinstance(t, FakeTensor)


class Unwritten:
    """Sees whether a batch was written: by torch's count, and by the values of ``original``, for not all is counted."""

    def __init__(self, batch, original) -> None:
        self._pairs = [
            (t, o) for t, o in zip(*map(pytree.tree_leaves, (batch, original)), strict=True) if torch.is_tensor(t)
        ]
        self._counts = [None if t.is_inference() else t._version for t, _ in self._pairs]

    @torch.no_grad()
    def holds(self) -> bool:
        """Whether it is as it was."""
        return all(
            (count is None or t._version == count) and (not _has_values(t) or equal(t, o))
            for (t, o), count in zip(self._pairs, self._counts, strict=True)
        )


def _like(output: dict, row: dict) -> dict:
    """``row`` as a dict of the class of ``output``."""
    if type(output) is defaultdict:
        return defaultdict(output.default_factory, row)
    # Hugging Face's ModelOutput, and what is written in its manner, has a field for each key and takes no mapping.
    by_name = type(output) not in (dict, OrderedDict) and all(isinstance(k, str) for k in row)
    return type(output)(**row) if by_name else type(output)(row)


def parts_of(output, groups: int) -> list:
    """The rows of each group of a stacked output: a tensor, or any nest of tuples, lists, dicts and Hugging Face outputs."""
    if groups == 1:
        return [output]
    if isinstance(output, torch.Tensor):
        if output.dim() == 0 or output.shape[0] % groups:
            raise NotStackedError(
                f"the model's output of shape {tuple(output.shape)} does not hold {groups} groups along dimension 0; "
                "run them one by one (mode='sequential')"
            )
        return [aligned(own) for own in output.chunk(groups)]
    if isinstance(output, dict):
        split = {k: parts_of(v, groups) for k, v in output.items()}
        return [_like(output, {k: own[g] for k, own in split.items()}) for g in range(groups)]
    if isinstance(output, (tuple, list)):
        columns = [parts_of(v, groups) for v in output]
        rows = [[own[g] for own in columns] for g in range(groups)]
        return [type(output)(*row) if hasattr(output, "_fields") else type(output)(row) for row in rows]
    if output is not None and not isinstance(output, (bool, int, float, str)):
        raise NotStackedError(
            f"the model's output holds a {type(output).__name__}, which cannot be split into groups; run them one by one "
            "(mode='sequential')"
        )
    return [output] * groups


def plain(x):
    """A batch that is a mapping (Hugging Face's BatchEncoding) or a list of a class of its own, as a plain dict or list."""
    if type(x) is torch.Tensor:
        return x
    if isinstance(x, Mapping) and type(x) is not dict:
        return dict(x)
    return list(x) if isinstance(x, list) and type(x) is not list else x


def call(model, x, kwargs):
    """``model`` on a batch: a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(x, dict):
        return model(**x, **kwargs)
    if isinstance(x, (tuple, list)):
        return model(*x, **kwargs)
    return model(x, **kwargs)

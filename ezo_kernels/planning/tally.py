"""The ElasticZO paper's tally of memory (arXiv 2501.04287, equations 13 to 15 as far as they can be reconstructed).

Every buffer exists at once and none is ever released; the input counts as nothing. In bytes, with P parameters, a_l the
outputs of layer l for the batch, o_l those of the weight layer alone, and C the last layer of the trunk:

    fp32    4 [ sum_l P_l + sum_l a_l ]          +  4 sum_{l > C} ( P_l + a_l )
    int8    sum_l P_l + sum_l ( a_l + 4 o_l )    +  sum_{l > C} ( P_l + a_l + 4 o_l )

The second sum is gradients and errors of the head; 4 o_l are the int32 accumulators. a_l is o_l, again as much for the ReLU
after it (none after the last), and the pooling's output where the next weight layer takes less than this one gave. That is a
chain of layers: for a model with branches the tally is no more than this rule read literally. The equations' text was not to
be had: these give the ratios that the abstract prints (1.598 and 1.458 of LeNet-5).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..nn.cut import all_cuts, in_head, resolve_head
from ..optim.batches import call
from .fake import fake_batch, fake_mode, fake_model


def _elements(value) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return tensors[0].numel() if tensors else 0


def paper_tally(model: nn.Module, x, *, integer: bool = False) -> tuple[int, ...]:
    """Bytes of a step by the paper's tally, by the number of weight layers in the head.

    Args:
        model: a plain torch model; not touched, nothing is computed.
        x: one batch: a tensor, a tuple of arguments or a dict; in floats for the integer tally, too.
        integer: as if everything were int8 with int32 accumulators, instead of fp32.

    Returns:
        Entry n for a head of the last n weight layers: 0 is full ZO, the last one full BP.
    """
    mode = fake_mode()
    with mode:
        return tally_of(fake_model(model, mode), fake_batch(x, mode), integer=integer)


def paper_bytes(model: nn.Module, x, head, *, integer: bool = False) -> int:
    """:func:`paper_tally` of one head, as :func:`ezo_kernels.convert_` takes it.

    Raises:
        TypeError, ValueError: a head that the model does not have.
    """
    mode = fake_mode()
    with mode:
        twin, batch = fake_model(model, mode), fake_batch(x, mode)
        return _tally(twin, batch, all_cuts(twin, batch), [resolve_head(twin, head, batch)], integer)[0]


def tally_of(model: nn.Module, x, *, cuts=None, integer: bool = False) -> tuple[int, ...]:
    """:func:`paper_tally` of a fake model and batch; ``cuts`` if they are known."""
    cuts = all_cuts(model, x) if cuts is None else cuts
    heads = [*cuts[:-1], ("",)] if len(cuts) > 1 else cuts
    return _tally(model, x, cuts, heads, integer)


def _tally(model: nn.Module, x, cuts, heads, integer: bool) -> tuple[int, ...]:
    layers = [head[0] for head in cuts[1:]][::-1]
    taken: dict[str, int] = {}
    given: dict[str, int] = {}

    def hook(name):
        def note(module, args, kwargs, out):
            taken.setdefault(name, _elements((args, kwargs)))
            given[name] = given.get(name, 0) + _elements(out)

        return note

    hooks = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in layers]
    try:
        with torch.no_grad():
            call(model, x, {})
    finally:
        for handle in hooks:
            handle.remove()
    if left := [name for name in layers if name not in given]:
        raise ValueError(
            f"the forward ran {', '.join(map(repr, left))} once and not the next time: a model that leaves out layers "
            "by chance has no plan; call eval() on it, or set its rate to 0"
        )
    after = [*layers[1:], None]
    held = {}
    for name, following in zip(layers, after, strict=True):
        pooled = taken[following] if following is not None and taken[following] < given[name] else 0
        activations = given[name] * (1 if following is None else 2) + pooled
        held[name] = activations + 4 * given[name] if integer else 4 * activations
    width = 1 if integer else 4
    parameters = {name: width * p.numel() for name, p in model.named_parameters()}
    owned = (*parameters.items(), *held.items())
    base = sum(size for _, size in owned)
    return tuple(base + sum(size for name, size in owned if in_head(name, head)) for head in heads)

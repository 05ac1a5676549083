"""A model's twin in fake tensors: shapes, dtypes, devices and ties, and no memory."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils import _pytree as pytree


def fake_mode(*, numbers_are_zero: bool = False):
    """The mode in which twins live; kernels do not run in it.

    Args:
        numbers_are_zero: a number that the host asks a tensor for is zero, where it is otherwise refused. For code that checks
            values which were checked before their twins were made, not for a model that decides by them.

    Raises (what runs in it):
        ValueError: it asks a tensor for values. NotImplementedError: it calls an operator that torch has no fake of.
    """
    from torch._subclasses import fake_tensor as fakes  # imports sympy: not when the package is imported

    class Twins(fakes.FakeTensorMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            # Writes in place and returns nothing, but torch has no fake of it.
            if func is torch.ops.aten._fused_adam_.tensor_lr:
                return None
            if numbers_are_zero and func is torch.ops.aten._local_scalar_dense.default:
                return 0
            try:
                return super().__torch_dispatch__(func, types, args, kwargs)
            except (fakes.DataDependentOutputException, fakes.DynamicOutputShapeException) as error:
                raise ValueError(
                    f"the plan runs the model without values, and its forward or loss asks for values: {func}. What depends "
                    "on them (if x.sum() > 0, x.item(), x[mask]) cannot be planned"
                ) from error
            except fakes.UnsupportedOperatorException as error:
                raise NotImplementedError(
                    f"the plan runs the model without values, and {func} cannot run so: give it a fake form "
                    "(torch.library.register_fake)"
                ) from error

    # Without a fake of its own an operator would otherwise run for real, on zeros of the full size.
    return Twins(allow_non_fake_inputs=True, allow_fallback_kernels=False)


def _fake(tensor: torch.Tensor, mode, storages: dict[int, torch.Tensor]) -> torch.Tensor:
    """A fresh fake of ``tensor`` (from_tensor would give every twin the same one); what shares memory shares it again."""
    device = "cpu" if tensor.is_meta else tensor.device  # a model on the meta device is planned as on the CPU
    storage = tensor.untyped_storage()
    with mode, torch.no_grad():
        if storage._cdata not in storages:
            storages[storage._cdata] = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device)
        whole = storages[storage._cdata].view(tensor.dtype)
        made = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


def fake_model(model: nn.Module, mode) -> nn.Module:
    """A copy of ``model`` whose parameters and buffers are fake; ``model`` is read, never written, and not copied."""
    storages: dict[int, torch.Tensor] = {}
    memo = {id(t): _fake(t, mode, storages) for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
            module.momentum = 0.1  # torch asks the host how many batches there were; no byte depends on the average
    return twin


def fake_batch(batch, mode):
    """A batch of any structure with every tensor fake."""
    storages: dict[int, torch.Tensor] = {}
    return pytree.tree_map(lambda t: _fake(t, mode, storages) if isinstance(t, torch.Tensor) else t, batch)

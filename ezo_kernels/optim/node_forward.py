"""Imported with the first optimizer that perturbs outputs: torch's compiler, and triton with it, come along."""

import torch


@torch.compiler.disable
def node_forward(layer, x, shared: bool):
    """``layer.with_perturbed_outputs(x, shared)`` as plain Python, in compiled code, too."""
    return layer.with_perturbed_outputs(x, shared)

"""Where the trunk ends: which modules are the head's."""

from __future__ import annotations

import torch
from torch import nn

from .trace import untouched


def _is_weight_layer(module: nn.Module) -> bool:
    """Whether the module itself owns a weight of two or more dimensions."""
    return any(p is not None and p.dim() >= 2 for p in module._parameters.values())


def _of_trace(model: nn.Module, graph: torch.fx.Graph) -> list[str]:
    """Names of the modules that a trace calls.

    torch's layers are calls. The trace goes into any other module: one that has parameters of its own and no layers in it is
    seen by what it reads. (What is read beside calls of layers has no place of its own among them, nor has a layer that is
    called where its weight is read once more, as tied ones are.)
    """
    calls = {node.target for node in graph.nodes if node.op == "call_module"}
    names = []
    for node in graph.nodes:
        if node.op == "call_module":
            names.append(node.target)
        elif node.op == "get_attr":
            name = node.target.rpartition(".")[0]
            module = model.get_submodule(name)
            if name not in calls and not module._modules and type(module).forward is not nn.Module.forward:
                names.append(name)
    return names


def _called_in_order(model: nn.Module, sample) -> list[str]:
    """Names of the modules that own parameters, in the order of a forward."""
    owners = {m: name for name, m in model.named_modules() if any(p is not None for p in m._parameters.values())}
    order: list[str] = []
    if not model._modules:  # the model is one layer
        return list(owners.values())
    if sample is None:
        try:
            with untouched(model):
                graph = torch.fx.symbolic_trace(model).graph
        except Exception as error:
            raise ValueError(
                "head=<integer> needs the order of a forward, and this model cannot be traced without an input "
                f"({type(error).__name__}: {error}); give sample=<one batch>, or name the head's modules"
            ) from error
        return [name for name in _of_trace(model, graph) if name in owners.values()]
    hooks = [m.register_forward_pre_hook(lambda m, _: order.append(owners[m])) for m in owners]
    was_training = {m: m.training for m in model.modules()}
    try:
        with untouched(model), torch.no_grad():
            model.eval()
            if isinstance(sample, dict):
                model(**sample)
            elif isinstance(sample, (tuple, list)):
                model(*sample)
            else:
                model(sample)
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in was_training.items():
            m.training = training
    return order


def all_cuts(model: nn.Module, sample=None) -> list[tuple[str, ...]]:
    """The head of every cut, by the number n = 0, 1, ... of weight layers in it: what an integer head n stands for.

    Args:
        model, sample: as in :func:`resolve_head`.

    Raises:
        ValueError: a model that cannot be traced.
    """
    order = _called_in_order(model, sample)
    weights = list(dict.fromkeys(name for name in order if _is_weight_layer(model.get_submodule(name))))
    return [(), *(tuple(dict.fromkeys(order[order.index(name) :])) for name in reversed(weights))]


def resolve_head(model: nn.Module, head, sample=None) -> tuple[str, ...]:
    """Names of the head's modules (each with everything below it); ("",) is the whole model.

    Args:
        head: a module name or several; an integer n, the last n weight layers of a forward with everything that runs after
            the first of them; 0 for none; "all".
        sample: one batch, for an integer head of a model that cannot be traced without one.

    Raises:
        TypeError: a head of another type.
        ValueError: a name that is not there, an integer out of range, a model that cannot be traced.
    """
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if isinstance(head, bool) or not isinstance(head, (int, str, list, tuple)):
        raise TypeError(f"head must be module names, an integer or 'all', got {type(head).__name__}")
    if isinstance(head, int):
        if head == 0:
            return ()
        cuts = all_cuts(model, sample)
        if not 0 < head < len(cuts):
            raise ValueError(f"head={head} is outside 0..{len(cuts) - 1}: a forward runs {len(cuts) - 1} weight layers")
        return cuts[head]
    if head == "all" and "all" not in names:
        return ("",)
    chosen = (head,) if isinstance(head, str) else tuple(head)
    for name in chosen:
        if not isinstance(name, str):
            raise TypeError(f"a head name must be a string, got {type(name).__name__}")
        if name not in names or name == "":
            known = ", ".join(n for n, _ in model.named_children())
            raise ValueError(f"there is no module {name!r} in the model to be the head; its children are: {known}")
    return chosen


def in_head(name: str, head: tuple[str, ...]) -> bool:
    """Whether the module or parameter ``name`` lies in the head."""
    return any(h == "" or name == h or name.startswith(h + ".") for h in head)

"""What a traced forward shows before a model is converted to integers: calls without an integer form, and those in place."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.int8_functions import FUNCTIONS
from ..ops.int8_tensor import integer_forms
from .trace import untouched

#: Methods of an Int8Tensor that a traced forward may call.
_METHODS = {"relu", "flatten", "view", "reshape", "size", "dim", "add"}
#: Of numbers, and those of tensors.
_NUMBERS = {operator.getitem, operator.mul, operator.floordiv, getattr}
_PYTHON = {operator.add, operator.iadd, *_NUMBERS}
_WRAPPED = {F.dropout, F.max_pool2d, F.max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool1d}
#: What gives its input under another name or shape, over the same memory.
_SAME_MEMORY = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_VIEWS = {torch.flatten, torch.reshape, F.dropout, "flatten", "view", "reshape"}


class _Proxy(torch.fx.Proxy):
    """torch's takes ``a += b`` for ``a = a + b``."""

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(torch.fx.Tracer):
    def __init__(self, leaves: tuple[type, ...]) -> None:
        super().__init__()
        self.leaves = leaves

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module, name) -> bool:
        return type(module) in self.leaves or super().is_leaf_module(module, name)


def faults_of_the_forward(model: nn.Module, leaves: tuple[type, ...]) -> list[str]:
    """Functions that a traced forward calls and that no integer form is of, and those whose place would be missed.

    Args:
        leaves: classes of modules that are known, and not looked into.

    Returns:
        None of them if it cannot be traced, as with control flow: its first step finds out.
    """
    try:
        with untouched(model):
            graph = _Tracer(leaves).trace(model)
    except Exception:
        return []
    return _without_form(graph) + _in_place(graph, dict(model.named_modules()))


def _without_form(graph: torch.fx.Graph) -> list[str]:
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target not in FUNCTIONS and node.target not in _PYTHON | _WRAPPED:
            if getattr(node.target, "__module__", "").startswith("ezo_kernels"):
                continue
            name = getattr(node.target, "__name__", node.target)
            found.append(f"{_where(node)} calls {name}, which has no integer form ({integer_forms()})")
        elif node.op == "call_method" and node.target not in _METHODS:
            found.append(
                f"{_where(node)} calls the method {node.target}, which has no integer form ({integer_forms()})"
            )
        elif node.op == "get_attr":
            found.append(f"the forward reads {node.target!r} itself instead of calling the layer that owns it")
    return found


def _in_place(graph: torch.fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    """Calls in place that are more than what they return: integers are never changed in place, so another function it were."""
    found = []
    order = {node: i for i, node in enumerate(graph.nodes)}
    base: dict[torch.fx.Node, torch.fx.Node] = {}  # whose memory a node's result lies in
    for node in graph.nodes:
        own = node.args[0] if node.args else node.kwargs.get("input")
        what = _changes(node, modules)
        if not isinstance(own, torch.fx.Node) or _is_number(own):
            base[node] = node
            continue
        base[node] = base[own] if what or _is_view(node, modules) else node
        if not what:
            continue
        before = [other for other in base if base[other] is base[own] and other is not node]
        later = {user for other in before for user in other.users if order[user] > order[node]}
        # a relu of what a relu has changed finds the same
        alike = _is_relu(node, modules)
        readers = [user for user in later if not _is_number(user) and not (alike and _is_relu(user, modules))]
        if readers:
            then = f"and {min(readers, key=order.get)} reads that again"
        elif not node.users:
            then = "and what that returns is not used"
        else:
            continue
        found.append(
            f"{_where(node)} changes {own} in place ({what}), {then}: integers are never changed in place, so the model "
            "would be another function; use what it returns from there on (h = relu(h)), or what is not in place"
        )
    return found


def _changes(node: torch.fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """What changes its first argument in place, or None."""
    if node.op == "call_module":
        module = modules[node.target]
        return f"{node.target} ({type(module).__name__})" if isinstance(module, nn.ReLU) and module.inplace else None
    if node.op != "call_function":
        return None
    if node.target is F.relu and (node.kwargs.get("inplace") or any(node.args[1:])):
        return "F.relu(inplace=True)"
    return {torch.relu_: "relu_", operator.iadd: "+="}.get(node.target)


def _is_relu(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[node.target], nn.ReLU)
    return node.target in (F.relu, torch.relu, torch.relu_, "relu")


def _is_view(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[node.target], _SAME_MEMORY)
    return node.op in ("call_function", "call_method") and node.target in _VIEWS


def _is_number(node: torch.fx.Node) -> bool:
    """Whether it asks for a size, or is made of such: no values are read."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    if node.op != "call_function":
        return False
    if node.target in (operator.add, operator.iadd):
        return all(_is_number(arg) for arg in node.args if isinstance(arg, torch.fx.Node))
    return node.target in _NUMBERS


def _where(node: torch.fx.Node) -> str:
    """Whose forward a traced call is in."""
    owners = list((node.meta.get("nn_module_stack") or {}).values())
    if node.op == "call_module":  # the last one is what is called
        owners = owners[:-1]
    name, module = owners[-1] if owners else ("", None)
    return f"the forward of {name} ({getattr(module, '__name__', module)})" if name else "the forward"

"""A float model as an integer one, and back: what ``convert_(model, precision="int8")`` does."""

from __future__ import annotations

import torch
from torch import nn

from ..ops._constants import MOST_TERMS
from ..ops._layout import default_layout
from ..ops.int8_functions import AVG_POOL, MAX_POOL
from ..ops.int8_tensor import MOST_EXPONENT, Int8Tensor, least_exponent, quantize
from .arena import Arena
from .context import Site, ZOContext
from .cut import in_head, resolve_head
from .int8_layers import Int8Conv1d, Int8Conv2d, Int8Linear
from .int8_trace import faults_of_the_forward
from .linear import release
from .plan import Plan, refuse_classes

WEIGHT_LAYERS: dict[type, type] = {nn.Linear: Int8Linear, nn.Conv1d: Int8Conv1d, nn.Conv2d: Int8Conv2d}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
#: Modules without parameters that call functions which have an integer form, and containers.
_LEAVES = (
    nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity,
)  # fmt: skip
PLAIN = (*_LEAVES, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ADVICE = {
    nn.BatchNorm2d: "fold it into the convolution first (torch.nn.utils.fusion.fuse_conv_bn_eval)",
    nn.BatchNorm1d: "fold it into the layer before it first (torch.nn.utils.fusion.fuse_linear_bn_eval, or fuse_conv_bn_eval)",
    nn.Dropout: "set its rate to 0 or leave it out",
    nn.Sigmoid: "use nn.ReLU",
    nn.Tanh: "use nn.ReLU",
    nn.GELU: "use nn.ReLU",
}


def _advice(module: nn.Module) -> str:
    text = next((text for cls, text in _ADVICE.items() if isinstance(module, cls)), None)
    return text or "take it out, or train the model in floating point (precision='float')"


def _check_layer(module: nn.Module) -> str | None:
    """Why a linear layer or a convolution has no integer form, or None."""
    own = {leaf: p for leaf, p in module._parameters.items() if p is not None}
    if set(own) - {"weight", "bias"} or "weight" not in own:
        return (
            f"its weight is computed from {', '.join(own)}: undo that first (remove_weight_norm, remove_spectral_norm, "
            "prune.remove)"
        )
    for leaf, p in own.items():
        if p.is_meta:
            return f"its {leaf} is on the meta device: materialise it first"
        if p.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its {leaf} is {p.dtype}, not float32, float16 or bfloat16: model.float() first"
        if not p.numel():
            return f"its {leaf} {tuple(p.shape)} is empty: leave the layer out"
        if not bool(torch.isfinite(p).all()):
            return f"its {leaf} holds values that are not finite"
        reach = p.detach().abs().max().item()
        if least_exponent(reach) > MOST_EXPONENT:
            return f"its {leaf} reaches {reach:.3g}, and int8 holds 127 * 2^{MOST_EXPONENT} at most: scale it down"
    terms = module.weight[0].numel()
    if terms > MOST_TERMS:
        return f"it sums {terms} products for one output, and int32 holds {MOST_TERMS} (127 * 128 * terms + 127 * 2^22 < 2^31)"
    if isinstance(module, _CONVOLUTIONS):
        if module.padding_mode != "zeros":
            return f"padding_mode {module.padding_mode!r}: only zeros"
        if module.padding == "same" and any(
            d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ):
            return "padding 'same' of an even kernel"
    return None


def _check_plain(module: nn.Module) -> str | None:
    """Why a module without parameters has no integer form as it is set, or None."""
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d)):
        asked = module.dilation not in (1, (1,), (1, 1)) or module.ceil_mode or module.return_indices
        return f"{MAX_POOL} in integers" if asked else None
    if isinstance(module, (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)) and module.return_indices:
        return f"{MAX_POOL} in integers"
    if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d)):
        asked = module.ceil_mode or getattr(module, "divisor_override", None) is not None
        outside = module.padding not in (0, (0,), (0, 0)) and not module.count_include_pad
        return f"{AVG_POOL} in integers" if asked or outside else None
    if isinstance(module, nn.Flatten) and module.start_dim == 0:
        return "it flattens rows, which belong to groups: start_dim=1"
    return None


def _refuse(model: nn.Module, head: tuple[str, ...]) -> None:
    """Raise, listing every module that has no integer form."""
    problems = []
    for name, module in model.named_modules():
        shown = f"{name or 'the model'} ({type(module).__name__})"
        own = [n for n, p in module._parameters.items() if p is not None]
        if type(module) in WEIGHT_LAYERS:
            reason = _check_layer(module)
            if reason:
                problems.append(f"{shown}: {reason}")
            elif type(module) in _CONVOLUTIONS and in_head(name, head):
                problems.append(f"{shown}: convolutions have no integer backward: move the cut behind it")
        elif any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
            problems.append(f"{shown} is lazy: run one forward first")
        elif own:
            problems.append(f"{shown} has parameters of its own and no integer form: {_advice(module)}")
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0:
            continue
        elif type(module).__module__.startswith("torch.nn") and not isinstance(module, PLAIN):
            problems.append(f"{shown} has no integer form: {_advice(module)}")
        elif reason := _check_plain(module):
            problems.append(f"{shown}: {reason}")
    names: dict = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # where it lies tells a weight that is a view of another one, which would be two once they are integers
        lies = (
            not isinstance(parameter, nn.parameter.UninitializedParameter)
            and parameter.numel()
            and parameter.data_ptr()
        )
        place = lies or parameter
        if place in names:
            problems.append(f"{names[place]!r} and {name!r} are one parameter: untie them")
        names[place] = name
    problems += _half_frozen(model, head)
    if type(model) not in WEIGHT_LAYERS:
        problems += faults_of_the_forward(model, (*WEIGHT_LAYERS, *_LEAVES))
    if problems:
        raise NotImplementedError("this model has no integer form: " + "; ".join(problems))


def _half_frozen(model: nn.Module, head: tuple[str, ...]) -> list[str]:
    """Layers of the trunk of which one parameter is frozen: a kernel perturbs both or none."""
    found = []
    for name, module in model.named_modules():
        states = {p.requires_grad for p in module._parameters.values() if p is not None}
        if type(module) in WEIGHT_LAYERS and len(states) == 2 and not in_head(name, head):
            found.append(
                f"{name or 'the model'} ({type(module).__name__}) is frozen in half: freeze its weight and bias, or neither"
            )
    return found


def convert_int8_(model: nn.Module, head, filter_fn=None, sample=None) -> nn.Module:
    """As :func:`ezo_kernels.convert_` with ``precision="int8"``; raises before anything is touched."""
    refuse_classes(model)
    chosen = resolve_head(model, head, sample)
    _refuse(model, chosen)
    plan = Plan(head=chosen)
    modules = {n: m for n, m in model.named_modules() if type(m) in WEIGHT_LAYERS}
    for name, module in modules.items():
        left = filter_fn is not None and not in_head(name, chosen) and not filter_fn(module, name)
        for leaf, p in module._parameters.items():
            if p is not None and not p.requires_grad:
                plan.frozen[f"{name}.{leaf}".lstrip(".")] = "requires_grad=False before conversion"
            elif p is not None and left:
                plan.frozen[f"{name}.{leaf}".lstrip(".")] = "filter_fn left its module alone"
    parameters = dict(model.named_parameters())
    sites = {}
    for i, name in enumerate(sorted(parameters)):
        if name not in plan.frozen and not in_head(name, chosen):
            p = parameters[name]
            owner = name.rpartition(".")[0]
            conv = type(modules[owner]) in _CONVOLUTIONS and name.endswith("weight")
            layout = "conv" if conv else default_layout(p.shape)
            sites[name] = Site(i, (name,), tuple(p.shape), layout, "fused", "int8")
    zo = ZOContext(manifest=tuple(sites.values()))
    held = {n: (p.requires_grad, p.dtype) for n, p in parameters.items()}
    integers = {name: _quantized(module) for name, module in modules.items()}  # nothing is touched before all are there
    for name, module in modules.items():
        own = {leaf: f"{name}.{leaf}".lstrip(".") for leaf, p in module._parameters.items() if p is not None}
        plan.fused[name] = WEIGHT_LAYERS[type(module)]
        _put(module, integers[name])
        plan.fused[name].adopt(
            module, zo,
            sites={leaf: sites[n].site for leaf, n in own.items() if n in sites},
            head_names={leaf: n for leaf, n in own.items() if in_head(n, chosen) and n not in plan.frozen},
            rounding="nearest", strategy="buffer", weights="auto", was={leaf: held[n] for leaf, n in own.items()},
        )  # fmt: skip
    model.__dict__["_ezo"] = zo
    model.__dict__["_ezo_plan"] = plan
    model.__dict__["_ezo_requires_grad"] = held
    model.__dict__["_ezo_arena"] = Arena()
    return model


@torch.no_grad()
def _quantized(module: nn.Module) -> dict[str, Int8Tensor]:
    """A layer's parameters as integers; a zero bias takes the unit of its weight."""
    weight = quantize(module.weight)
    parts = {"weight": weight}
    if module.bias is not None:
        parts["bias"] = quantize(module.bias, None if bool(module.bias.any()) else weight.exponent.item())
    return parts


@torch.no_grad()
def _put(module: nn.Module, parts: dict[str, Int8Tensor]) -> None:
    """int8 values into the same Parameters, exponents into buffers."""
    for leaf, part in parts.items():
        parameter = module._parameters[leaf]
        parameter.requires_grad_(False)
        parameter.data = part.values
        module.register_buffer(leaf + "_exponent", part.exponent)


@torch.no_grad()
def unconvert_int8_(model: nn.Module) -> None:
    """Dequantise in place: plain torch modules, the same Parameters as floats."""
    held = model.__dict__["_ezo_requires_grad"]
    for name, module in model.named_modules():
        if "plain_class" not in module.__dict__:
            continue
        # models that were pickled before layers knew it themselves have it by name alone
        was = module.__dict__.get("was") or {
            leaf: held[f"{name}.{leaf}".lstrip(".")] for leaf, p in module._parameters.items() if p is not None
        }
        for leaf, p in module._parameters.items():
            if p is None:
                continue
            requires_grad, dtype = was[leaf]
            exponent = module._buffers.pop(leaf + "_exponent")
            p.data = torch.ldexp(p.data.to(torch.float32), exponent).to(dtype)
            p.requires_grad_(requires_grad)
        release(module)
    for key in ("_ezo", "_ezo_plan", "_ezo_requires_grad", "_ezo_arena"):
        del model.__dict__[key]

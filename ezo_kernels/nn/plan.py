"""What a conversion will do to each module and parameter, worked out before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..ops._layout import default_layout
from .context import Site
from .conv import ZOConv1d, ZOConv2d
from .cut import in_head, resolve_head
from .dropout import DROPOUTS
from .embedding import ZOEmbedding
from .grouped import BATCH_NORMS
from .linear import ZOLinear, ZOTransposedLinear

FUSED: dict[type, type] = {
    nn.Linear: ZOLinear,
    nn.Conv1d: ZOConv1d,
    nn.Conv2d: ZOConv2d,
    nn.Embedding: ZOEmbedding,
}
#: Modules that read their children's parameters instead of calling them: their whole subtree is one unit.
UNITS = (nn.MultiheadAttention,)
#: Containers of bare parameters: they have no forward.
LISTS = (nn.ParameterList, nn.ParameterDict)
REFUSED: dict[type, str] = {
    nn.DataParallel: "it replicates the model each forward and drops the pass; use one GPU a process",
    nn.parallel.DistributedDataParallel: "it reduces gradients that zeroth-order layers do not have",
    nn.SyncBatchNorm: "its statistics are over processes; use BatchNorm2d",
    torch.jit.ScriptModule: "its forward is compiled and calls no layer of ours; give the module that was scripted or traced",
}


@dataclass
class Plan:
    """Every decision, by qualified name.

    Attributes:
        head: names of the head's modules.
        fused: module -> class that it becomes.
        grouped: module -> its own trunk parameters (path below it).
        dropouts: dropout modules.
        sites: trunk parameters.
        frozen: parameter -> why it is neither perturbed nor trained.
        reasons: module -> why it is not fused.
    """

    head: tuple[str, ...] = ()
    fused: dict[str, type] = field(default_factory=dict)
    grouped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropouts: list[str] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    frozen: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is Hugging Face's Conv1D (recognised without importing transformers)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module._parameters.get("weight") is not None


def fused_class(module: nn.Module) -> type | None:
    """The fused layer for exactly this class of module, or None."""
    return ZOTransposedLinear if is_transposed_linear(module) else FUSED.get(type(module))


def _read_by(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module's own forward reads, by path below it."""
    if isinstance(module, UNITS):
        return dict(module.named_parameters())
    own = dict(module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if isinstance(child, LISTS):
            own |= {f"{name}.{path}": p for path, p in child.named_parameters()}
    return own


def _not_fused(module: nn.Module, trunk: set[nn.Parameter]) -> str | None:
    """Why a module of a fused class is not, or None."""
    own = [p for p in module._parameters.values() if p is not None]
    if any(p not in trunk for p in own):
        return "part of it is frozen or in the head"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm renormalises the weight in the forward"
    return None


def refuse_classes(model: nn.Module) -> None:
    """Refuse what cannot be trained this way wherever the cut is; before a head is looked for, which needs a trace.

    Raises:
        NotImplementedError: the model is one of REFUSED, or holds one.
    """
    for name, module in model.named_modules():
        for cls, why in REFUSED.items():
            if isinstance(module, cls):
                raise NotImplementedError(f"{cls.__name__} ({name or 'the model'}) is refused: {why}")


def _refuse(model: nn.Module, head: tuple[str, ...], trunk: set[nn.Parameter]) -> None:
    for name, module in model.named_modules():
        own = [p for p in module.parameters() if p in trunk]
        if not own or in_head(name, head):
            continue
        if isinstance(module, nn.RNNBase):
            raise NotImplementedError(
                f"{type(module).__name__} {name!r} reads its weights past its attributes and cannot be perturbed: "
                "put it in the head, or freeze it (requires_grad_(False))"
            )
        if parametrize.is_parametrized(module):
            raise NotImplementedError(
                f"{name!r} computes its weight by a parametrization: remove_parametrizations, or put it in the head"
            )
        if hasattr(module, "weight_g") and hasattr(module, "weight_v"):
            raise NotImplementedError(f"{name!r} has weight_norm: remove_weight_norm, or put it in the head")
        hooked = next((path for path in module._parameters if path.endswith("_orig")), None)
        if hooked is not None:
            raise NotImplementedError(
                f"{name!r} computes its {hooked.removesuffix('_orig')!r} from {hooked!r} in a hook (prune, spectral_norm): "
                "remove the hook (prune.remove, remove_spectral_norm), or freeze it (requires_grad_(False))"
            )


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor in its storage, and the one behind its last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset() * tensor.element_size()
    return first, first + (last + 1) * tensor.element_size()


def _check_ties(names: dict[nn.Parameter, list[str]], head: tuple[str, ...]) -> None:
    by_storage: dict[int, list[tuple[int, int, str, bool]]] = {}
    for parameter, own in names.items():
        if not parameter.requires_grad:
            continue
        inside = [n for n in own if in_head(n, head)]
        if inside and len(inside) < len(own):
            outside = next(n for n in own if n not in inside)
            raise ValueError(
                f"{outside!r} (trunk) and {inside[0]!r} (head) are the same parameter: it cannot be trained both ways. "
                "Put both on one side of the cut, or untie them."
            )
        if parameter.numel() == 0:
            continue
        here = (*_extent(parameter), own[0], bool(inside))
        by_storage.setdefault(parameter.untyped_storage()._cdata, []).append(here)
    for together in by_storage.values():  # neighbours in one buffer (vector_to_parameters) are no tie
        end, before, both = 0, "", True
        for first, last, name, inside in sorted(together):
            if first < end and not (both and inside):
                raise ValueError(
                    f"{before!r} and {name!r} are two parameters over the same memory (a transposed tie?): each would be "
                    "perturbed and updated on its own. Tie them as one Parameter, or untie them."
                )
            if last > end:
                end, before, both = last, name, inside


#: Strategies of :func:`ezo_kernels.convert_` with which a linear layer of 16 bits may be multiplied as two products.
_TWO_PRODUCTS = ("auto", "two_products")


@dataclass
class _Use:
    """What a trunk parameter is to the modules that hold it."""

    name: str
    layout: str
    kind: str = "fused"
    linear: bool = True  # everywhere the weight of a ZOLinear


def make_plan(model: nn.Module, head, filter_fn=None, sample=None, strategy: str = "auto") -> Plan:
    """Decide everything; raises instead of touching the model. Arguments as :func:`ezo_kernels.convert_`."""
    refuse_classes(model)
    plan = Plan(head=resolve_head(model, head, sample))
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name!r} is a lazy parameter: run one forward before converting")
        names.setdefault(parameter, []).append(name)
    for own in names.values():
        own.sort()
    _check_ties(names, plan.head)

    left = set()
    if filter_fn is not None:
        left = {n for n, m in model.named_modules() if not in_head(n, plan.head) and not filter_fn(m, n)}
    trunk: set[nn.Parameter] = set()
    for parameter, own in names.items():
        if not parameter.requires_grad:
            plan.frozen.update(dict.fromkeys(own, "requires_grad=False before conversion"))
        elif in_head(own[0], plan.head):
            continue
        elif any(n.rpartition(".")[0] in left for n in own):
            plan.frozen.update(dict.fromkeys(own, "filter_fn left its module alone"))
        elif parameter.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"{own[0]!r} is {parameter.dtype}: a trunk parameter must be float32, float16 or bfloat16")
        else:
            trunk.add(parameter)
    _refuse(model, plan.head, trunk)
    if not trunk:
        return plan
    uses: dict[nn.Parameter, _Use] = {}

    def use(parameter: nn.Parameter, name: str, layout: str, kind: str, linear: bool) -> None:
        known = uses.setdefault(parameter, _Use(name, layout))
        if known.layout != layout:
            raise ValueError(
                f"{known.name!r} and {name!r} are one parameter used as {known.layout} and as {layout}: untie them"
            )
        if kind == "workspace":
            known.kind = kind
        known.linear = known.linear and linear

    unit = None
    for name, module in model.named_modules():
        if unit is not None and name.startswith(unit):
            continue
        if isinstance(module, UNITS):
            unit = f"{name}.".lstrip(".")
        if type(module) in DROPOUTS:
            plan.dropouts.append(name)
            continue
        if in_head(name, plan.head):
            owns = any(p is not None for p in module._parameters.values())
            if (
                owns
                or type(module) in BATCH_NORMS
                or (name in plan.head and type(module).forward is not nn.Module.forward)
            ):
                plan.grouped[name] = ()
            continue
        if isinstance(module, LISTS) and name:  # read by the module that has it
            continue
        own = {path: p for path, p in _read_by(module).items() if p in trunk}
        if not own:
            if type(module) in BATCH_NORMS:
                plan.grouped[name] = ()
            continue
        cls = fused_class(module)
        reason = _not_fused(module, trunk) if cls else f"no fused form of {type(module).__name__}"
        if cls and reason is None:
            plan.fused[name] = cls
        else:
            plan.grouped[name] = tuple(own)
            plan.reasons[name] = reason
        for path, parameter in own.items():
            conv = cls in (ZOConv1d, ZOConv2d) and path == "weight"
            layout = "conv" if conv else default_layout(parameter.shape)
            fused = plan.fused.get(name)
            linear = fused is ZOLinear and path == "weight"
            use(parameter, f"{name}.{path}".lstrip("."), layout, "fused" if fused else "workspace", linear)
    for name in plan.grouped:
        module = model.get_submodule(name)
        taken = next((own for own in ("zo", "zo_owned") if hasattr(module, own)), None)
        if taken is not None:
            raise NotImplementedError(
                f"{name or 'the model'} ({type(module).__name__}) has a {taken!r} of its own, and convert_ needs that name"
            )
    order = sorted(names, key=lambda p: names[p][0])
    for i, p in enumerate(order):
        if p in uses:
            z_dtype = "weight" if uses[p].linear and strategy in _TWO_PRODUCTS else "float32"
            plan.sites.append(Site(i, tuple(names[p]), tuple(p.shape), uses[p].layout, uses[p].kind, z_dtype))
    return plan

"""Turn a torch model into one whose trunk is trained by zeroth order, and back."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from ..ops._strategy import STRATEGIES
from .context import ZOContext
from .cut import in_head
from .dropout import ZODropout
from .grouped import Grouped, group_, ungroup_
from .int8_convert import convert_int8_, unconvert_int8_
from .linear import release
from .plan import REFUSED, Plan, make_plan

PRECISIONS = ("float", "int8")


def is_int8(model: nn.Module) -> bool:
    """Whether the model was converted with ``precision="int8"``."""
    return "_ezo_arena" in model.__dict__


def context_of(model: nn.Module) -> ZOContext:
    """The context of a converted model, or ValueError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    zo = model.__dict__.get("_ezo")
    for cls, why in REFUSED.items():
        if isinstance(model, cls):
            raise NotImplementedError(f"{cls.__name__} is refused: {why}")
    if zo is None and "_ezo" in getattr(model.__dict__.get("_modules", {}).get("_orig_mod"), "__dict__", {}):
        raise ValueError(
            "this is torch.compile's wrapper of a converted model: give the model itself (its compile() compiles it in "
            "place), and call the wrapper in step(closure) if you like"
        )
    if zo is None:
        raise ValueError("the model is not converted: call ezo_kernels.convert_(model, head=...) first")
    return zo


def convert_(
    model: nn.Module, head=0, filter_fn=None, sample=None, *, precision: str = "float", strategy: str = "auto"
) -> nn.Module:
    """Convert ``model`` in place: zeroth order for the trunk, backpropagation for the head.

    Linear, Conv1d, Conv2d, Embedding and Hugging Face's Conv1D of the trunk become fused layers that hold the same
    Parameters; other modules with trunk parameters (norm affine, attention, bare parameters) run once a group on perturbed
    copies; layers of the head and batch norms run once a group (on a GPU small linear ones and the trunk's batch norms for
    all groups at once, in tiles of one group); dropouts draw one mask for both signs. ``state_dict`` is unchanged, and
    outside a step the model computes what it did. Trunk parameters get ``requires_grad=False``.

    Args:
        model: any module. Parameters with ``requires_grad=False`` stay frozen.
        head: names of the head's modules (one or several, each with all below it); an integer n, the last n weight layers in
            the order of a forward with all that runs after the first of them; 0, pure zeroth order; "all", pure
            backpropagation.
        filter_fn: ``filter_fn(module, name)``; trunk modules for which it is false are left alone, their parameters frozen.
        sample: one batch (a tensor, a tuple of arguments or a dict), for an integer head of a model that ``torch.fx`` cannot
            trace.
        precision: ``float``, parameters as they are; or ``int8``, for :class:`ezo_kernels.ElasticZOInt8`: weights become int8
            with a power-of-two exponent, in the same Parameters, and the model takes and gives
            :class:`ezo_kernels.Int8Tensor`. Its ``state_dict`` then holds int8 values and, beside each, ``..._exponent``.
        strategy: of linear layers and convolutions in ``float``: ``auto`` (by the shipped table), ``fused``, ``two_products``,
            ``specialized`` (linear layers both; convolutions choose by themselves beside them) or ``slab``; the last three are
            refused in a pass by a layer that cannot take them (:mod:`ezo_kernels.ops._strategy`).
            With ``auto`` and ``two_products`` z of their 16-bit weights is rounded to the weight's dtype, whatever strategy a
            pass then takes (docs/rng.md).

    Returns:
        ``model``.

    Raises:
        TypeError: a head of another type, a trunk parameter of another dtype.
        ValueError: a head that is not there, a tie across the cut, a model that is converted already.
        NotImplementedError: modules that cannot be trained this way, with the way out; for ``int8`` all of them.
        Nothing is changed when it raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of a module and its name, got {type(filter_fn).__name__}")
    if "_ezo" in model.__dict__:
        raise ValueError("the model is converted already: unconvert_ it first")
    if any(isinstance(m.__dict__.get("zo"), ZOContext) for m in model.modules()):
        raise ValueError("a part of the model is converted already: unconvert_ that part first")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if precision == "int8":
        if strategy != "auto":
            raise ValueError("strategy is of float layers; that of integer layers is ElasticZOInt8's")
        return convert_int8_(model, head, filter_fn, sample)
    plan = make_plan(model, head, filter_fn, sample, strategy)
    zo = ZOContext(manifest=tuple(plan.sites), strategy=strategy)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sites = {name: s for s in plan.sites for name in s.names}
    modules = dict(model.named_modules())
    held = {n: p.requires_grad for n, p in parameters.items() if n in sites or n in plan.frozen}
    try:
        for name in held:
            parameters[name].requires_grad_(False)
        for name, cls in plan.fused.items():
            own = {
                path: sites[f"{name}.{path}".lstrip(".")].site
                for path, _ in modules[name].named_parameters(recurse=False)
            }
            make = next(f for f in ("from_linear", "from_conv1d", "from_conv", "from_embedding") if hasattr(cls, f))
            getattr(cls, make)(modules[name], zo, own)
        for name, paths in plan.grouped.items():
            own = [sites[f"{name}.{path}".lstrip(".")] for path in paths]
            group_(modules[name], zo, [(path, s.site, s.layout) for path, s in zip(paths, own, strict=True)])
        for index, name in enumerate(plan.dropouts):
            ZODropout.from_dropout(modules[name], zo, index)
    except BaseException:  # a class of a user's that cannot be inherited from
        _plain_again(model, held)
        raise
    model.__dict__["_ezo"] = zo
    model.__dict__["_ezo_plan"] = plan
    model.__dict__["_ezo_requires_grad"] = held
    return model


def unconvert_(model: nn.Module) -> nn.Module:
    """Undo :func:`convert_` in place: plain torch modules, the same Parameters with their ``requires_grad``.

    An int8 model is dequantised, exactly: what was lost in rounding when it was converted does not come back.

    Raises:
        ValueError: the model is not converted, or a layer got a parametrization since.
        Nothing is changed when it raises.
    """
    context_of(model)
    # torch has put a class of its own above ours, and the plain one would take its place; one from before lies below ours
    since = [
        name
        for name, m in model.named_modules()
        if "zo" in m.__dict__ and parametrize.is_parametrized(m) and "base" not in vars(type(m))
    ]
    if since:
        raise ValueError(
            f"{', '.join(map(repr, since))} got a parametrization since convert_, which unconvert_ would take away: "
            "remove_parametrizations first"
        )
    if is_int8(model):
        unconvert_int8_(model)
        return model
    _plain_again(model, model.__dict__.pop("_ezo_requires_grad"))
    del model.__dict__["_ezo"], model.__dict__["_ezo_plan"]
    return model


def _plain_again(model: nn.Module, held: dict[str, bool]) -> None:
    """Every layer as torch's; ``held`` is ``requires_grad`` by name."""
    for module in model.modules():
        # a layer that was wrapped since has other names: its trunk parameters are those that required grad
        if isinstance(module, Grouped):
            own = [module.get_parameter(path) for path, _, _ in module.zo_owned]
            ungroup_(module)
        elif "plain_class" in module.__dict__:
            own = list(module.parameters(recurse=False))
            release(module)
        else:
            continue
        for parameter in own:
            parameter.requires_grad_(True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in held:
            parameter.requires_grad_(held[name])


def plan_of(model: nn.Module) -> Plan:
    """What :func:`convert_` decided for this model."""
    context_of(model)
    return model.__dict__["_ezo_plan"]


def trunk_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of a converted model that zeroth order trains, by site; ValueError if it no longer has one of them.

    So it is where parameters were tied or untied since, as ``load_state_dict(assign=True)`` unties them.
    """
    manifest, parameters = context_of(model).manifest, dict(model.named_parameters(remove_duplicate=False))
    gone = [name for s in manifest for name in s.names if name not in parameters]
    if gone:
        raise ValueError(
            f"the model has no {', '.join(map(repr, gone))} any more: a trunk's layer was replaced, pruned or parametrized "
            "since convert_. unconvert_ the model and convert_ it anew, as it is now"
        )
    first: dict[nn.Parameter, str] = {}
    for s in manifest:
        name, *others = s.names
        for other in others:
            if not _is_one(parameters[name], parameters[other]):
                raise ValueError(
                    f"{name!r} and {other!r} were one parameter and are two now (load_state_dict(assign=True) unties them), of "
                    "which one would not learn: tie them again, or unconvert_ the model and convert_ it anew"
                )
        known = first.setdefault(parameters[name], name)
        if known != name:
            raise ValueError(
                f"{known!r} and {name!r} were tied since convert_: unconvert_ the model and convert_ it anew, as it is now"
            )
    return [parameters[s.names[0]] for s in manifest]


def _is_one(a: nn.Parameter, b: nn.Parameter) -> bool:
    """Whether what is written into one is in the other."""
    if a is b:
        return True
    alike = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()
    return alike and same


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of a converted model that backpropagation trains."""
    context_of(model)
    head, frozen = plan_of(model).head, plan_of(model).frozen
    own = [p for n, p in model.named_parameters() if in_head(n, head) and n not in frozen]
    return own if is_int8(model) else [p for p in own if p.requires_grad]

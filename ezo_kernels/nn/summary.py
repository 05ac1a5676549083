"""A table of what trains each parameterised module of a converted model, by which backend and strategy, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from ..ops import Noise
from ..ops._perturbation import compute_dtype
from ..ops._strategy import Strategy
from ..ops.conv2d import strategy_for as conv_strategy_for
from ..ops.linear import strategy_for as linear_strategy_for
from ..ops.noise import check_index
from .context import ZOContext
from .conv import ZOConv1d, ZOConv2d, conv_strategy
from .convert import context_of, is_int8, plan_of
from .cut import in_head
from .linear import ZOLinear, ZOTransposedLinear


@dataclass(frozen=True)
class Row:
    """One module: its name, class, who trains it (ZO, BP or frozen), parameters, backend and the reason for it.

    ``strategy`` and ``workspace_bytes`` are of linear layers and convolutions in a summary of a sample, else "" and 0.
    """

    name: str
    type: str
    trained: str
    parameters: int
    backend: str
    reason: str
    strategy: str = ""
    workspace_bytes: int = 0


@dataclass(frozen=True)
class Summary:
    """Rows of :func:`summary`; ``str`` is a table."""

    rows: tuple[Row, ...]

    def total(self, trained: str) -> int:
        """Parameters trained by ZO, by BP, or frozen; a tied one counts once, where it stands first."""
        return sum(r.parameters for r in self.rows if r.trained == trained)

    @property
    def workspace_bytes(self) -> int:
        """Of the layer that takes most: layers run one after the other."""
        return max((r.workspace_bytes for r in self.rows), default=0)

    def __str__(self) -> str:
        chosen = any(r.strategy for r in self.rows)
        head = [
            "name",
            "type",
            "trained",
            "parameters",
            "backend",
            *(["strategy", "workspace"] if chosen else []),
            "reason",
        ]
        body = []
        for r in self.rows:
            own = [r.strategy, f"{r.workspace_bytes:,}" if r.workspace_bytes else ""] if chosen else []
            body.append([r.name, r.type, r.trained, f"{r.parameters:,}", r.backend, *own, r.reason])
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *body)]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(", ".join(f"{t}: {self.total(t):,}" for t in ("ZO", "BP", "frozen")))
        if chosen:
            lines.append(
                f"workspace of perturbed weights, or of a query's parts: {self.workspace_bytes:,} bytes at most"
            )
        return "\n".join(lines)


def strategies(model: nn.Module, sample, noise: Noise, arch: int) -> dict[str, Strategy]:
    """What each fused linear layer and convolution of a converted model takes in a pass over ``sample``, by name.

    A forward in fake tensors: nothing is computed, allocated or changed. A layer that is called more than once shows its first
    call; one that cannot take the strategy of its model has the name ``refused``.

    Args:
        sample: the batch of one sign: a tensor, a tuple of arguments or a dict; anything else is the one argument.
        noise: of the pass.
        arch: compute capability, 90 for an H100; 0 for the CPU reference.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # imports sympy: not when the package is imported

    zo, found, names = context_of(model), {}, {module: name for name, module in model.named_modules()}

    def note(module, args, kwargs, out):
        name, (x,) = names[module], (*args, *kwargs.values())
        if name not in found:
            try:
                found[name] = _strategy_of(module, x, out, zo, noise, arch)
            except NotImplementedError as error:
                found[name] = Strategy("refused", reason=str(error))

    layers = (ZOLinear, ZOTransposedLinear, ZOConv1d, ZOConv2d)
    hooks = [m.register_forward_hook(note, with_kwargs=True) for m in model.modules() if isinstance(m, layers)]
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value):
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    args = (
        tuple(map(fake, sample)) if isinstance(sample, tuple) else () if isinstance(sample, dict) else (fake(sample),)
    )
    kwargs = {k: fake(v) for k, v in sample.items()} if isinstance(sample, dict) else {}
    try:
        with mode, torch.no_grad():
            functional_call(model, {name: mode.from_tensor(t) for name, t in held.items()}, args, kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _strategy_of(module, x: torch.Tensor, out: torch.Tensor, zo: ZOContext, noise: Noise, arch: int) -> Strategy:
    w = module.weight
    x = x.to(compute_dtype(x, w, type(module).__name__))
    both = (1, -1)
    if isinstance(module, ZOLinear | ZOTransposedLinear):
        transposed = isinstance(module, ZOTransposedLinear)
        z_dtype = "float32" if transposed else zo.z_dtype(module.site, w)
        return linear_strategy_for(x, w, out, 1, arch, transposed, "", zo.strategy, z_dtype, both, noise.name)
    if out.dim() < w.dim():  # torch's unbatched form
        out = out.unsqueeze(0)
    if w.dim() == 3:
        w, out = w.unsqueeze(2), out.unsqueeze(2)
    return conv_strategy_for(x, w, out, 1, arch, module.groups, "", conv_strategy(zo.strategy), both, noise.name)


_SAMPLES = "sample must be a tensor, a tuple of arguments, a dict of them, or a list or mapping of tensors"


def _inside(value):
    """What a nest of mappings, lists and tuples holds."""
    if isinstance(value, (Mapping, list, tuple)):
        for own in value.values() if isinstance(value, Mapping) else value:
            yield from _inside(own)
    else:
        yield value


def _check_sample(sample) -> None:
    if isinstance(sample, (torch.Tensor, tuple, dict)):
        return
    if not isinstance(sample, (list, Mapping)):
        raise TypeError(f"{_SAMPLES}, got {type(sample).__name__}")
    for own in _inside(sample):
        if own is not None and not isinstance(own, torch.Tensor):
            raise TypeError(f"{_SAMPLES}, got {type(sample).__name__} with {type(own).__name__} in it")


def summary(model: nn.Module, sample=None, *, noise: str = "gaussian", arch: int | None = None) -> Summary:
    """One row for each module of a converted model that holds parameters.

    Args:
        sample: the batch of one sign (a tensor, a tuple of arguments or a dict; a list or another mapping, of tensors, is the
            one argument; its values do not matter), for the strategy of each linear layer and convolution, its workspace, and
            why. Without it there are none.
        noise: of the passes; a name of :data:`ezo_kernels.ops.noise.NOISES`.
        arch: compute capability whose choices are shown, 90 for an H100, 0 for the CPU; by default the model's device's.

    Raises:
        TypeError: a sample or an arch of another type.
        ValueError: a model that is not converted, a negative arch, an unknown noise, a sample of an int8 model (whose
            strategies are :class:`ezo_kernels.ElasticZOInt8`'s).
        NotImplementedError: noise of integer layers.
    """
    spec, chosen = Noise(noise), {}
    if noise == "sparse_int8":
        raise NotImplementedError("sparse_int8 is noise of integer layers: use 'sparse' for float weights")
    if arch is not None:
        arch = check_index(arch, "arch", 1 << 12)
    if sample is not None:
        if is_int8(model):
            raise ValueError("summary: strategies of integer layers are ElasticZOInt8's; leave the sample out")
        _check_sample(sample)
        if arch is None:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
            arch = 10 * major + minor
        try:
            chosen = strategies(model, sample, spec, arch)
        except (TypeError, AttributeError) as error:
            if isinstance(sample, (torch.Tensor, tuple, dict)):
                raise
            # a model that does not take such an argument shows it only here, by what it does with a tensor
            raise TypeError(f"{_SAMPLES}, got {type(sample).__name__}, and the model failed on it: {error}") from error
    plan, zo = plan_of(model), context_of(model)
    integer = is_int8(model)
    fused_backend = {"cuda": "triton, z in the kernel", "cpu": "reference (numba + torch)"}
    if integer:
        fused_backend = {"cuda": "triton int8, z in the kernel", "cpu": "int8 reference (numba + torch)"}
    # a frozen layer of integers runs in the same kernel, without a z
    frozen_backend = {d: b.removesuffix(", z in the kernel") for d, b in fused_backend.items()} if integer else {}
    kinds = {name: s for s in zo.manifest for name in s.names}
    rows, seen = [], set()
    for name, module in model.named_modules():
        own = {f"{name}.{k}".lstrip("."): p for k, p in module.named_parameters(recurse=False)}
        if not own:
            continue
        fresh = [p for p in own.values() if p not in seen]
        seen.update(own.values())
        count = sum(p.numel() for p in fresh)
        device = next(iter(own.values())).device.type
        first = next(iter(own))
        cls = module.__dict__.get("plain_class") or getattr(type(module), "base", type(module))
        tied = next((n for n in kinds[first].names if n != first), None) if first in kinds else None
        if all(n in plan.frozen for n in own):
            row = ("frozen", frozen_backend.get(device, "torch"), plan.frozen[first])
        elif in_head(name, plan.head):
            row = ("BP", "integer backward" if integer else "torch autograd", "in the head")
        elif "plain_class" in module.__dict__:
            reason = f"tied to {tied}" if tied else "a fused layer exists"
            row = ("ZO", fused_backend.get(device, f"none for {device}"), reason)
        elif first in kinds and name not in plan.fused:
            reason = plan.reasons.get(name, "read by its parent module")
            row = ("ZO", "workspace, a copy a group", reason)
        else:
            row = ("frozen", "torch", "not what convert_ saw: nothing trains it")
        own = chosen.get(name, Strategy(""))
        reason = "; ".join(filter(None, (row[2], own.reason)))
        rows.append(Row(name or "(model)", cls.__name__, row[0], count, row[1], reason, own.name, own.workspace_bytes))
    return Summary(tuple(rows))

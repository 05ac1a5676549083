"""A table of what trains each parameterised module of a converted model, by which backend, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .convert import context_of, is_int8, plan_of
from .cut import in_head


@dataclass(frozen=True)
class Row:
    """One module: its name, class, who trains it (ZO, BP or frozen), parameters, backend and the reason for it."""

    name: str
    type: str
    trained: str
    parameters: int
    backend: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """Rows of :func:`summary`; ``str`` is a table."""

    rows: tuple[Row, ...]

    def total(self, trained: str) -> int:
        """Parameters trained by ZO, by BP, or frozen; a tied one counts once, where it stands first."""
        return sum(r.parameters for r in self.rows if r.trained == trained)

    def __str__(self) -> str:
        head = ("name", "type", "trained", "parameters", "backend", "reason")
        body = [(r.name, r.type, r.trained, f"{r.parameters:,}", r.backend, r.reason) for r in self.rows]
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *body)]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(", ".join(f"{t}: {self.total(t):,}" for t in ("ZO", "BP", "frozen")))
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """One row for each module of a converted model that holds parameters."""
    plan, zo = plan_of(model), context_of(model)
    integer = is_int8(model)
    fused_backend = {"cuda": "triton, z in the kernel", "cpu": "reference (numba + torch)"}
    if integer:
        fused_backend = {"cuda": "triton int8, z in the kernel", "cpu": "int8 reference (numba + torch)"}
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
            row = ("frozen", "torch", plan.frozen[first])
        elif in_head(name, plan.head):
            row = ("BP", "integer backward" if integer else "torch autograd", "in the head")
        elif name in plan.fused:
            reason = f"tied to {tied}" if tied else "a fused layer exists"
            row = ("ZO", fused_backend.get(device, f"none for {device}"), reason)
        else:
            reason = plan.reasons.get(name, "read by its parent module")
            row = ("ZO", "workspace, a copy a group", reason)
        rows.append(Row(name or "(model)", cls.__name__, row[0], count, row[1], row[2]))
    return Summary(tuple(rows))

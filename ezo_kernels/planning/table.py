"""Tables of numbers as text."""

from __future__ import annotations

from collections.abc import Sequence


def size(n: int) -> str:
    """Bytes in the largest of B, KiB, MiB, GiB, TiB that leaves at least 1."""
    value, unit = float(n), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{n} B" if unit == "B" else f"{value:.2f} {unit}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, a rule below the header."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [[*header], ["-" * w for w in widths], *rows]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

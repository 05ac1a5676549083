"""An index of the public names, for docs/api.md (:mod:`.report`): what each module exports, by its docstring's first line."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("", ".nn", ".optim", ".ops", ".planning", ".models", ".data")
_ROLE = re.compile(r":\w+:`~?\.?(?:ezo_kernels\.)?([\w.]+)`")


def _first_paragraph(thing) -> str:
    text = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
    return _ROLE.sub(r"`\1`", text).replace("``", "`").replace("|", "\\|")


def _row(name: str, thing) -> str:
    kind = inspect.unwrap(thing)
    file = Path(inspect.getfile(kind)).relative_to(ROOT).as_posix()
    call = "()" if inspect.isroutine(kind) else ""
    return f"| `{name}{call}` | {_first_paragraph(thing)} | `{file}` |"


def index() -> str:
    """A table a module; a name that several modules export is in the first of them."""
    seen, parts = set(), []
    for suffix in MODULES:
        module = importlib.import_module(f"ezo_kernels{suffix}")
        rows = []
        for name in module.__all__:
            thing = getattr(module, name)
            if id(thing) not in seen and (inspect.isroutine(thing) or inspect.isclass(thing)):
                seen.add(id(thing))
                rows.append(_row(name, thing))
        parts += [f"## `{module.__name__}`", _first_paragraph(module)]
        parts.append("\n".join(["| name | what it is | file |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)

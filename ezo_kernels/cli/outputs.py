"""The files that a run writes: checked before it starts, each put in place whole."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

from .._files import replacing


def check_writable(option: str, path: Path | None) -> None:
    """Refuse, before any work is done, a file that could not be written after it.

    Raises:
        ValueError: its folder is missing or not writable, or it is itself a folder.
    """
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {folder}")
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder")
    try:
        # Tried rather than asked: permissions alone do not tell of a read-only or full disk.
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written: {error.strerror}") from None
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option} {path}: cannot be overwritten: no permission")


def check_apart(**paths: Path | None) -> None:
    """Refuse two options that name one file: what is written would overwrite what was, or what is read."""
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        option = name.replace("_", "-")
        if path is not None and seen.setdefault(path.resolve(), option) != option:
            raise ValueError(f"--{seen[path.resolve()]} and --{option} name the same file: {path}")


def make_folder(option: str, folder: Path) -> None:
    """Make a folder that files go to, if it is not there.

    Raises:
        ValueError: it cannot be made; says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of that name" if folder.is_file() else error.strerror
        raise ValueError(f"{option} {folder}: cannot be made: {reason}") from None


def check_plot(path: Path | None) -> None:
    """As :func:`check_writable`, and that it can be drawn.

    Raises:
        ValueError: not a .png.
        ModuleNotFoundError: no matplotlib.
    """
    if path is None:
        return
    check_writable("--plot", path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot {path}: a name that ends in .png is needed")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'ezo-kernels[plot]'") from None


def jsonable(value):
    """A record with null for numbers that are not finite, which every JSON reader takes, and lists for tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, record: dict) -> None:
    """Write a record as :func:`jsonable` gives it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(jsonable(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_lines(path: Path, record: dict) -> None:
    """The same with a line for each entry of the record's own lists and dicts: long files stay small, and differ by entries."""

    def block(value) -> str:
        if isinstance(value, dict) and value:
            entries, ends = [f"{json.dumps(key)}: {_line(item)}" for key, item in value.items()], "{}"
        elif isinstance(value, list) and value:
            entries, ends = [_line(item) for item in value], "[]"
        else:
            return _line(value)
        return ends[0] + "\n  " + ",\n  ".join(entries) + "\n " + ends[1]

    body = ",\n ".join(f"{json.dumps(key)}: {block(value)}" for key, value in jsonable(record).items())
    with replacing(path) as temporary:
        temporary.write_text("{\n " + body + "\n}\n", encoding="utf-8")


def _line(value) -> str:
    return json.dumps(value, allow_nan=False)


def write_plot(path: Path, record: dict) -> None:
    """Draw loss and validation accuracy by epoch."""
    # The figure by itself, without pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    history = record["history"]
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    (loss,) = left.plot(epochs, [row["loss"] for row in history], "o-", color="tab:blue", label="training loss")
    (accuracy,) = right.plot(
        epochs,
        [100 * row["validation_accuracy"] for row in history],
        "s-",
        color="tab:orange",
        label="validation accuracy",
    )
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(ylabel="accuracy, %")
    test = f", test accuracy {100 * record['test_accuracy']:.2f}%" if record["test_accuracy"] is not None else ""
    left.set_title(f"{record['model']} on {record['data']}, {record['method']}, head {record['head']}{test}")
    left.legend(handles=[loss, accuracy], loc="center right")
    left.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")

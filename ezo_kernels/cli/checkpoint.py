"""Checkpoints: a file of tensors and plain values, written under another name first, refused if it does not fit."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from .._files import read_saved, replacing
from .recipe import Recipe

FORMAT = "ezo-checkpoint-1"
#: what a checkpoint holds, and as what
KEYS = {
    "format": str,
    "recipe": dict,
    "rng_version": str,
    "model": dict,
    "optimizer": dict,
    "step": int,
    "history": list,
    "losses": torch.Tensor,
    "genuine": bool,
}
#: what a field of a recipe may hold, by its annotation; a whole number is a float, too
_FIELDS = {"str": str, "int": int, "float": (int, float), "bool": bool, "bool | None": (bool, type(None))}


def save(path: Path, **contents) -> None:
    """Write a checkpoint; whatever happens, ``path`` holds the old one or the whole of the new one."""
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, **contents}, temporary)


def _require(value, kind, what: str) -> None:
    if not isinstance(value, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{what} is {type(value).__name__}, {names} expected")


def read(path: Path) -> dict:
    """The contents of a checkpoint, on the CPU, its recipe as a :class:`Recipe`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: corrupt, truncated, or no checkpoint of this program; names the file.
    """
    contents = read_saved(path, "checkpoint")
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of the format {FORMAT}")
    missing = [key for key in KEYS if key not in contents]
    if missing:
        raise ValueError(f"{path}: a checkpoint without {', '.join(missing)}")
    for key, kind in KEYS.items():
        _require(contents[key], kind, f"{path}: {key}")
    for name, tensor in contents["model"].items():
        _require(tensor, torch.Tensor, f"{path}: {name} of its model")
    for row in contents["history"]:
        _require(row, dict, f"{path}: a row of its history")
    if contents["step"] < 0:
        raise ValueError(f"{path}: step is {contents['step']}: it must not be negative")
    for field in fields(Recipe):
        # p_zero: a number in the first checkpoints, which from_dict takes
        if field.name in contents["recipe"] and field.name != "p_zero":
            kind = _FIELDS.get(field.type, object)
            _require(contents["recipe"][field.name], kind, f"{path}: its recipe does not fit: {field.name}")
    try:
        contents["recipe"] = Recipe.from_dict(contents["recipe"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its recipe does not fit: {error}") from None
    return contents


def merge(given: dict, checkpoint: dict | None, path: Path | None) -> Recipe:
    """The recipe of a run: the options given, over those of the checkpoint, over the defaults.

    Raises:
        ValueError: an option that differs from the checkpoint's.
    """
    if checkpoint is None:
        return Recipe(**given)
    theirs: Recipe = checkpoint["recipe"]
    own = theirs.as_dict()
    # one option may decide what another must be: first each by itself, so that it is told what was given
    other = {name: value for name, value in given.items() if value != own[name]}
    try:
        asked = Recipe(**{**own, **given})
    except ValueError:
        found = ", ".join(f"{name} {own[name]} is not {value}" for name, value in other.items())
        raise ValueError(f"{path}: a checkpoint of another run: {found}") from None
    if asked != theirs:
        raise ValueError(f"{path}: a checkpoint of another run: {asked.difference(theirs)}")
    return theirs


def check_rng(version: str, checkpoint: dict, path: Path) -> None:
    """Refuse a checkpoint whose noise this version would not make again.

    Raises:
        ValueError: its rng_version is another.
    """
    if checkpoint["rng_version"] != version:
        raise ValueError(
            f"{path}: rng version {checkpoint['rng_version']} is not {version}: its noise cannot be replayed"
        )


def load_model(model: torch.nn.Module, checkpoint: dict, path: Path) -> None:
    """Copy the checkpoint's weights into ``model``.

    Raises:
        ValueError: names or shapes differ.
    """
    state, own = checkpoint["model"], model.state_dict()
    if state.keys() != own.keys():
        names = ", ".join(sorted(state.keys() ^ own.keys()))
        raise ValueError(f"{path}: a checkpoint of another model: {names} in only one of them")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: a checkpoint of another model: {name} is {list(state[name].shape)}, not {list(tensor.shape)}"
            )
    model.load_state_dict(state)

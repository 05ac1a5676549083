"""Files that are written whole or not at all, and read back only as they were written."""

from __future__ import annotations

import contextlib
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; renamed to it at the end, or removed if anything was raised.

    A reader sees the old file or the whole of the new one, whenever this process dies, and two writers do not meet.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_saved(path: Path, what: str) -> dict:
    """What ``torch.save`` wrote, tensors and plain values, on the CPU.

    Args:
        path: the file.
        what: of which kind it should be, for the errors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: corrupt, or something else; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {what.split()[-1]}")
    try:
        # torch writes the checksums of its zip but does not read them: a flipped bit would be a weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        # weights_only: tensors and plain values, no code.
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its zip reader, its unpickler or a bad offset happen to raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: corrupt or no {what}: {said}") from None

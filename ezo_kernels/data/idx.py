"""The IDX format: two zero bytes, a type byte (8: uint8), how many dimensions, each a big-endian uint32, the data."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

UINT8 = 0x08
# The largest file read here is 47 MB; a .gz that grows past this is not one of them.
MAX_BYTES = 1 << 30


def parse_idx(raw: bytes, name: str, ndim: int | None = None) -> np.ndarray:
    """The array in the bytes of an IDX file.

    Args:
        raw: the uncompressed file.
        name: what an error calls it.
        ndim: the number of dimensions it has to have; any if None.

    Returns:
        uint8 array of the shape in the header (read-only: it shares memory with ``raw``).

    Raises:
        ValueError: wrong magic, another type than uint8, other dimensions, too short or too long; names the file.
    """
    if len(raw) < 4:
        raise ValueError(f"{name}: truncated: {len(raw)} bytes, not even the 4 of an IDX magic")
    zero, kind, dims = struct.unpack(">HBB", raw[:4])
    if zero != 0 or dims == 0:
        raise ValueError(f"{name}: wrong magic {raw[:4].hex()}: this is no IDX file")
    if kind != UINT8:
        raise ValueError(f"{name}: wrong magic {raw[:4].hex()}: type 0x{kind:02x} is not the uint8 (0x08) expected")
    if ndim is not None and dims != ndim:
        raise ValueError(f"{name}: wrong magic {raw[:4].hex()}: {dims} dimensions, {ndim} expected")
    start = 4 + 4 * dims
    if len(raw) < start:
        raise ValueError(f"{name}: truncated: {len(raw)} bytes, its header alone has {start}")
    shape = struct.unpack(f">{dims}I", raw[4:start])
    want = start + math.prod(shape)
    if len(raw) != want:
        fault = "truncated" if len(raw) < want else "too long"
        raise ValueError(f"{name}: {fault}: {len(raw)} bytes, {want} expected for shape {list(shape)}")
    try:
        return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)
    except ValueError as error:  # more dimensions than numpy has, or beside one of zero larger ones
        raise ValueError(f"{name}: a header of {dims} dimensions, {max(shape)} the largest: {error}") from None


def idx_bytes(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array.

    Raises:
        TypeError: another dtype.
    """
    if array.dtype != np.uint8:
        raise TypeError(f"an IDX file of uint8 is written from uint8, not from {array.dtype}")
    header = struct.pack(">HBB", 0, UINT8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + np.ascontiguousarray(array).tobytes()


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file, uncompressed if it is a gzip one (told by its first two bytes, not by its name).

    Raises:
        ValueError: a corrupt or truncated gzip file, or one that grows past 1 GiB; names the file.
        OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not compressed:
            return file.read()
        try:
            with gzip.GzipFile(fileobj=file) as stream:
                raw = stream.read(MAX_BYTES + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: corrupt or truncated gzip file: {error}") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path}: grows past {MAX_BYTES} bytes when uncompressed")
    return raw

"""The four arrays of an MNIST-like data set: from IDX files or an npz, checked, and written to the cache."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np

from .._files import replacing
from .idx import idx_bytes, parse_idx, read_bytes

NAMES = ("mnist", "fashion_mnist")

#: part -> (name of its IDX file, number of dimensions)
PARTS = {
    "x_train": ("train-images-idx3-ubyte", 3),
    "y_train": ("train-labels-idx1-ubyte", 1),
    "x_test": ("t10k-images-idx3-ubyte", 3),
    "y_test": ("t10k-labels-idx1-ubyte", 1),
}

#: md5 of the uncompressed IDX files of the genuine sets (the .gz files of different mirrors differ in their headers)
MD5 = {
    "mnist": {
        "x_train": "6bbc9ace898e44ae57da46a324031adb",
        "y_train": "a25bea736e30d166cdddb491f175f624",
        "x_test": "2646ac647ad5339dbf082846283269ea",
        "y_test": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion_mnist": {
        "x_train": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "y_train": "9018921c3c673c538a1fc5bad174d6f9",
        "x_test": "8181f5470baa50b63fa0f6fddb340f0a",
        "y_test": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}

Arrays = dict[str, np.ndarray]


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/ezo_kernels``, or ``~/.cache/ezo_kernels``. The only place that reads the environment."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ezo_kernels"


def which_genuine(arrays: Arrays) -> str | None:
    """The name of the set that ``arrays`` are, bit for bit; None if they are neither."""
    sums = {part: hashlib.md5(idx_bytes(arrays[part]), usedforsecurity=False).hexdigest() for part in PARTS}
    return next((name for name in NAMES if MD5[name] == sums), None)


def check(arrays: Arrays, where: str) -> Arrays:
    """``arrays`` themselves, if they fit together.

    Raises:
        ValueError: images that are not [n, 28, 28], another number of labels, none at all, or a label above 9.
        TypeError: anything but uint8.
    """
    for part, array in arrays.items():
        if array.dtype != np.uint8:
            raise TypeError(f"{where}: {part} is {array.dtype}, uint8 expected")
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.ndim != 3 or x.shape[1:] != (28, 28):
            raise ValueError(f"{where}: x_{split} has shape {list(x.shape)}, [n, 28, 28] expected")
        if y.ndim != 1 or len(x) != len(y):
            raise ValueError(f"{where}: {len(x)} {split} images but labels of shape {list(y.shape)}: the counts differ")
        if len(x) == 0:
            raise ValueError(f"{where}: no {split} images")
        if y.max() > 9:
            raise ValueError(f"{where}: y_{split} has the label {y.max()}, 0 to 9 expected")
    return arrays


def find_idx(folder: Path, name: str) -> Path | None:
    """An IDX file in a folder by any of its usual names: raw or .gz, with ``-idx`` or ``.idx``."""
    for stem in (name, name.replace("-idx", ".idx")):
        for candidate in (folder / stem, folder / f"{stem}.gz"):
            if candidate.is_file():
                return candidate
    return None


def read_idx_folder(folder: Path) -> Arrays:
    """The arrays in a folder that has all four IDX files.

    Raises:
        FileNotFoundError: names those that it has not.
        ValueError: a file is corrupt; names it and what is wrong.
    """
    paths = {part: find_idx(folder, name) for part, (name, _) in PARTS.items()}
    missing = [PARTS[part][0] for part, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(f"{folder}: no {', '.join(missing)} (raw or .gz)")
    arrays = {part: parse_idx(read_bytes(path), str(path), PARTS[part][1]) for part, path in paths.items()}
    return check(arrays, str(folder))


def read_npz(path: Path) -> Arrays:
    """The arrays x_train, y_train, x_test and y_test of an npz; labels of any integer dtype.

    Raises:
        ValueError: corrupt, truncated, an array missing or of the wrong shape; names the file.
        TypeError: images that are not uint8, labels that are not integers.
    """
    with path.open("rb") as raw:
        if not zipfile.is_zipfile(raw):  # which numpy would take for a pickle, and say how to load it unsafely
            raise ValueError(f"{path}: corrupt or truncated npz file: it is no zip archive")
    try:
        file = np.load(path, allow_pickle=False)
        with file:
            missing = [part for part in PARTS if part not in file.files]
            arrays = {part: file[part] for part in PARTS if part not in missing}
    except (FileNotFoundError, PermissionError):
        raise
    except (
        Exception
    ) as error:  # numpy's reader lets through whatever zipfile, its decompressors and tokenize happen to raise
        # whose words of allow_pickle are no advice for a file from anywhere
        what = "an array of Python objects is in it" if "allow_pickle" in str(error) else error
        raise ValueError(f"{path}: corrupt or truncated npz file: {what}") from None
    for part, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of what does not begin as an array
            raise ValueError(f"{path}: corrupt or truncated npz file: {part} is no array")
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)} in it, only {', '.join(arrays) or 'others'}")
    for part in ("y_train", "y_test"):
        y = arrays[part]
        if y.dtype.kind not in "iu":  # numpy counts spans of time among its integers
            raise TypeError(f"{path}: {part} is {y.dtype}, integers expected")
        if y.size and (y.min() < 0 or y.max() > 9):
            raise ValueError(f"{path}: {part} has labels from {y.min()} to {y.max()}, 0 to 9 expected")
        arrays[part] = y.astype(np.uint8)
    return check(arrays, str(path))


def read_folder(path: str | Path, name: str) -> tuple[Arrays, str]:
    """The arrays of set ``name`` from an npz, a folder with the four IDX files or NAME.npz, or its subfolder NAME.

    Returns:
        the arrays, and what they were read from.

    Raises:
        FileNotFoundError: there is nothing of the kind; says what was looked for.
        ValueError, TypeError: a file is corrupt; names it and what is wrong.
    """
    path = Path(path)
    if path.is_file():
        return read_npz(path), str(path)
    for folder in (path, path / name):
        found = [file for file, _ in PARTS.values() if find_idx(folder, file)]
        npz = folder / f"{name}.npz"
        # Some of the four and no npz: say which are missing, rather than that there is nothing.
        if len(found) == len(PARTS) or (found and not npz.is_file()):
            return read_idx_folder(folder), str(folder)
        if npz.is_file():
            return read_npz(npz), str(npz)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    raise FileNotFoundError(
        f"{path}: neither {name}.npz nor the four IDX files (train-images-idx3-ubyte, ...) are in it"
    )


def write_cache(arrays: Arrays, name: str) -> Path:
    """Write the four IDX files of a set into the cache, and return their folder."""
    folder = cache_dir() / name
    folder.mkdir(parents=True, exist_ok=True)
    for part, (file, _) in PARTS.items():
        with replacing(folder / file) as temporary:
            temporary.write_bytes(idx_bytes(arrays[part]))
    return folder

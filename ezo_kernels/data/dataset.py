"""``load``: a data set with its fixed splits; ``standardize``: its images as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from ..ops.int8_tensor import Int8Tensor
from .download import download as fetch
from .files import NAMES, Arrays, cache_dir, read_folder, which_genuine

SPLIT_FILE = "mnist_validation.txt"

#: mean and standard deviation of the pixels / 255 of the training images (the digits as :func:`load_digits` makes them)
STATISTICS = {"mnist": (0.13066, 0.30811), "fashion_mnist": (0.28604, 0.35302), "digits": (0.22403, 0.34907)}
#: what :func:`quantize_images` subtracts: 255 times the mean, rounded
OFFSETS = {"mnist": 33, "fashion_mnist": 73, "digits": 57}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images uint8 [n, 28, 28] and labels int64 [n], numpy, in three splits that share nothing.

    A loader of something else than images says what its x and y are. ``genuine`` is True only for the MNIST or Fashion-MNIST
    files that everybody has, compared by md5, and for point clouds drawn from them. ``source`` says where it was read.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_valid: np.ndarray
    y_valid: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    genuine: bool
    source: str


def validation_indices() -> np.ndarray:
    """The 5,000 of 60,000 training images that are for validation, in both MNIST and Fashion-MNIST: sorted int64.

    From a file in the package, so that no version of numpy can move an image from one split to another. It was made
    once by ``np.sort(np.random.default_rng(2501_04287).permutation(60_000)[:5_000])``.
    """
    text = resources.files(__package__).joinpath(SPLIT_FILE).read_text(encoding="ascii")
    return np.array([int(line) for line in text.splitlines() if not line.startswith("#")], dtype=np.int64)


def split(arrays: Arrays, name: str, genuine: bool, source: str) -> Dataset:
    """Take the validation images out of the training images.

    Of a set with another number than 60,000 the same indices are taken, as far as they go.

    Raises:
        ValueError: so few images that either split would be empty.
    """
    n = len(arrays["x_train"])
    held_out = np.zeros(n, dtype=bool)
    indices = validation_indices()
    held_out[indices[indices < n]] = True
    if not held_out.any() or held_out.all():
        raise ValueError(
            f"{source}: {n} training images are too few for a validation split, {indices[0] + 2} are needed"
        )
    x, y = arrays["x_train"], arrays["y_train"].astype(np.int64)
    return Dataset(
        name=name,
        x_train=x[~held_out],
        y_train=y[~held_out],
        x_valid=x[held_out],
        y_valid=y[held_out],
        x_test=arrays["x_test"],
        y_test=arrays["y_test"].astype(np.int64),
        genuine=genuine,
        source=source,
    )


def load_digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, each pixel drawn as 3 x 3 and framed to 28 x 28: 1,297 / 200 / 300.

    No substitute for MNIST, only something to train on without a network; ``genuine`` is False.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the digits are scikit-learn's: pip install 'ezo-kernels[digits]'") from None
    digits = sklearn_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    x = np.pad(small.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    y = digits.target.astype(np.int64)
    # Consecutive digits are by one writer: shuffled, as for MNIST, but by Philox, whose stream numpy has frozen.
    order = np.argsort(np.random.Philox(1797).random_raw(len(x)), kind="stable")
    train, valid, test = order[:1297], order[1297:1497], order[1497:]
    return Dataset(
        "digits", x[train], y[train], x[valid], y[valid], x[test], y[test], False, "scikit-learn's load_digits"
    )


def load(
    name: str,
    data_dir: str | Path | None = None,
    download: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """A data set with its fixed training, validation and test splits.

    Args:
        name: "mnist", "fashion_mnist", or "digits" (scikit-learn's, in memory).
        data_dir: a folder with the four IDX files (raw or .gz) or NAME.npz, or an npz file; by default the cache, as
            ``ezo data`` fills it.
        download: get what is not in the cache.
        say: told a line at a time what a download does.

    Raises:
        ValueError: unknown name; a file that is corrupt or the other data set, named.
        TypeError: arrays of another dtype.
        FileNotFoundError: nothing there.
        DownloadError: nothing to be had.
    """
    if name == "digits":
        if data_dir is not None:
            raise ValueError(f"digits come with scikit-learn: no folder is read, got {data_dir}")
        return load_digits()
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}: there are {', '.join(NAMES)} and digits")
    if data_dir is None:
        folder = fetch(name, say) if download else cache_dir() / name
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: {name} is not in the cache: get it with `ezo data {name}`, or say --data-dir"
            )
    else:
        folder = Path(data_dir)
    arrays, source = read_folder(folder, name)
    known = which_genuine(arrays)
    if known not in (None, name):
        raise ValueError(f"{source}: this is {known}, not {name}")
    return split(arrays, name, known is not None, source)


def check_images(images: np.ndarray) -> None:
    """Refuse anything but images, uint8 [n, height, width].

    Raises:
        TypeError: no numpy array, or one of another dtype. ValueError: another shape.
    """
    if not isinstance(images, np.ndarray):
        raise TypeError(f"images are {type(images).__name__}, a numpy array expected")
    if images.dtype != np.uint8:
        raise TypeError(f"images are {images.dtype}, uint8 expected")
    if images.ndim != 3:
        raise ValueError(f"images have shape {list(images.shape)}, [n, height, width] expected")


def _check_images(images: np.ndarray, name: str) -> None:
    check_images(images)
    if name not in STATISTICS:
        raise ValueError(f"no mean and std are known for {name!r}, only for {', '.join(STATISTICS)}")


def standardize(images: np.ndarray, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(pixel / 255 - mean) / std, with the constants of the training images of ``name``.

    Args:
        images: uint8 [n, 28, 28].
        name: a data set's name.
        dtype: of the result; the arithmetic is fp32.

    Returns:
        [n, 1, 28, 28] on the CPU.

    Raises:
        TypeError: images that are no numpy array of uint8.
        ValueError: unknown name, or another shape.
    """
    _check_images(images, name)
    mean, std = STATISTICS[name]
    x = torch.from_numpy(images.astype(np.float32))
    return x.mul_(1 / (255 * std)).sub_(mean / std).unsqueeze(1).to(dtype)


def quantize_images(images: np.ndarray, name: str) -> Int8Tensor:
    """(pixel - offset) / 2 in integers, halves away from zero, exponent -5: :func:`standardize` to a power of two.

    Args:
        images: uint8 [n, 28, 28].
        name: a data set's name; the offset is 255 times its mean, rounded.

    Returns:
        [n, 1, 28, 28] on the CPU, in one group. No floating-point number is made.

    Raises:
        TypeError: images that are no numpy array of uint8.
        ValueError: unknown name, or another shape.
    """
    _check_images(images, name)
    centred = torch.from_numpy(images.astype(np.int16)) - OFFSETS[name]
    values = torch.sign(centred) * ((centred.abs() + 1) >> 1)
    return Int8Tensor(values.to(torch.int8).unsqueeze(1), torch.tensor([-5], dtype=torch.int32))

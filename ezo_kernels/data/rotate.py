"""Rotated images: what a network trained on upright ones is adapted to."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F

from .dataset import Dataset, check_images
from .draws import check_seed, uniforms, words

SPLITS = ("train", "valid", "test")
# Images of one call of grid_sample, in fp64: 50 MB with its grid.
_CHUNK = 1000


def rotate_images(images: np.ndarray, degrees) -> np.ndarray:
    """Images turned about their centre, counter-clockwise as they are looked at.

    Each pixel takes the bilinear mean of the four that it comes from, in fp64, zero outside of the image, and is rounded to
    the nearest integer (halves to even). Quarter turns are exact; the pixels of others are no longer those of the file.

    Args:
        images: uint8 [n, height, width].
        degrees: a number, or one an image: [n].

    Returns:
        uint8 of the same shape.

    Raises:
        TypeError: images that are no numpy array of uint8.
        ValueError: another shape, as many angles as fit neither form, an angle that is not finite.
    """
    check_images(images)
    angles = np.asarray(degrees, np.float64)
    if angles.shape not in ((), (len(images),)):
        raise ValueError(f"angles have shape {list(angles.shape)}: one number or [{len(images)}] expected")
    if not np.isfinite(angles).all():
        raise ValueError(f"an angle is {angles[~np.isfinite(angles)].flat[0]}: it must be finite")
    angles = np.broadcast_to(np.deg2rad(angles % 360), len(images))
    height, width = images.shape[1:]
    out = np.empty_like(images)
    for first in range(0, len(images), _CHUNK):
        rows = slice(first, first + _CHUNK)
        cos, sin = np.cos(angles[rows]), np.sin(angles[rows])
        # From an output's place to its source's, in grid_sample's coordinates: y down, each side from -1 to 1.
        turn = np.stack(
            [np.stack([cos, -sin * (height / width), 0 * cos], 1), np.stack([sin * (width / height), cos, 0 * cos], 1)],
            1,
        )
        x = torch.from_numpy(images[rows].astype(np.float64)).unsqueeze(1)
        grid = F.affine_grid(torch.from_numpy(turn), list(x.shape), align_corners=False)
        y = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out[rows] = y.squeeze(1).round().clamp(0, 255).to(torch.uint8).numpy()
    return out


def rotated(
    dataset: Dataset, degrees: float | None = None, *, seed: int | None = None, limit: float = 180.0
) -> Dataset:
    """``dataset`` with every image turned by :func:`rotate_images`; labels and splits stay.

    It keeps its name, so that :func:`ezo_kernels.data.standardize` uses the constants of the upright images, which a network
    that is adapted was trained with. ``source`` tells of the rotation; ``genuine`` is False, for the pixels are new ones.

    Args:
        dataset: of images.
        degrees: the angle of all images, counter-clockwise.
        seed: instead of it, an angle for each image, uniform in [-limit, limit], by (seed, split, index) alone.
        limit: in degrees, above 0 and at most 180; used with ``seed``.

    Raises:
        TypeError: images that are not uint8, a seed that is no integer.
        ValueError: both or neither of degrees and seed, a limit out of range, data that are no images.
    """
    if (degrees is None) == (seed is None):
        raise ValueError("rotated takes either degrees (one angle for all) or seed (an angle for each image)")
    if not (math.isfinite(limit) and 0 < limit <= 180):
        raise ValueError(f"limit is {limit}: above 0 and at most 180 degrees expected")
    if seed is not None:
        seed = check_seed(seed)
    images = {}
    for i, split in enumerate(SPLITS):
        x = getattr(dataset, f"x_{split}")
        angles = degrees if seed is None else (2 * uniforms(words(len(x), seed, "angle", i)) - 1) * limit
        images[f"x_{split}"] = rotate_images(x, angles)
    how = f"by {degrees:g} degrees" if seed is None else f"by up to {limit:g} degrees, seed {seed}"
    return dataclasses.replace(dataset, **images, genuine=False, source=f"{dataset.source}, rotated {how}")

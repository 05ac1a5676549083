"""Point clouds [3, N]: out of images, on the unit sphere, and augmented as the field does it."""

from __future__ import annotations

import dataclasses
import math
import numbers

import numpy as np
import torch

from .batches import Batches
from .dataset import Dataset, check_images
from .draws import below, check_count, check_seed, normals, shuffled, uniforms, words
from .rotate import SPLITS

# Images whose points are drawn at once.
_CHUNK = 1000


def unit_sphere(clouds: np.ndarray) -> np.ndarray:
    """Clouds with their mean at the origin and the farthest point at distance one: float32 [..., 3, N], fp64 inside.

    A cloud whose points are all the same becomes zeros.
    """
    centred = clouds - clouds.mean(-1, keepdims=True, dtype=np.float64)
    radius = np.sqrt((centred**2).sum(-2, keepdims=True).max(-1, keepdims=True))
    return (centred / np.where(radius > 0, radius, 1)).astype(np.float32)


def image_clouds(images: np.ndarray, points: int, *, seed: int = 0, split: int = 0, z: str = "zero") -> np.ndarray:
    """Points drawn from images, each read as a density of ink.

    A pixel is drawn in proportion to its value, with replacement, and a point is anywhere in its square, so that no two are
    the same; then :func:`unit_sphere`. Right is +x, up is +y.

    Args:
        images: uint8 [n, height, width].
        points: of each cloud.
        seed, split: which draws; those of a point are a function of (seed, split, index, its number).
        z: "zero", or "intensity": the pixel's value, 255 being half of the longer side.

    Returns:
        float32 [n, 3, points].

    Raises:
        TypeError: images that are no numpy array of uint8; points, a seed or a split that is no integer.
        ValueError: another shape, points < 1, a negative seed or split, an unknown z, an image without ink.
    """
    check_images(images)
    points, seed, split = check_count(points, "points"), check_seed(seed), check_seed(split, "split")
    if z not in ("zero", "intensity"):
        raise ValueError(f"z is {z!r}: 'zero' or 'intensity' expected")
    n, height, width = images.shape
    if height * width == 0:
        raise ValueError(f"images have shape {list(images.shape)}: no point can be drawn from no pixel")
    ink = np.cumsum(images.reshape(n, height * width), axis=1, dtype=np.int64)
    if not ink[:, -1].all():
        raise ValueError(f"image {np.argmin(ink[:, -1])} has no ink: no point can be drawn from it")
    clouds = np.empty((n, 3, points), np.float32)
    for first in range(0, n, _CHUNK):
        sums = ink[first : first + _CHUNK]
        images_here = np.arange(len(sums))[:, None]
        raw = np.stack([words(3 * points, seed, "cloud", split, first + i) for i in range(len(sums))])
        which, right, down = np.moveaxis(raw.reshape(len(sums), points, 3), 2, 0)
        # One search for the whole chunk: the sums of each image are moved beyond those of the one before.
        apart = (255 * height * width + 1) * images_here
        pixel = np.searchsorted((sums + apart).ravel(), (below(which, sums[:, -1:]) + apart).ravel(), side="right")
        pixel = pixel.reshape(-1, points) - height * width * images_here
        row, column = np.divmod(pixel, width)
        xyz = np.stack([column + uniforms(right), -row - uniforms(down), np.zeros(pixel.shape)], 1)
        if z == "intensity":
            values = images[first : first + _CHUNK].reshape(len(sums), -1)
            xyz[:, 2] = np.take_along_axis(values, pixel, 1) * (max(height, width) / 510)
        clouds[first : first + _CHUNK] = unit_sphere(xyz)
    return clouds


def point_clouds(dataset: Dataset, points: int = 128, *, seed: int = 0, z: str = "zero") -> Dataset:
    """The images of ``dataset`` as clouds by :func:`image_clouds`, in the same splits with the same labels.

    Args:
        dataset: of images, such as ``load("mnist")``.
        points: of each cloud.
        seed: of the draws.
        z: "zero" or "intensity".

    Returns:
        a Dataset with x float32 [n, 3, points] and y int64 [n]; ``genuine`` is the images'.

    Raises:
        TypeError, ValueError: as :func:`image_clouds`; names the split.
    """
    seed, clouds = check_seed(seed), {}
    for i, split in enumerate(SPLITS):
        x = f"x_{split}"
        try:
            clouds[x] = image_clouds(getattr(dataset, x), points, seed=seed, split=i, z=z)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{dataset.name}, {x}: {error}") from None
    return dataclasses.replace(dataset, **clouds, source=f"{dataset.source}, {points} points an image, seed {seed}")


# ------------------------------------------------------------------------------------------------------------ augmentation


def _check_augmentation(points, jitter: float, clip: float) -> None:
    if points is not None:
        check_count(points, "points")
    for name, value in (("jitter", jitter), ("clip", clip)):
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}: finite and not negative expected")


def augment_cloud(
    cloud: np.ndarray,
    seed: int,
    epoch: int,
    index: int,
    *,
    points: int | None = None,
    rotate: bool = True,
    jitter: float = 0.01,
    clip: float = 0.05,
) -> np.ndarray:
    """A cloud as one epoch sees it: resampled, turned about the up axis (y), jittered, in another order.

    The training recipe of PointNet (arXiv 1612.00593, section 5.1). A function of its arguments alone.

    Args:
        cloud: float32 [3, N].
        seed, epoch, index: of the run, and of the cloud in its data set; not negative.
        points: how many of the N to keep, without replacement as long as there are enough; all of them if None.
        rotate: turn by a uniform angle about y. Off for clouds of images, which it would flatten.
        jitter: standard deviation of what is added to every coordinate; 0 for none.
        clip: the most that is added, either way.

    Returns:
        float32 [3, points].

    Raises:
        TypeError: a cloud that is no numpy array of float32; points, a seed, an epoch or an index that is no integer; a jitter
            or a clip that is no number.
        ValueError: another shape, no points, a number out of range.
    """
    if not isinstance(cloud, np.ndarray):
        raise TypeError(f"the cloud is {type(cloud).__name__}, a numpy array expected")
    if cloud.dtype != np.float32:
        raise TypeError(f"the cloud is {cloud.dtype}, float32 expected")
    if cloud.ndim != 2 or cloud.shape[0] != 3 or cloud.shape[1] == 0:
        raise ValueError(f"the cloud has shape {list(cloud.shape)}, [3, N] with N above 0 expected")
    _check_augmentation(points, jitter, clip)
    seed, epoch, index = check_seed(seed), check_seed(epoch, "epoch"), check_seed(index, "index")
    n = cloud.shape[1]
    keep = n if points is None else points
    # A permutation does both, the random choice and the shuffle; where too few are there, all of them go in again.
    rounds = -(-keep // n)
    order = np.concatenate([shuffled(n, seed, "resample", epoch, index * rounds + r) for r in range(rounds)])
    cloud = cloud[:, order[:keep]].astype(np.float64)
    if rotate:
        angle = 2 * np.pi * uniforms(words(1, seed, "turn", epoch, index))[0]
        cos, sin = np.cos(angle), np.sin(angle)
        cloud = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]]) @ cloud
    if jitter:
        drawn = normals(words(3 * keep + 3 * keep % 2, seed, "jitter", epoch, index))[: 3 * keep]
        cloud = cloud + np.clip(jitter * drawn.reshape(3, keep), -clip, clip)
    return cloud.astype(np.float32)


class CloudBatches(Batches):
    """:class:`ezo_kernels.data.Batches` of clouds, each augmented by :func:`augment_cloud` when it is read.

    A batch is a function of (seed, epoch, its number), so that a run resumed in an epoch sees what it would have seen.

    Args:
        x: float32 [n, 3, N] on the CPU.
        y: [n].
        batch_size, seed, drop_last: as for Batches.
        points, rotate, jitter, clip: as for augment_cloud.

    Raises:
        TypeError: x that is not float32. ValueError: as Batches and augment_cloud.
    """

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        batch_size: int,
        seed: int = 0,
        *,
        drop_last: bool = False,
        points: int | None = None,
        rotate: bool = True,
        jitter: float = 0.01,
        clip: float = 0.05,
    ):
        super().__init__(x, y, batch_size, seed, drop_last=drop_last)
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            raise TypeError(f"x is {getattr(x, 'dtype', type(x).__name__)}, float32 expected")
        if x.dim() != 3 or x.shape[1] != 3 or x.shape[2] == 0:
            raise ValueError(f"x has shape {list(x.shape)}, [n, 3, N] with N above 0 expected")
        _check_augmentation(points, jitter, clip)
        self.options = {"points": points, "rotate": rotate, "jitter": jitter, "clip": clip}

    def _read(self, epoch: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clouds = [augment_cloud(self.x[r].numpy(), self.seed, epoch, r, **self.options) for r in rows.tolist()]
        return torch.from_numpy(np.stack(clouds)), self.y.index_select(0, rows)

"""Point clouds as an epoch sees them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ezo_kernels.data as D
from ezo_kernels.data.pointcloud import unit_sphere


def cloud(n: int = 40, seed: int = 0) -> np.ndarray:
    return unit_sphere(np.random.default_rng(seed).normal(size=(3, n)))


def test_augmentation_is_of_its_arguments_alone():
    x = cloud()
    held = x.copy()
    once = D.augment_cloud(x, 1, 2, 3)
    assert once.dtype == np.float32 and once.shape == (3, 40) and np.array_equal(x, held)
    assert np.array_equal(D.augment_cloud(x, 1, 2, 3), once)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3)):
        assert not np.array_equal(D.augment_cloud(x, *other), once)


def test_resampling_shuffles_without_replacement():
    x = cloud()
    plain = {"rotate": False, "jitter": 0}
    columns = {tuple(p) for p in x.T}
    all_of_them = D.augment_cloud(x, 0, 0, 0, **plain)
    assert {tuple(p) for p in all_of_them.T} == columns and not np.array_equal(all_of_them, x)
    some = D.augment_cloud(x, 0, 0, 0, points=25, **plain)
    assert some.shape == (3, 25) and len({tuple(p) for p in some.T} & columns) == 25
    more = D.augment_cloud(x, 0, 0, 1, points=100, **plain)
    counts = [sum(tuple(p) == c for p in more.T) for c in columns]
    assert set(counts) == {2, 3}
    assert not np.array_equal(more[:, :40], more[:, 40:80])


def test_rotation_is_about_y():
    x = cloud()
    plain, turned = (D.augment_cloud(x, 0, 0, 0, rotate=r, jitter=0) for r in (False, True))
    np.testing.assert_allclose(turned[1], plain[1], atol=1e-6)
    np.testing.assert_allclose(np.hypot(turned[0], turned[2]), np.hypot(plain[0], plain[2]), atol=1e-6)
    a, b = (np.arctan2(c[2], c[0]) for c in (plain, turned))
    turn = np.mod(b - a, 2 * np.pi)
    np.testing.assert_allclose(turn, turn[0], atol=1e-4)  # one angle, no mirror
    # Angles of many epochs are uniform.
    spike = np.array([[1], [0], [0]], np.float32)
    angles = [np.arctan2(*D.augment_cloud(spike, 0, e, 0, jitter=0)[[2, 0], 0]) for e in range(1000)]
    assert np.abs(np.histogram(angles, 4, (-np.pi, np.pi))[0] - 250).max() < 60


def test_jitter_is_clipped():
    x = np.zeros((3, 20_001), np.float32)  # odd: normals come in pairs
    moved = D.augment_cloud(x, 0, 0, 0, rotate=False)
    assert abs(moved.std() - 0.01) < 2e-4 and np.abs(moved).max() <= 0.05
    wide = D.augment_cloud(x, 0, 0, 0, rotate=False, jitter=0.1)
    assert np.abs(wide).max() == np.float32(0.05) and (np.abs(wide) == np.float32(0.05)).mean() > 0.5
    assert abs(wide.mean()) < 1e-3


@pytest.mark.parametrize(
    "options, match",
    [({"points": 0}, "points is 0"), ({"jitter": -1.0}, "jitter is -1"), ({"clip": float("nan")}, "clip is nan")],
)
def test_augmentation_refuses(options, match):
    x, y = torch.from_numpy(np.stack([cloud()] * 2)), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=match):
        D.augment_cloud(cloud(), 0, 0, 0, **options)
    with pytest.raises(ValueError, match=match):
        D.CloudBatches(x, y, 1, **options)
    for name, value, error in (("points", 2.5, TypeError), ("jitter", "a", TypeError), ("clip", None, TypeError)):
        with pytest.raises(error, match=f"{name} must be"):
            D.CloudBatches(x, y, 1, **{name: value})
    for name, value, error in (
        ("seed", -1, ValueError), ("epoch", -1, ValueError), ("index", -1, ValueError), ("epoch", 0.5, TypeError),
    ):  # fmt: skip
        with pytest.raises(error, match=f"{name} (is -1|must be an integer)"):
            D.augment_cloud(cloud(), **{"seed": 0, "epoch": 0, "index": 0, name: value})
    with pytest.raises(TypeError, match="the cloud is Tensor, a numpy array expected"):
        D.augment_cloud(x[0], 0, 0, 0)
    for bad, error in ((x.double(), TypeError), (x[:, :2], ValueError), (x[:, :, :0], ValueError)):
        with pytest.raises(error, match="float32 expected|with N above 0"):
            D.CloudBatches(bad, y, 1)
        with pytest.raises(error, match="float32 expected|with N above 0"):
            D.augment_cloud(bad[0].numpy(), 0, 0, 0)


def test_cloud_batches_are_batches_of_augmented_clouds():
    x = torch.from_numpy(np.stack([cloud(seed=i) for i in range(10)]))
    y = torch.arange(10)
    batches = D.CloudBatches(x, y, 4, seed=3, points=16)
    plain = D.Batches(x, y, 4, seed=3)
    first, second = list(batches), list(batches)
    for epoch, got in enumerate((first, second)):
        assert [tuple(b.shape) for b, _ in got] == [(4, 3, 16), (4, 3, 16), (2, 3, 16)]
        for (clouds, labels), (_, want) in zip(got, plain.epoch(epoch), strict=True):
            assert torch.equal(labels, want)
            for c, label in zip(clouds, labels.tolist(), strict=True):
                assert np.array_equal(c.numpy(), D.augment_cloud(x[label].numpy(), 3, epoch, label, points=16))
    rest = list(batches.epoch(1, start=2))
    assert len(rest) == 1 and torch.equal(rest[0][0], second[2][0])
    assert len(list(D.CloudBatches(x, y, 4, drop_last=True))) == 2
    with pytest.raises(ValueError, match="batch_size is 0"):
        D.CloudBatches(x, y, 0)

"""Rotated images, tables for regression, and the draws that all derived data are made of."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

import ezo_kernels.data as D
from ezo_kernels.data import draws
from ezo_kernels.data.regression import read_csv

# ---------------------------------------------------------------------------------------------------------------- draws


def test_words_are_frozen_and_of_their_place_alone():
    """Data made from a seed must be the same in ten years: words written down once."""
    assert draws.words(3, 7, "cloud", 1, 2).tolist() == WORDS
    assert np.array_equal(draws.words(10, 7, "cloud", 1, 2)[:3], np.array(WORDS, np.uint64))
    others = [
        (8, "cloud", 1, 2),
        (7, "angle", 1, 2),
        (7, "cloud", 2, 2),
        (7, "cloud", 1, 3),
        (7 + 2**32, "cloud", 1, 2),
    ]
    seen = {tuple(draws.words(2, *other)) for other in others} | {tuple(WORDS[:2])}
    assert len(seen) == 6


WORDS = [5970889681596164828, 3962961404903842414, 12040733253205034049]


def test_distributions():
    raw = draws.words(200_000, 0, "jitter")
    u, z, k = draws.uniforms(raw), draws.normals(raw), draws.below(raw, 10)
    assert 0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1 and abs(u.mean() - 0.5) < 0.003
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and abs((z**4).mean() - 3) < 0.1 and len(z) == len(raw)
    assert np.array_equal(np.unique(k), np.arange(10)) and np.bincount(k).std() < 400
    assert np.array_equal(np.sort(draws.shuffled(50, 1, "split")), np.arange(50))


@pytest.mark.parametrize("seed, error", [(-1, ValueError), (0.5, TypeError), ("1", TypeError)])
def test_seeds_are_checked(seed, error, images):
    for call in (lambda: D.rotated(images, seed=seed), lambda: D.point_clouds(images, seed=seed),
                 lambda: D.load_regression("diabetes", seed=seed)):  # fmt: skip
        with pytest.raises(error, match="seed"):
            call()


# ------------------------------------------------------------------------------------------------------------- rotation


@pytest.fixture
def images() -> D.Dataset:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (17, 28, 28), dtype=np.uint8)
    y = np.arange(17) % 10
    return D.Dataset("mnist", x[:9], y[:9], x[9:13], y[9:13], x[13:], y[13:], True, "here")


@pytest.mark.parametrize("turns", [-1, 0, 1, 2, 3, 4])
@pytest.mark.parametrize("size", [(28, 28), (9, 9)])
def test_quarter_turns_are_exact_and_counter_clockwise(turns, size):
    x = np.random.default_rng(1).integers(0, 256, (3, *size), dtype=np.uint8)
    assert np.array_equal(D.rotate_images(x, 90 * turns), np.rot90(x, turns, (1, 2)))


def test_half_a_turn_of_an_oblong():
    x = np.random.default_rng(1).integers(0, 256, (2, 6, 10), dtype=np.uint8)
    assert np.array_equal(D.rotate_images(x, 180), x[:, ::-1, ::-1])


def test_any_angle_is_bilinear():
    """Against the definition, pixel by pixel; the oblong shows a confusion of height and width."""
    x = np.random.default_rng(2).integers(0, 256, (2, 7, 11), dtype=np.uint8)
    got = D.rotate_images(x, [33.0, -71.5])
    frame = np.pad(x.astype(float), ((0, 0), (20, 20), (20, 20)))
    for k, angle in enumerate(np.deg2rad([33.0, -71.5])):
        for r in range(7):
            for c in range(11):
                right, down = c - 5, r - 3
                sc = np.cos(angle) * right - np.sin(angle) * down + 5 + 20
                sr = np.sin(angle) * right + np.cos(angle) * down + 3 + 20
                i, j = int(np.floor(sr)), int(np.floor(sc))
                a, b = sr - i, sc - j
                square = frame[k, i : i + 2, j : j + 2]
                want = np.array([1 - a, a]) @ square @ np.array([1 - b, b])
                assert abs(int(got[k, r, c]) - want) <= 0.5 + 1e-9


def test_rotated_keeps_labels_splits_and_name(images):
    turned = D.rotated(images, 90.0)
    for split in ("train", "valid", "test"):
        x, y = getattr(images, f"x_{split}"), getattr(images, f"y_{split}")
        assert np.array_equal(getattr(turned, f"x_{split}"), np.rot90(x, 1, (1, 2)))
        assert np.array_equal(getattr(turned, f"y_{split}"), y)
    assert turned.name == "mnist" and not turned.genuine and turned.source == "here, rotated by 90 degrees"
    assert images.genuine and D.standardize(turned.x_test, turned.name).shape == (4, 1, 28, 28)


def test_random_angles_are_of_seed_split_and_index(images):
    a, b, c = D.rotated(images, seed=3), D.rotated(images, seed=3), D.rotated(images, seed=4)
    assert np.array_equal(a.x_train, b.x_train) and not np.array_equal(a.x_train, c.x_train)
    twice = dataclasses.replace(images, x_valid=images.x_train, y_valid=images.y_train)
    twice = D.rotated(twice, seed=3)
    assert np.array_equal(twice.x_train, a.x_train) and not np.array_equal(twice.x_valid, twice.x_train)
    small = D.rotated(images, seed=3, limit=1e-9)
    assert np.array_equal(small.x_test, images.x_test) and "up to 1e-09 degrees, seed 3" in small.source


@pytest.mark.parametrize(
    "options, match",
    [
        ({}, "either degrees"),
        ({"degrees": 1.0, "seed": 0}, "either degrees"),
        ({"seed": 0, "limit": 0.0}, "limit is 0"),
        ({"seed": 0, "limit": 181.0}, "limit is 181"),
        ({"seed": 0, "limit": float("nan")}, "limit is nan"),
        ({"degrees": float("inf")}, "an angle is inf"),
    ],
)
def test_rotated_refuses(images, options, match):
    with pytest.raises(ValueError, match=match):
        D.rotated(images, **options)


def test_rotate_images_refuses():
    x = np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(TypeError, match="float64"):
        D.rotate_images(x.astype(float), 1)
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        D.rotate_images(x[:, 0], 1)
    with pytest.raises(ValueError, match=r"angles have shape \[2\]: one number or \[3\]"):
        D.rotate_images(x, [1.0, 2.0])


# ------------------------------------------------------------------------------------------------------------ regression


def test_diabetes():
    data = D.load_regression("diabetes")
    assert [len(x) for x in (data.x_train, data.x_valid, data.x_test)] == [310, 66, 66]
    assert data.x_train.shape == (310, 10) and data.y_train.shape == (310, 1)
    assert data.x_train.dtype == data.y_test.dtype == np.float32 and not data.genuine
    assert len(data.features) == 10 and data.features[2] == "bmi" and data.target == "progression"
    for part in (data.x_train, data.y_train):
        assert np.abs(part.mean(0)).max() < 1e-5 and np.abs(part.std(0) - 1).max() < 1e-5
    assert np.abs(data.x_test.mean(0)).max() > 0.01  # by the training split's constants, not its own
    # All patients, in their own unit again, none of them twice.
    y = np.concatenate([data.y_train, data.y_valid, data.y_test]) * data.y_std + data.y_mean
    from sklearn.datasets import load_diabetes

    assert np.array_equal(np.sort(np.rint(y[:, 0])), np.sort(load_diabetes().target))
    assert not np.array_equal(D.load_regression("diabetes", seed=1).y_test, data.y_test)
    assert np.array_equal(D.load_regression("diabetes").y_test, data.y_test)
    assert D.load_regression("diabetes", "bmi").target == "bmi"


def test_scikit_learn_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"ezo-kernels\[digits\]"):
        D.load_regression("diabetes")


def write_csv(path, rows=40):
    lines = ['size, price,"age, years",always'] + [f"{i},{3 * i + 1},{i % 7},5" for i in range(rows)]
    path.write_text("\n".join(lines) + "\n\n")
    return path


def test_csv(tmp_path):
    data = D.load_regression(write_csv(tmp_path / "houses.csv"), "price")
    assert data.name == "houses" and data.features == ("size", "age, years", "always") and data.target == "price"
    assert [len(x) for x in (data.x_train, data.x_valid, data.x_test)] == [28, 6, 6]
    price = np.concatenate([data.y_train, data.y_valid, data.y_test])[:, 0] * data.y_std + data.y_mean
    np.testing.assert_allclose(np.sort(price), 3 * np.arange(40) + 1, atol=1e-4)
    # price is a line in size, so that both are the same in standard units, row by row
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        np.testing.assert_allclose(x[:, :1], y, atol=1e-5)
        assert not x[:, 2].any()  # never changes


#: a row of 20 that is not for training
HELD = draws.shuffled(20, 0, "split", 1)[0]


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "t.csv: empty"),
        ("a,a\n1,2\n", "different names, not 'a', 'a'"),
        ("a,\n1,2\n", "different names, not 'a', ''"),
        ("a,b\n1,2\n1\n", "line 3: 1 fields, but 2 columns"),
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 fields"),
        ("a,b\n1,two\n", "line 2: b is 'two', a finite number expected"),
        ("a,b\n1,\n", "line 2: b is ''"),
        ("a,b\nnan,1\n", "line 2: a is 'nan'"),
        ("a,b\ninf,1\n", "line 2: a is 'inf'"),
        ("a,b\n1_000,1\n", "line 2: a is '1_000'"),
        ("a,b\n" + "1e300,1\n-1e300,2\n" * 20, "the deviation of a is inf in fp64"),
        ("a,b\n" + "0,1\n1e-200,2\n" * 20, "the deviation of a is 0.0 in fp64"),
        ("a,b\n" + "".join(f"{i + 1e300 * (i == HELD)},{i}\n" for i in range(20)), "a has a number too far from those"),
        ("a,b\n" + "1,0.1\n2,0.1\n" * 50, "b is 0.1 in every row of the training split"),
        ('a,b\n"1,2\n', "no CSV file"),
        ("b\n" + "1\n" * 20, "b is its only column"),
        ("a,c\n" + "1,2\n" * 20, "no column 'b' to predict: there are a, c"),
        ("a,b\n" + "1,2\n" * 6, "6 rows are too few"),
        ("a,b\n", "0 rows are too few"),
        ("a,b\n" + "1,2\n" * 7, "b is 2 in every row of the training split"),
    ],
)
def test_csv_refuses(tmp_path, text, match):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        D.load_regression(path, "b")


@pytest.mark.parametrize("rows", [23, 40, 100, 442])
@pytest.mark.parametrize("value", [0.1, 0.7, 3.3, 1e6 + 0.1])
def test_a_feature_that_never_changes_in_training_is_zero_everywhere(tmp_path, rows, value):
    """Whatever the rounding of its mean; and where only rows of the other splits differ."""
    path = tmp_path / "t.csv"
    for other in (False, True):
        held = draws.shuffled(rows, 0, "split", 1)[: int(rows * 0.15)] if other else ()
        lines = [f"{i},{7 if i in held else value},{i % 5}" for i in range(rows)]
        path.write_text("\n".join(["a,flag,b", *lines]))
        data = D.load_regression(path, "b")
        assert not any(x[:, 1].any() for x in (data.x_train, data.x_valid, data.x_test))


def test_csv_of_bytes_and_missing_files(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match="t.csv: no CSV file"):
        read_csv(tmp_path / "t.csv")
    with pytest.raises(FileNotFoundError, match="absent.csv: no such file"):
        D.load_regression(tmp_path / "absent.csv", "b")
    with pytest.raises(ValueError, match="no column None"):
        D.load_regression(write_csv(tmp_path / "houses.csv"))


def test_nothing_optional_is_imported():
    code = (
        "import sys, ezo_kernels.data\n"
        "found = [m for m in ('h5py', 'sklearn', 'scipy', 'matplotlib', 'triton') if m in sys.modules]\n"
        "sys.exit(str(found) if found else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

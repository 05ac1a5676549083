"""Readers, downloads, splits and batches. Nothing here is downloaded: every source is replaced."""

from __future__ import annotations

import gzip
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from synthetic_idx import make_arrays, write_idx

from ezo_kernels import data as D
from ezo_kernels.data import download as _download_function  # noqa: F401  (the name in the package is the function)
from ezo_kernels.data.files import PARTS, read_folder
from ezo_kernels.data.idx import idx_bytes, parse_idx, read_bytes

download_module = sys.modules["ezo_kernels.data.download"]
IMAGES, LABELS = PARTS["x_train"][0], PARTS["y_train"][0]


# ------------------------------------------------------------------------------------------------------------ IDX


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 5), (0, 3)])
def test_idx_round_trip(shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    assert np.array_equal(parse_idx(idx_bytes(array), "file", len(shape)), array)


def test_idx_of_known_bytes():
    assert parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]), "file").tolist() == [7, 9]
    assert idx_bytes(np.array([7, 9], np.uint8)) == bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9])


GOOD = idx_bytes(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(
    "raw, fault",
    [
        (b"", "truncated: 0 bytes"),
        (GOOD[:7], "truncated: 7 bytes, its header alone has 12"),
        (GOOD[:-1], r"truncated: 17 bytes, 18 expected for shape \[2, 3\]"),
        (GOOD + b"x", "too long: 19 bytes, 18 expected"),
        (b"\x01" + GOOD[1:], "wrong magic 01000802: this is no IDX file"),
        (b"<html>", "wrong magic"),
        (b"\0\0\x0d" + GOOD[3:], "type 0x0d is not the uint8"),
        (b"\0\0\x08\x00", "this is no IDX file"),
        (idx_bytes(np.zeros(3, np.uint8)), "1 dimensions, 2 expected"),
    ],
)
def test_a_broken_idx_file_is_named_with_its_fault(raw, fault):
    with pytest.raises(ValueError, match=f"^some-file: {fault}|^some-file: .*{fault}"):
        parse_idx(raw, "some-file", 2)


@pytest.mark.parametrize("shape", [(1,) * 70, (0, 2**32 - 1, 2**32 - 1, 2**32 - 1)])
def test_an_idx_header_of_more_than_numpy_can_have_is_named(shape):
    raw = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + b"x" * all(shape)
    with pytest.raises(ValueError, match=f"^some-file: a header of {len(shape)} dimensions, {max(shape)} the largest"):
        parse_idx(raw, "some-file")


def test_idx_is_written_from_uint8_only():
    with pytest.raises(TypeError, match="float32"):
        idx_bytes(np.zeros(3, np.float32))


def test_gzip_is_told_by_content_and_its_faults_named(tmp_path):
    path = tmp_path / "named-otherwise"
    path.write_bytes(gzip.compress(GOOD))
    assert read_bytes(path) == GOOD
    for raw in (gzip.compress(GOOD)[:-9], gzip.compress(GOOD)[:12] + b"garbage garbage"):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"{path}: corrupt or truncated gzip"):
            read_bytes(path)


# -------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("layout", ["raw", "gz", "dotted", "npz", "npz file", "subfolder", "npz in subfolder"])
def test_every_layout_gives_the_same_arrays(tmp_path, layout):
    arrays = make_arrays()
    path = tmp_path
    if layout in ("raw", "gz"):
        write_idx(tmp_path, arrays, compress=layout == "gz")
    elif layout == "dotted":
        for name, _ in PARTS.values():
            write_idx(tmp_path, arrays)
            (tmp_path / name).rename(tmp_path / name.replace("-idx", ".idx"))
    elif layout == "subfolder":
        write_idx(tmp_path / "mnist", arrays)
    else:
        folder = tmp_path / "mnist" if "subfolder" in layout else tmp_path
        folder.mkdir(exist_ok=True)
        np.savez(folder / "mnist.npz", **{k: v.astype(np.int64) if k[0] == "y" else v for k, v in arrays.items()})
        path = folder / "mnist.npz" if layout == "npz file" else tmp_path
    found, where = read_folder(path, "mnist")
    assert str(tmp_path) in where
    for part in PARTS:
        assert found[part].dtype == np.uint8
        assert np.array_equal(found[part], arrays[part])


def test_faults_of_a_folder(tmp_path):
    arrays = make_arrays()
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_folder(tmp_path / "absent", "mnist")
    with pytest.raises(FileNotFoundError, match="neither mnist.npz nor the four IDX files"):
        read_folder(tmp_path, "mnist")
    write_idx(tmp_path, arrays)
    (tmp_path / LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {LABELS}"):
        read_folder(tmp_path, "mnist")
    (tmp_path / LABELS).write_bytes(idx_bytes(arrays["y_train"][:-1]))
    with pytest.raises(ValueError, match=r"120 train images but labels of shape \[119\]"):
        read_folder(tmp_path, "mnist")
    (tmp_path / LABELS).write_bytes(idx_bytes(arrays["y_train"] + 1))
    with pytest.raises(ValueError, match="label 10"):
        read_folder(tmp_path, "mnist")
    # Images and labels exchanged: the magic tells.
    (tmp_path / LABELS).write_bytes((tmp_path / IMAGES).read_bytes())
    with pytest.raises(ValueError, match=f"{LABELS}: wrong magic 00000803: 3 dimensions, 1 expected"):
        read_folder(tmp_path, "mnist")
    write_idx(tmp_path, {**arrays, "x_test": arrays["x_test"][:, :20]})
    with pytest.raises(ValueError, match=r"x_test has shape \[40, 20, 28\], \[n, 28, 28\] expected"):
        read_folder(tmp_path, "mnist")


def test_faults_of_an_npz(tmp_path):
    arrays = make_arrays()
    path = tmp_path / "mnist.npz"

    def write(**changed):
        np.savez(path, **{**arrays, **changed})

    write()
    whole = path.read_bytes()
    for raw in (whole[:1000], whole[:-100], b"", b"no zip at all", whole[:2000] + b"\0" * 100 + whole[2100:]):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="mnist.npz: corrupt or truncated npz") as caught:
            read_folder(tmp_path, "mnist")
        assert "pickle" not in str(caught.value)
    np.save(tmp_path / "plain.npy", arrays["x_test"])
    with pytest.raises(ValueError, match="plain.npy: corrupt or truncated npz"):
        read_folder(tmp_path / "plain.npy", "mnist")
    np.savez(path, x_train=arrays["x_train"])
    with pytest.raises(ValueError, match="no y_train, x_test, y_test in it, only x_train"):
        read_folder(tmp_path, "mnist")
    write(x_train=arrays["x_train"].astype(np.float32))
    with pytest.raises(TypeError, match="x_train is float32, uint8 expected"):
        read_folder(tmp_path, "mnist")
    write(y_test=arrays["y_test"].astype(np.float32))
    with pytest.raises(TypeError, match="y_test is float32, integers expected"):
        read_folder(tmp_path, "mnist")
    write(y_test=arrays["y_test"].astype(np.int64) - 1)
    with pytest.raises(ValueError, match="labels from -1 to 8"):
        read_folder(tmp_path, "mnist")
    write(x_train=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="corrupt or truncated npz file: an array of Python objects is in it"):
        read_folder(tmp_path, "mnist")


def test_an_npz_whose_members_are_no_arrays_is_named(tmp_path):
    """Of a whole zip: numpy gives bytes, or lets errors of its header's parser, of sizes and of zipfile through."""
    path = tmp_path / "mnist.npz"

    def header(shape):
        return (
            b"\x93NUMPY\x01\x00\x76\x00"
            + f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({shape},)}}".encode().ljust(118)
        )

    for raw, said in (
        (b"no array", "y_train is no array"),
        (b"", "y_train is no array"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': broken", "multi-line"),
        (header(10**15), "Unable to allocate"),
        (np.lib.format.magic(9, 9), "version"),
    ):
        np.savez(path, **{k: v for k, v in make_arrays().items() if k != "y_train"})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("y_train.npy", raw)
        with pytest.raises(ValueError, match=f"mnist.npz: corrupt or truncated npz file: .*{said}"):
            read_folder(tmp_path, "mnist")
    np.savez(path, **make_arrays())
    whole = path.read_bytes()
    # the flags and the method of its first member, in the member and in the directory
    for at, method in ((6, b"\1\0"), (8, b"\x09\0"), (8, b"\x0e\0")):
        raw = bytearray(whole)
        for start in (whole.find(b"PK\3\4") + at, whole.find(b"PK\1\2") + at + 2):
            raw[start : start + 2] = method
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="mnist.npz: corrupt or truncated npz file: "):
            read_folder(tmp_path, "mnist")
    np.savez(path, **{**make_arrays(), "y_train": np.zeros(120, "m8[s]")})
    with pytest.raises(TypeError, match=r"y_train is timedelta64\[s\], integers expected"):
        read_folder(tmp_path, "mnist")


# ---------------------------------------------------------------------------------------------------- the data set


def test_the_validation_split_is_the_one_it_says_it_is():
    indices = D.validation_indices()
    assert np.array_equal(indices, np.sort(np.random.default_rng(2501_04287).permutation(60_000)[:5_000]))
    assert len(np.unique(indices)) == 5_000 and indices.min() >= 0 and indices.max() < 60_000


def test_load_takes_the_validation_images_out_of_the_training_images(tmp_path):
    arrays = make_arrays()
    data = D.load("mnist", write_idx(tmp_path, arrays))
    held_out = [i for i in D.validation_indices() if i < 120]
    kept = [i for i in range(120) if i not in held_out]
    assert np.array_equal(data.x_valid, arrays["x_train"][held_out])
    assert np.array_equal(data.y_valid, arrays["y_train"][held_out])
    assert np.array_equal(data.x_train, arrays["x_train"][kept])
    assert np.array_equal(data.y_train, arrays["y_train"][kept])
    assert np.array_equal(data.x_test, arrays["x_test"])
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert not data.genuine and data.source == str(tmp_path)


def test_a_set_too_small_to_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="5 training images are too few"):
        D.load("mnist", write_idx(tmp_path, make_arrays(train=5)))


def test_genuine_is_by_checksum_and_the_other_set_is_refused(tmp_path, genuine):
    assert D.load("mnist", write_idx(tmp_path, genuine)).genuine
    with pytest.raises(ValueError, match="this is mnist, not fashion_mnist"):
        D.load("fashion_mnist", tmp_path)
    genuine["x_test"][0, 0, 0] ^= 1
    assert not D.load("mnist", write_idx(tmp_path, genuine)).genuine


def test_load_says_what_is_missing(cache):
    with pytest.raises(ValueError, match="unknown data set 'cifar'"):
        D.load("cifar")
    with pytest.raises(FileNotFoundError, match="not in the cache: get it with `ezo data mnist`"):
        D.load("mnist")


def test_digits():
    data = D.load("digits")
    assert [len(x) for x in (data.x_train, data.x_valid, data.x_test)] == [1297, 200, 300]
    assert data.x_train.shape[1:] == (28, 28) and data.x_train.dtype == np.uint8 and data.x_train.max() == 255
    assert not data.genuine
    everything = np.concatenate([data.x_train, data.x_valid, data.x_test])
    # Frame of two, and every pixel three times each way.
    assert not everything[:, :2].any() and not everything[:, :, -2:].any()
    assert np.array_equal(everything[:, 2:-2:3, 2:-2:3], everything[:, 4:-2:3, 3:-2:3])
    # The split is fixed: by numpy's Philox, whose stream does not change.
    assert data.y_test[:8].tolist() == [0, 8, 5, 0, 3, 1, 2, 2]
    x = D.standardize(data.x_train, "digits")
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3


def test_standardize():
    images = np.zeros((2, 28, 28), np.uint8)
    images[1] = 255
    x = D.standardize(images, "mnist")
    assert x.shape == (2, 1, 28, 28) and x.dtype == torch.float32
    assert x[0].unique().item() == pytest.approx(-0.13066 / 0.30811, rel=1e-6)
    assert x[1].unique().item() == pytest.approx((1 - 0.13066) / 0.30811, rel=1e-6)
    assert D.standardize(images, "fashion_mnist", torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="float64"):
        D.standardize(images.astype(float), "mnist")
    with pytest.raises(ValueError, match="no mean and std"):
        D.standardize(images, "cifar")
    with pytest.raises(ValueError, match=r"\[2, 28\]"):
        D.standardize(images[:, 0], "mnist")


# -------------------------------------------------------------------------------------------------------- batches


def rows(n=10):
    return torch.arange(n).float().unsqueeze(1), torch.arange(n)


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    x, y = rows()
    batches = D.Batches(x, y, 4, seed=3)
    first, second = list(batches), list(batches)
    assert [len(b) for _, b in first] == [4, 4, 2] and len(batches) == 3
    for epoch in (first, second):
        assert torch.cat([b for _, b in epoch]).sort().values.equal(y)
        assert all(torch.equal(a[:, 0], b.float()) for a, b in epoch)
    assert not torch.equal(torch.cat([b for _, b in first]), torch.cat([b for _, b in second]))


def test_the_order_is_of_seed_and_epoch_alone():
    x, y = rows(1000)
    a, b = D.Batches(x, y, 4, seed=3), D.Batches(x, y, 7, seed=3, drop_last=True)
    torch.manual_seed(0)
    order = a.order(5)
    torch.manual_seed(1)
    assert torch.equal(order, b.order(5))
    others = [D.Batches(x, y, 4, seed=5).order(3), a.order(4), D.Batches(x, y, 4, seed=4).order(5), a.order(3)]
    assert not any(torch.equal(order, other) for other in others)


def test_an_epoch_can_be_entered_in_the_middle():
    x, y = rows()
    batches = D.Batches(x, y, 3, seed=1)
    whole = [b for _, b in batches.epoch(2)]
    rest = [b for _, b in batches.epoch(2, start=2)]
    assert len(rest) == 2 and all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_drop_last():
    x, y = rows()
    batches = D.Batches(x, y, 4, drop_last=True)
    assert [len(b) for _, b in batches] == [4, 4] and len(batches) == 2


@pytest.mark.parametrize(
    "change, match",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"y": torch.arange(9)}, "x has 10 rows and y has 9"),
        ({"x": torch.zeros(0, 1), "y": torch.arange(0)}, "x has 0 rows"),
        ({"batch_size": 11, "drop_last": True}, "a batch of 11 out of 10 rows"),
    ],
)
def test_batches_refuse(change, match):
    x, y = rows()
    with pytest.raises(ValueError, match=match):
        D.Batches(**{"x": x, "y": y, "batch_size": 4, "seed": 0, **change})


@pytest.mark.parametrize(
    "change, match",
    [
        ({"batch_size": 2.5}, "batch_size must be an integer, got float"),
        ({"seed": 1.5}, "seed must be an integer, got float"),
        ({"x": np.zeros((10, 1))}, "x must be a tensor or an Int8Tensor, got ndarray"),
        ({"y": list(range(10))}, "y must be a tensor or an Int8Tensor, got list"),
    ],
)
def test_batches_refuse_other_types(change, match):
    x, y = rows()
    with pytest.raises(TypeError, match=match):
        D.Batches(**{"x": x, "y": y, "batch_size": 4, "seed": 0, **change})


def test_an_epoch_that_is_none_is_refused_at_once():
    batches = D.Batches(*rows(), 4)
    assert list(batches.epoch(0, 99)) == []
    for place, error in (((-1,), ValueError), ((0, -1), ValueError), ((0.5,), TypeError), ((0, 1.5), TypeError)):
        with pytest.raises(error, match="(epoch|start) (is -1|must be an integer)"):
            batches.epoch(*place)


def test_images_that_are_no_numpy_array_are_refused():
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    for call in (D.standardize, D.quantize_images, lambda images, _: D.rotate_images(images, 9)):
        with pytest.raises(TypeError, match="images are Tensor, a numpy array expected"):
            call(images, "mnist")

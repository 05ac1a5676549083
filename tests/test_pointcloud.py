"""Point clouds: out of images, and out of ModelNet40's files."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import ezo_kernels as ezo
import ezo_kernels.data as D
from ezo_kernels.data.modelnet import read_hdf5, read_off, sample_surface
from ezo_kernels.data.pointcloud import image_clouds, unit_sphere

h5py = pytest.importorskip("h5py")


def on_unit_sphere(clouds) -> None:
    assert clouds.dtype == np.float32
    np.testing.assert_allclose(clouds.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(clouds, axis=-2).max(-1), 1, atol=1e-6)


def test_unit_sphere():
    x = np.random.default_rng(0).normal(3, 5, (2, 3, 50))
    on_unit_sphere(unit_sphere(x))
    np.testing.assert_allclose(unit_sphere(7 * x + 2), unit_sphere(x), atol=1e-6)
    assert not unit_sphere(np.full((3, 4), 2.0)).any()


# --------------------------------------------------------------------------------------------------------- from images


def stroke(value: int = 255) -> np.ndarray:
    """An L: a column on the left, a row at the bottom of half its ink."""
    x = np.zeros((1, 28, 28), np.uint8)
    x[0, 4:24, 6] = value
    x[0, 23, 7:22] = value // 2
    return x


def test_points_are_drawn_from_the_ink():
    """Undone from the sphere by the L's own corner, each point lies in a pixel with ink, in proportion to it."""
    x = stroke()
    cloud = image_clouds(x, 20_000)[0].astype(float)
    assert not cloud[2].any()
    # The column has no point right of it but those of the bottom row: its extent is the image's 20 rows.
    scale = 20 / (cloud[1].max() - cloud[1].min())
    right, up = (cloud[0] - cloud[0].min()) * scale, (cloud[1] - cloud[1].min()) * scale
    row, column = 23 - np.clip(up, 0, 19.99).astype(int), 6 + np.clip(right, 0, 15.99).astype(int)
    edge = (np.abs(up - up.round()) < 0.01) | (np.abs(right - right.round()) < 0.01)
    assert (x[0, row, column][~edge] > 0).all()
    assert abs((column > 6).mean() - 15 * 127 / (15 * 127 + 20 * 255)) < 0.02
    assert len(np.unique(cloud[:2], axis=1).T) == 20_000
    inside = up[column == 6] % 1
    assert np.abs(np.histogram(inside, 4, (0, 1))[0] / len(inside) - 0.25).max() < 0.03  # anywhere in the square


def test_z_is_the_intensity():
    flat, deep = image_clouds(stroke(), 500)[0], image_clouds(stroke(), 500, z="intensity")[0]
    assert not flat[2].any()
    low, high = np.unique(np.round(deep[2], 4))
    # The L is 20 pixels high; 255 is half a side of 28, and 127 as much less.
    assert (high - low) / np.ptp(deep[1]) == pytest.approx((255 - 127) / 255 * 14 / 20, rel=0.02)
    on_unit_sphere(deep)


@pytest.fixture
def images() -> D.Dataset:
    return D.load("digits")


def test_point_clouds_of_a_data_set(images, monkeypatch):
    clouds = D.point_clouds(images, 32)
    assert clouds.x_train.shape == (1297, 3, 32) and clouds.x_test.shape == (300, 3, 32)
    for split in ("train", "valid", "test"):
        on_unit_sphere(getattr(clouds, f"x_{split}"))
        assert getattr(clouds, f"y_{split}") is getattr(images, f"y_{split}")
    assert clouds.name == "digits" and not clouds.genuine and clouds.source.endswith("32 points an image, seed 0")
    assert np.array_equal(D.point_clouds(images, 32).x_train, clouds.x_train)
    assert not np.array_equal(D.point_clouds(images, 32, seed=1).x_train, clouds.x_train)
    # A cloud is of its own image, seed, split and index: not of how many there are, or are drawn at once.
    alone = image_clouds(np.repeat(images.x_train[:1], 12, 0), 32)
    assert np.array_equal(alone[0], clouds.x_train[0]) and not np.array_equal(alone[0], alone[1])
    assert not np.array_equal(image_clouds(images.x_train[:1], 32, split=1)[0], alone[0])
    monkeypatch.setattr("ezo_kernels.data.pointcloud._CHUNK", 7)
    assert np.array_equal(image_clouds(images.x_train[:20], 32), clouds.x_train[:20])


def test_a_digit_stands_upright():
    """A seven-like bar on top: its points are up, which is +y."""
    x = np.zeros((1, 28, 28), np.uint8)
    x[0, 4, 4:24] = 255
    x[0, 5:24, 20] = 60
    cloud = image_clouds(x, 400)[0]
    assert np.median(cloud[1]) > 0 and cloud[0][cloud[1] < -0.3].min() > 0


def test_no_images_are_no_clouds():
    assert image_clouds(stroke()[:0], 4).shape == (0, 3, 4)


def test_image_clouds_refuse(images):
    x = stroke()
    with pytest.raises(TypeError, match="float64"):
        image_clouds(x.astype(float), 4)
    with pytest.raises(ValueError, match=r"\[28, 28\]"):
        image_clouds(x[0], 4)
    with pytest.raises(TypeError, match="images are Tensor, a numpy array expected"):
        image_clouds(torch.from_numpy(x), 4)
    for options, error, said in (
        ({"points": 0}, ValueError, "points is 0"),
        ({"points": 2.5}, TypeError, "points must be an integer, got float"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
        ({"split": -1}, ValueError, "split is -1"),
    ):
        with pytest.raises(error, match=said):
            image_clouds(x, **{"points": 4, **options})
    with pytest.raises(ValueError, match=r"\[1, 0, 28\]: no point can be drawn"):
        image_clouds(x[:, :0], 4)
    with pytest.raises(ValueError, match="z is 'height'"):
        image_clouds(x, 4, z="height")
    images.x_valid[3] = 0
    with pytest.raises(ValueError, match="digits, x_valid: image 3 has no ink"):
        D.point_clouds(images, 4)


# -------------------------------------------------------------------------------------------------------------- HDF5


def write_hdf5(path, n, seed=0, points=20, **changed):
    rng = np.random.default_rng(seed)
    parts = {"data": rng.normal(size=(n, points, 3)).astype("f4"), "label": (np.arange(n)[:, None] % 40).astype("u1")}
    with h5py.File(path, "w") as file:
        for name, value in {**parts, **changed}.items():
            if value is not None:
                file[name] = value
    return parts


def release(root, lists=True):
    """A folder like modelnet40_ply_hdf5_2048."""
    root.mkdir()
    parts = [write_hdf5(root / f"ply_data_train{i}.h5", n, i) for i, n in enumerate((12, 18))]
    test = write_hdf5(root / "ply_data_test0.h5", 6, 9)
    if lists:
        for part, n in (("train", 2), ("test", 1)):
            lines = [f"data/modelnet40_ply_hdf5_2048/ply_data_{part}{i}.h5" for i in range(n)]
            (root / f"{part}_files.txt").write_text("\n".join(lines) + "\n")
    return parts, test


@pytest.mark.parametrize("lists", [True, False])
def test_modelnet_from_hdf5(tmp_path, lists):
    parts, test = release(tmp_path / "m", lists)
    data = D.load_modelnet40(tmp_path / "m", points=16)
    assert [len(x) for x in (data.x_train, data.x_valid, data.x_test)] == [27, 3, 6]
    assert data.name == "modelnet40" and not data.genuine and data.y_train.dtype == np.int64
    want = unit_sphere(test["data"][:, :16].transpose(0, 2, 1))
    np.testing.assert_array_equal(data.x_test, want)  # the first points, on the sphere
    on_unit_sphere(data.x_train)
    # Every training shape is in one of the two splits, with its own label.
    everything = unit_sphere(np.concatenate([p["data"] for p in parts])[:, :16].transpose(0, 2, 1))
    labels = np.concatenate([p["label"] for p in parts])[:, 0]
    x, y = np.concatenate([data.x_train, data.x_valid]), np.concatenate([data.y_train, data.y_valid])
    at = [int(np.flatnonzero((everything == cloud).all((1, 2)))[0]) for cloud in x]
    assert sorted(at) == list(range(30)) and np.array_equal(labels[at], y)
    assert at[:27] == sorted(at[:27]) and at[27:] == sorted(at[27:])
    again = D.load_modelnet40(tmp_path / "m", points=16, seed=5)  # HDF5 draws nothing
    np.testing.assert_array_equal(again.x_valid, data.x_valid)


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"data": None}, "no data in it, only label"),
        ({"label": None, "data": None}, "no data and no label in it, only nothing"),
        ({"data": np.zeros((5, 20, 2), "f4")}, r"data has shape \[5, 20, 2\]"),
        ({"data": np.zeros((0, 20, 3), "f4")}, r"data has shape \[0, 20, 3\]"),
        ({"data": np.zeros((5, 8, 3), "f4")}, "8 points a cloud, 16 are asked for"),
        ({"data": np.zeros((5, 20, 3), "i4")}, "data is int32"),
        ({"data": np.full((5, 20, 3), np.nan, "f4")}, "cloud 0 is not finite"),
        ({"data": np.arange(5)[:, None, None] * np.full((20, 3), 1e39)}, "cloud 1 is not finite in fp32"),
        ({"data": h5py.Empty("f4")}, "data is empty"),
        ({"label": h5py.Empty("u1")}, "label is empty"),
        ({"label": np.zeros((4, 1), "u1")}, r"label has shape \[4, 1\], \[5, 1\] expected"),
        ({"label": "chairs"}, r"label has shape \[\], \[5, 1\] expected"),
        ({"label": np.full((5, 1), 40, "u1")}, "labels from 40 to 40, 0 to 39"),
        ({"label": np.full((5, 1), 0.5)}, "label float64"),
    ],
)
def test_hdf5_refuses(tmp_path, changed, match):
    write_hdf5(tmp_path / "bad.h5", 5, **changed)
    with pytest.raises(ValueError, match=f"bad.h5: .*{match}"):
        read_hdf5(tmp_path / "bad.h5", 16)


def test_a_list_of_files_that_is_no_text_is_named(tmp_path):
    for part in ("train", "test"):
        write_hdf5(tmp_path / f"ply_data_{part}0.h5", 12, 1)
    (tmp_path / "train_files.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="train_files.txt: corrupt: "):
        D.load_modelnet40(tmp_path, points=16)


def test_integer_clouds_are_refused_by_type():
    x = ezo.quantize(torch.zeros(4, 3, 5))
    with pytest.raises(TypeError, match="x is Int8Tensor, float32 expected"):
        D.CloudBatches(x, torch.zeros(4), 2)


def test_damaged_and_missing_hdf5_files(tmp_path):
    release(tmp_path / "m")
    path = tmp_path / "m" / "ply_data_train1.h5"
    whole = path.read_bytes()
    for raw in (b"", b"no hdf5", whole[:1000], whole[:-200]):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="ply_data_train1.h5: corrupt or truncated HDF5"):
            D.load_modelnet40(tmp_path / "m", 16)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="train_files.txt: no ply_data_train1.h5 in"):
        D.load_modelnet40(tmp_path / "m", 16)
    (tmp_path / "m" / "train_files.txt").write_text("\n")
    with pytest.raises(FileNotFoundError, match="it names no file"):
        D.load_modelnet40(tmp_path / "m", 16)
    (tmp_path / "m" / "train_files.txt").unlink()
    (tmp_path / "m" / "ply_data_train0.h5").unlink()
    with pytest.raises(FileNotFoundError, match="neither train_files.txt nor"):
        D.load_modelnet40(tmp_path / "m", 16)
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        D.load_modelnet40(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither ply_data_train.*nor folders"):
        D.load_modelnet40(tmp_path / "empty")
    with pytest.raises(ValueError, match="points is 0"):
        D.load_modelnet40(tmp_path / "empty", 0)
    with pytest.raises(TypeError, match="points must be an integer"):
        D.load_modelnet40(tmp_path / "empty", 2.5)
    with pytest.raises(FileNotFoundError, match="absent.h5: no such file"):
        read_hdf5(tmp_path / "absent.h5", 1)


def test_an_hdf5_file_of_more_than_memory_is_named(tmp_path):
    with h5py.File(tmp_path / "vast.h5", "w") as file:
        file.create_dataset("data", (10**12, 20, 3), "f4", chunks=(1, 20, 3))
        file["label"] = np.zeros(5, "u1")
    with pytest.raises(ValueError, match="vast.h5: corrupt or truncated HDF5 file: Unable to allocate"):
        read_hdf5(tmp_path / "vast.h5", 16)


def test_h5py_missing_names_the_extra(monkeypatch, tmp_path):
    release(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"ezo-kernels\[pointcloud\]"):
        D.load_modelnet40(tmp_path / "m", 16)


def test_too_few_shapes(tmp_path):
    (tmp_path / "m").mkdir()
    write_hdf5(tmp_path / "m" / "ply_data_train0.h5", 9)
    write_hdf5(tmp_path / "m" / "ply_data_test0.h5", 1)
    with pytest.raises(ValueError, match="9 training shapes are too few"):
        D.load_modelnet40(tmp_path / "m", 16)


# --------------------------------------------------------------------------------------------------------------- OFF

#: A square of area 4 in two triangles, and a triangle of area 0.5 beside it.
MESH = "0 0 0\n2 0 0\n2 2 0\n0 2 0\n5 0 0\n6 0 0\n5 1 0\n"
FACES = "3 0 1 2\n3 0 2 3\n3 4 5 6\n"


@pytest.mark.parametrize(
    "text",
    [
        f"OFF\n7 3 0\n{MESH}{FACES}",
        f"OFF7 3 0\n{MESH}{FACES}",
        f"OFF 7 3 0\r\n{MESH}{FACES}".replace("\n", "\r\n"),
        f"# made by hand\nOFF\n# counts\n7 3 0 # v f e\n\n{MESH}{FACES}",
        f"OFF\n7 2 0\n{MESH}4 0 1 2 3\n3 4 5 6\n",  # the square as one face
        f"OFF\n7 3 0\n\n{MESH}\n{FACES}\n\n",
        # colours, of which one could be the start of a face
        f"OFF\n7 3 0\n{MESH}3 0 1 2 255 0 0\n3 0 2 3 3 0 1\n3 4 5 6 3 0 1 2\n",
        f"OFF\n7 2 0\n{MESH}4 0 1 2 3 0.5 0.5 0.5\n3 4 5 6\n3 0 0 0\n",
        # faces that share a line, and that run over lines
        f"OFF\n7 2 0\n{MESH}4 0 1 2 3 3 4 5 6\n",
        f"OFF\n7 2 0\n{MESH}4 0 1\n2 3\n3 4 5 6\n",
        f"OFF\n7 3\n0 {MESH.replace(chr(10), ' ', 3)}{FACES[:7]}  7\n{FACES[8:]}",
    ],
)
def test_off(tmp_path, text):
    path = tmp_path / "a.off"
    path.write_bytes(text.encode())
    vertices, triangles = read_off(path)
    assert vertices.shape == (7, 3) and vertices[2].tolist() == [2, 2, 0]
    assert triangles.tolist() == [[0, 1, 2], [0, 2, 3], [4, 5, 6]] and triangles.dtype == np.int64


@pytest.mark.parametrize(
    "text, match",
    [
        ("", "no OFF file: it begins with ''"),
        ("PLY\n1 1 0", "begins with 'PLY"),
        ("OFF\n", "its header counts"),
        ("OFF\n0 3 0\n", "its header counts"),
        ("OFF\n2.5 3 0\n", "its header counts"),
        (f"OFF\n7 3 0\n{MESH[:20]}", "truncated: "),
        (f"OFF\n7 3 0\n{MESH}{FACES[:14]}", "truncated"),
        (f"OFF\n7 3 0\n{MESH}{FACES[:-3]}", "truncated or corrupt: face 2 of 3"),
        (f"OFF\n7 3 0\n{MESH}3 0 1 2\n3 0 2 7\n3 4 5 6\n", "corners from 0 to 7, but vertices are 0 to 6"),
        (f"OFF\n7 3 0\n{MESH}3 0 1 2\n3 0 2 -1\n3 4 5 6\n", "corners from -1"),
        (f"OFF\n7 3 0\n{MESH}2 0 1\n3 0 2 3\n3 4 5 6\n0\n", "face 0 of 3 has no three"),
        (f"OFF\n7 3 0\n{MESH}nan 0 1 2\n3 0 2 3\n3 4 5 6\n", "face 0 of 3 has no three"),
        (f"OFF\n7 3 0\n{MESH}3.7 0 1 2 3\n3 0 2 3\n3 4 5 6\n", "face 0 of 3 has no three"),
        (f"OFF\n7 3 0\n{MESH}3 0 1\n2 3 0 2 3\n3 4 5 6\n5\n", "face 0 of 3 has no three"),
        (f"OFF\n7 3 0\n{MESH}3 0 1 2 3 0 1\n3 0 2 3 3 0 2\n", "truncated: 2 lines of faces, 3 expected"),
        ("OFF\ninf 3 0\n", "its header counts"),
        (f"OFF\n7 3 0\n{MESH}3 0 1 x\n3 0 2 3\n3 4 5 6\n", "not a number"),
        (f"OFF\n7 3 0\n{MESH.replace('6', 'nan', 1)}{FACES}", "a vertex is not finite"),
        (f"OFF\n7 3 0\n{MESH.replace('6', '1e200', 1)}{FACES}", "a vertex is not finite in fp32"),
    ],
)
def test_off_refuses(tmp_path, text, match):
    path = tmp_path / "bad.off"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.off: .*{match}"):
        read_off(path)


def test_points_are_uniform_on_the_surface(tmp_path):
    path = tmp_path / "a.off"
    path.write_text(f"OFF7 3 0\n{MESH}{FACES}")
    vertices, triangles = read_off(path)
    x, y, z = cloud = sample_surface(vertices, triangles, 40_000)
    assert not z.any()
    on_triangle = x > 4
    assert abs(on_triangle.mean() - 0.5 / 4.5) < 0.01
    assert (x[on_triangle] - 5 + y[on_triangle] <= 1 + 1e-9).all() and y.min() >= 0
    counts, *_ = np.histogram2d(x[~on_triangle], y[~on_triangle], 4, [(0, 2), (0, 2)])
    assert np.abs(counts / counts.sum() * 16 - 1).max() < 0.1
    # Even inside of a triangle: its centre of mass.
    np.testing.assert_allclose(cloud[:2, on_triangle].mean(1), [5 + 1 / 3, 1 / 3], atol=0.01)
    np.testing.assert_array_equal(sample_surface(vertices, triangles, 10), cloud[:, :10])
    assert not np.array_equal(sample_surface(vertices, triangles, 10, index=1), cloud[:, :10])
    with pytest.raises(ValueError, match="no area"):
        sample_surface(vertices, triangles[:, [0, 0, 1]], 4)
    with pytest.raises(ValueError, match="points is 0"):
        sample_surface(vertices, triangles, 0)


def test_modelnet_from_off(tmp_path):
    root = tmp_path / "ModelNet40"
    for name, scale in (("tall", 9), ("flat", 0.1)):
        for part, n in (("train", 6), ("test", 2)):
            (root / name / part).mkdir(parents=True)
            for i in range(n):
                # A wall in the plane of x and z: z is up in these files.
                wall = f"OFF4 1 0\n0 0 0\n1 0 0\n1 0 {scale}\n0 0 {scale}\n4 0 1 2 3\n"
                (root / name / part / f"{name}_{i:04}.off").write_text(wall)
    (root / "README.txt").write_text("no class")
    data = D.load_modelnet40(root, 64)
    assert [len(x) for x in (data.x_train, data.x_valid, data.x_test)] == [11, 1, 4]
    assert data.y_test.tolist() == [0, 0, 1, 1]  # flat before tall
    on_unit_sphere(data.x_train)
    height, width = (np.ptp(data.x_test[:, axis], axis=-1) for axis in (1, 0))
    assert (height[:2] < width[:2] / 5).all() and (height[2:] > width[2:] * 5).all()  # y is up
    assert len(np.unique(data.x_test.reshape(4, -1), axis=0)) == 4
    np.testing.assert_array_equal(D.load_modelnet40(root, 64).x_train, data.x_train)
    assert not np.array_equal(D.load_modelnet40(root, 64, seed=1).x_train, data.x_train)
    flat = root / "tall" / "test" / "tall_0001.off"
    flat.write_text("OFF\n3 1 0\n0 0 0\n1 1 1\n2 2 2\n3 0 1 2\n")
    with pytest.raises(ValueError, match="tall_0001.off: a mesh of 1 triangles has no area"):
        D.load_modelnet40(root, 64)
    for path in (root / "tall" / "test").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no .off files"):
        D.load_modelnet40(root, 64)

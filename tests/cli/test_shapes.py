"""ModelNet40 from one command, on small files of the form of its release."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ezo_kernels.cli.recipe import Recipe
from ezo_kernels.cli.run import build_model
from tests.cli.outcome import refused

h5py = pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """40 training shapes (36 and 4 for validation) and 10 for the test, of 1,024 points, in 40 classes."""
    root = tmp_path_factory.mktemp("modelnet40_ply_hdf5_2048")
    for part, n in (("train", 40), ("test", 10)):
        rng = np.random.default_rng(n)
        with h5py.File(root / f"ply_data_{part}0.h5", "w") as file:
            file["data"] = rng.normal(size=(n, 1024, 3)).astype("f4")
            file["label"] = np.arange(n, dtype="u1")[:, None] % 40
    return root


@pytest.fixture
def train(ezo, shapes):
    def run(*argv):
        common = ("--model", "pointnet", "--data", "modelnet40", "--data-dir", shapes, "--points", 16, "--batch", 9)
        return ezo("train", *common, "--epochs", 2, "--noise", "clt4", "--quiet", *argv)

    return run


def test_it_trains_and_is_tested(train, ezo, shapes, tmp_path):
    code, out, err = train("--json", tmp_path / "a.json", "--checkpoint", tmp_path / "a.pt")
    assert code == 0, err
    assert out.startswith("modelnet40: test accuracy")
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["data"] == "modelnet40" and record["steps"] == 8 and record["parameters"] == 819_624
    code, _, _ = ezo("eval", tmp_path / "a.pt", "--data-dir", shapes, "--json", tmp_path / "b.json")
    assert code == 0 and json.loads((tmp_path / "b.json").read_text())["test_accuracy"] == record["test_accuracy"]


def test_a_resumed_run_sees_the_same_clouds(train, tmp_path):
    """Augmentation is of the seed, the epoch and the shape."""
    whole, half = tmp_path / "whole.json", tmp_path / "half.json"
    assert train("--json", whole)[0] == 0
    assert train("--max-steps", 3, "--checkpoint", tmp_path / "c.pt")[0] == 0
    assert train("--resume", tmp_path / "c.pt", "--json", half)[0] == 0
    losses = [[row["loss"] for row in json.loads(path.read_text())["history"]] for path in (whole, half)]
    assert losses[0][-1] == losses[1][-1]


def test_in_integers(ezo, shapes):
    options = ("--model", "pointnet", "--data", "modelnet40", "--data-dir", shapes, "--points", 16, "--batch", 9)
    code, out, err = ezo("train", *options, "--precision", "int8", "--max-steps", 2, "--quiet")
    assert code == 0 and "modelnet40" in out, err


def test_the_experiment(ezo, shapes, tmp_path):
    options = ("--quick", "--seeds", 0, "--arms", "full ZO", "full BP", "--data", "modelnet40", "--data-dir", shapes)
    code, out, err = ezo("experiment", "pointcloud", "--out", tmp_path, *options)
    assert code == 0, err
    trials = json.loads((tmp_path / "pointcloud.json").read_text())["trials"].values()
    assert {t["specification"]["recipe"]["points"] for t in trials} == {1024}
    assert all(0 <= t["result"]["test_error"] <= 1 for t in trials)


def test_what_does_not_go_with_shapes(ezo, shapes, tmp_path):
    shape = ("--data", "modelnet40")
    assert refused(ezo("train", *shape, "--data-dir", shapes), "goes with model pointnet, not lenet5")
    assert refused(ezo("train", *shape, "--model", "pointnet"), "say --data-dir")
    assert refused(ezo("train", *shape, "--model", "pointnet", "--data-dir", tmp_path), "neither ply_data_train*.h5")
    out = ("--out", tmp_path / "no", *shape, "--data-dir", shapes)
    assert refused(ezo("experiment", "baseline", *out), "goes with the experiment pointcloud")
    assert refused(ezo("experiment", "pointcloud", *out, "--data", "mnist", "modelnet40"), "a --data-dir of its own")
    assert not (tmp_path / "no").exists()


def test_images_have_ten_classes():
    sizes = {
        name: build_model(Recipe(model="pointnet", data=name), "cpu").fc3.out_features
        for name in ("mnist", "modelnet40")
    }
    assert sizes == {"mnist": 10, "modelnet40": 40}

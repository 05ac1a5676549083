"""Diagnostics in use: by ``ezo train``, beside a baseline, and bad arguments."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from synthetic_idx import make_arrays, write_idx

from ezo_kernels.cli import main
from ezo_kernels.cli import train as train_module
from ezo_kernels.optim import Diagnostics
from ezo_kernels.optim.baselines import BackpropSGD
from tests.test_diagnostics import batches, floats, mlp


def test_ezo_train_prints_and_records_what_is_found(tmp_path, monkeypatch, capsys):
    folder = write_idx(tmp_path, make_arrays(train=256))
    monkeypatch.setattr(train_module, "Diagnostics", functools.partial(Diagnostics, every=3, memory_bytes=10_000))
    log = tmp_path / "run.json"
    argv = ["train", "--data-dir", folder, "--batch", 64, "--epochs", 1, "--quiet", "--json", log]
    assert main([str(a) for a in argv]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ezo: WARNING: activations take")]
    (finding,) = json.loads(log.read_text())["findings"]
    assert len(said) == 1 and finding["seen"] in said[0] and finding["kind"] == "activation_memory"
    monkeypatch.undo()
    assert main([str(a) for a in argv]) == 0 and json.loads(log.read_text())["findings"] == []


def test_a_baseline_is_watched_by_its_losses():
    opt = BackpropSGD(mlp(12, 16, 4), lr=0.05)
    watch = Diagnostics(opt, every=10, warn=False)
    with pytest.raises(TypeError, match="BackpropSGD keeps no losses"):
        watch.observe()
    found = []
    for i, (x, y) in enumerate(batches(20)):
        loss = opt.train_step(x, y)
        found += watch.observe(loss * float("nan") if i in (3, 4) else loss)
    assert [f.kind for f in found] == ["not_finite"]


def test_bad_arguments():
    opt = floats()
    with pytest.raises(TypeError, match="one of this library's, got SGD"):
        Diagnostics(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    for kwargs in ({"every": 0}, {"memory_bytes": 0}, {"every": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(kwargs))} must be"):
            Diagnostics(opt, **kwargs)
    with pytest.raises(TypeError, match=r"every must be an int, got float"):
        Diagnostics(opt, every=1.5)
    watch = Diagnostics(opt, every=5)
    with pytest.raises(TypeError, match=r"got torch\.int64: leave it out for an integer optimizer"):
        watch.observe(torch.tensor(3))
    with pytest.raises(TypeError, match="got float"):
        watch.observe(0.5)
    with pytest.raises(ValueError, match=r"one element, got \(2,\)"):
        watch.observe(torch.zeros(2))
    assert watch.steps == 0
    watch.close()

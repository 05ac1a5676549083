"""NVTX ranges: exactly the phases of a step when on, nothing when off."""

from __future__ import annotations

import ezo_kernels as ezo
from tests.test_step import batch, lenet


def test_nvtx_ranges_are_exactly_the_phases(monkeypatch):
    import contextlib

    import nvtx

    seen = []

    @contextlib.contextmanager
    def annotate(name, domain):
        seen.append((domain, name))
        yield

    monkeypatch.setattr(nvtx, "annotate", annotate)
    model = ezo.convert_(lenet(), head=["fc3"])
    ezo.ElasticZO(model).train_step(*batch(8))
    assert seen == []
    ezo.unconvert_(model)
    ezo.convert_(model, head=["fc3"])
    opt = ezo.ElasticZO(model, nvtx=True)
    opt.train_step(*batch(8))
    assert seen == [("ezo", n) for n in ("perturbed forward", "loss", "head", "update", "head")]

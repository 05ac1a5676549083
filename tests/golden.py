"""The frozen values of every noise. ``python -m tests.golden`` writes golden_noise.json, which it refuses to change
under the same version string: bits change only with docs/rng.md's version.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from ezo_kernels.ops import materialize
from ezo_kernels.ops.noise import rng_version

PATH = Path(__file__).with_name("golden_noise.json")

#: Arguments of ``materialize`` for each frozen tensor; extremes of every index are among them.
CASES = [
    dict(noise=noise, rounds=rounds, **where, **params)
    for noise, params in (
        ("gaussian", {}),
        ("clt4", {}),
        ("uniform", {}),
        ("hadamard", {}),
        ("rademacher", {}),
        ("sparse", {"p_zero": 0.9}),
        ("sparse_int8", {"p_zero": 0.25, "r_max": 15}),
        ("sparse_int8", {"r_max": 127}),
    )
    for rounds in (7, 10)
    for where in (
        dict(shape=[37, 131], seed=0, step=0, site=0, query=0),
        dict(shape=[6, 5, 3, 3], seed=2**64 - 1, step=2**64 - 1, site=2**32 - 1, query=2**24 - 1),
        dict(shape=[300], seed=12345, step=678, site=9, query=1),
    )
]


def frozen(case: dict, device=None) -> dict:
    """What is kept of one case: the digest of all bytes, and the bits of the first elements."""
    z = materialize(**case, device=device).cpu().contiguous()
    words = z.flatten()[:6].view(torch.int32 if z.element_size() == 4 else torch.int8)
    mask = (1 << 8 * z.element_size()) - 1
    return {
        **case,
        "sha256": hashlib.sha256(z.numpy().tobytes()).hexdigest(),
        "first": [f"{int(w) & mask:x}" for w in words],
    }


def load() -> dict:
    return json.loads(PATH.read_text())


def main() -> int:
    new = {"version": rng_version().split("/")[0], "cases": [frozen(case) for case in CASES]}
    if PATH.exists() and (old := load())["version"] == new["version"] and old["cases"] != new["cases"]:
        kept = {json.dumps(c, sort_keys=True) for c in new["cases"]}
        if any(json.dumps(c, sort_keys=True) not in kept for c in old["cases"]):
            print(f"{PATH.name} is frozen under {new['version']!r}: bits may change only with the version string")
            return 1
    cases = ",\n  ".join(json.dumps(c) for c in new["cases"])
    PATH.write_text(f'{{"version": {json.dumps(new["version"])}, "cases": [\n  {cases}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())

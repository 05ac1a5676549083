"""How well g follows the true directional derivative, by dtype and eps: the table of docs/numerics.md.

    python -m bench estimate --json bench/results/estimate.json

LeNet-5, one batch, many directions: the cosine between the vector of g over directions and that of <gradient, z> in fp64.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F

import ezo_kernels as ezo

DIRECTIONS = 64
#: name -> (dtype of weights, autocast)
CASES = {
    "fp32 weights, fp32 product": (torch.float32, None),
    "fp32 weights, bf16 product (autocast)": (torch.float32, torch.bfloat16),
    "bf16 weights, bf16 product": (torch.bfloat16, None),
    "fp16 weights, fp16 product": (torch.float16, None),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, required=True)


def _lenet(dtype):
    return ezo.models.LeNet5(generator=torch.Generator().manual_seed(0)).to(dtype)


def directional(x, y, sites, dtype) -> torch.Tensor:
    """<gradient, z_q> in fp64 at the weights as ``dtype`` holds them."""
    model = _lenet(dtype).double()
    F.cross_entropy(model(x.double()), y).backward()
    named = dict(model.named_parameters())

    def along(s, q: int) -> torch.Tensor:
        z = ezo.ops.materialize(s.shape, seed=0, step=0, site=s.site, query=q, layout=s.layout)
        return (named[s.names[0]].grad * z).sum()

    return torch.stack([sum(along(s, q) for s in sites) for q in range(DIRECTIONS)])


def measure(case: str, eps: float) -> float:
    """The cosine of one case."""
    dtype, autocast = CASES[case]
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 1, 28, 28, generator=generator), torch.randint(0, 10, (64,), generator=generator)
    model = ezo.convert_(_lenet(dtype))
    opt = ezo.ElasticZO(model, lr=0.0, eps=eps, queries=DIRECTIONS, mode="sequential")
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        opt.train_step(x.to(dtype), y, loss_fn=lambda out, t: F.cross_entropy(out.float(), t))
    want = directional(x, y, model._ezo.manifest, dtype)
    return F.cosine_similarity(opt.g.double(), want, dim=0).item()


def run(args: argparse.Namespace) -> int:
    rows = [{"case": c, "eps": e, "cosine": measure(c, e)} for c in CASES for e in (1e-4, 1e-3, 1e-2)]
    record = {"environment": {"torch": torch.__version__, "device": "cpu"}, "directions": DIRECTIONS, "rows": rows}
    temporary = args.json.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, args.json)
    for row in rows:
        print(f"{row['case']}, eps {row['eps']:g}: cosine {row['cosine']:.4f}")
    return 0

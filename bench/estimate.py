"""How well g follows the true directional derivative, by dtype, strategy and eps: the table of docs/numerics.md.

    python -m bench estimate --json bench/results/estimate.json

LeNet-5, one batch, many directions: the cosine between the vector of g over directions and that of <gradient, z> in fp64, z
rounded where the strategy rounds it. Figures of a CPU: each strategy rounds as its reference does. Convolutions have no two
products, and are fused beside them.
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
STRATEGIES = ("fused", "slab", "two_products")
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
    """<gradient, z_q> in fp64 at the weights as ``dtype`` holds them, z as each site has it."""
    model = _lenet(dtype).double()
    F.cross_entropy(model(x.double()), y).backward()
    named = dict(model.named_parameters())

    def along(s, q: int) -> torch.Tensor:
        z = ezo.ops.materialize(s.shape, seed=0, step=0, site=s.site, query=q, layout=s.layout)
        z_dtype = getattr(torch, s.z_dtype_for(torch.empty(0, dtype=dtype)))
        return (named[s.names[0]].grad * z.to(z_dtype)).sum()

    return torch.stack([sum(along(s, q) for s in sites) for q in range(DIRECTIONS)])


def measure(case: str, strategy: str, eps: float) -> float:
    """The cosine of one case."""
    dtype, autocast = CASES[case]
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 1, 28, 28, generator=generator), torch.randint(0, 10, (64,), generator=generator)
    model = ezo.convert_(_lenet(dtype), strategy=strategy)
    opt = ezo.ElasticZO(model, lr=0.0, eps=eps, queries=DIRECTIONS, mode="sequential")
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        opt.train_step(x.to(dtype), y, loss_fn=lambda out, t: F.cross_entropy(out.float(), t))
    want = directional(x, y, model._ezo.manifest, dtype)
    return F.cosine_similarity(opt.g.double(), want, dim=0).item()


def run(args: argparse.Namespace) -> int:
    rows = []
    for case, (_, autocast) in CASES.items():
        for strategy in STRATEGIES:
            if strategy == "two_products" and autocast is not None:
                continue  # it would round the fp32 weights, and is refused
            for eps in (1e-4, 1e-3, 1e-2):
                rows.append({"case": case, "strategy": strategy, "eps": eps, "cosine": measure(case, strategy, eps)})
                print(f"{case}, {strategy}, eps {eps:g}: cosine {rows[-1]['cosine']:.4f}", flush=True)
    record = {"environment": {"torch": torch.__version__, "device": "cpu"}, "directions": DIRECTIONS, "rows": rows}
    temporary = args.json.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, args.json)
    return 0

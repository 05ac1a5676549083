"""Zeroth-order training on a GPU: fused kernels that make the perturbation inside the matmul.

    model = ezo.models.LeNet5()
    ezo.convert_(model, head=["fc2", "fc3"])
    opt = ezo.ElasticZO(model, lr=1e-4, eps=1e-3, head_lr=0.05)
    loss = opt.train_step(x, y)

Importing the package touches no GPU and no driver.
"""

from . import models, nn, ops, optim, planning
from ._version import __version__
from .nn import convert_, head_parameters, summary, trunk_parameters, unconvert_
from .ops.int8_tensor import Int8Tensor, quantize
from .optim import Diagnostics, ElasticZO, ElasticZOInt8, NodePerturbation, SeedLog, chunked_cross_entropy
from .planning import choose_cut, memory_plan

__all__ = [
    "Diagnostics",
    "ElasticZO",
    "ElasticZOInt8",
    "Int8Tensor",
    "NodePerturbation",
    "SeedLog",
    "__version__",
    "choose_cut",
    "chunked_cross_entropy",
    "convert_",
    "head_parameters",
    "memory_plan",
    "models",
    "nn",
    "ops",
    "optim",
    "planning",
    "quantize",
    "summary",
    "trunk_parameters",
    "unconvert_",
]

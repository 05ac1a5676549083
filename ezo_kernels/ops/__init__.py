"""Pure functions of tensors: noise, perturbed linear, conv and embedding, and the update. They hold no state."""

from . import noise
from ._perturbation import Perturbation
from .conv2d import perturbed_conv1d, perturbed_conv2d
from .cross_entropy import grouped_cross_entropy
from .embedding import perturbed_embedding
from .importance import importance_rows
from .int8_conv2d import int8_conv1d, int8_conv2d
from .int8_head import int8_head_update_
from .int8_linear import int8_linear
from .int8_loss import int8_cross_entropy, int8_cross_entropy_gradient, int8_squared_error
from .int8_matmul import int8_gemm
from .int8_pass import IntegerPerturbation
from .int8_pointwise import int8_add, int8_pool2d, int8_relu, round_shift
from .int8_tensor import Int8Tensor, quantize
from .int8_update import Int8UpdatePlan, int8_update_
from .linear import perturbed_linear
from .node import decorrelated_gradient, output_errors, perturb_outputs
from .noise import Noise, materialize
from .perturb import perturb
from .update import UpdatePlan, update_

__all__ = [
    "Int8Tensor",
    "Int8UpdatePlan",
    "IntegerPerturbation",
    "Noise",
    "Perturbation",
    "UpdatePlan",
    "decorrelated_gradient",
    "grouped_cross_entropy",
    "importance_rows",
    "int8_add",
    "int8_conv1d",
    "int8_conv2d",
    "int8_cross_entropy",
    "int8_cross_entropy_gradient",
    "int8_gemm",
    "int8_head_update_",
    "int8_linear",
    "int8_pool2d",
    "int8_relu",
    "int8_squared_error",
    "int8_update_",
    "materialize",
    "noise",
    "output_errors",
    "perturb",
    "perturb_outputs",
    "perturbed_conv1d",
    "perturbed_conv2d",
    "perturbed_embedding",
    "perturbed_linear",
    "quantize",
    "round_shift",
    "update_",
]

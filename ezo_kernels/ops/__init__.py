"""Pure functions of tensors: noise, perturbed linear, conv and embedding, and the update. They hold no state."""

from . import noise
from ._perturbation import Perturbation
from .conv2d import perturbed_conv1d, perturbed_conv2d
from .embedding import perturbed_embedding
from .linear import perturbed_linear
from .noise import Noise, materialize
from .perturb import perturb
from .update import UpdatePlan, update_

__all__ = [
    "Noise",
    "Perturbation",
    "UpdatePlan",
    "materialize",
    "noise",
    "perturb",
    "perturbed_conv1d",
    "perturbed_conv2d",
    "perturbed_embedding",
    "perturbed_linear",
    "update_",
]

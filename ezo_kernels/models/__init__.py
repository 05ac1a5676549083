"""Small models in plain ``torch.nn``, each readable in one sitting. Nothing here knows of zeroth-order training."""

from .lenet import LeNet5
from .mlp import MLP
from .pointnet import PointNet

__all__ = ["MLP", "LeNet5", "PointNet"]

"""Data from files, what is made of them, and batches. Nothing here is fetched unless asked for.

Images (MNIST, Fashion-MNIST, the digits without any file), upright or rotated; point clouds (drawn from images, ModelNet40);
tables for regression.
"""

from .batches import Batches
from .dataset import Dataset, load, quantize_images, standardize, validation_indices
from .download import DownloadError, download
from .files import cache_dir
from .modelnet import load_modelnet40
from .pointcloud import CloudBatches, augment_cloud, point_clouds
from .regression import Regression, load_regression
from .rotate import rotate_images, rotated

__all__ = [
    "Batches",
    "CloudBatches",
    "Dataset",
    "DownloadError",
    "Regression",
    "augment_cloud",
    "cache_dir",
    "download",
    "load",
    "load_modelnet40",
    "load_regression",
    "point_clouds",
    "quantize_images",
    "rotate_images",
    "rotated",
    "standardize",
    "validation_indices",
]

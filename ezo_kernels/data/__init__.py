"""MNIST and Fashion-MNIST from files, the digits without any, and batches. Nothing here is fetched unless asked for."""

from .batches import Batches
from .dataset import Dataset, load, quantize_images, standardize, validation_indices
from .download import DownloadError, download
from .files import cache_dir

__all__ = [
    "Batches",
    "Dataset",
    "DownloadError",
    "cache_dir",
    "download",
    "load",
    "quantize_images",
    "standardize",
    "validation_indices",
]

"""Optimisers that train converted models, and the baselines they are held against."""

from .elastic_zo import ElasticZO
from .losses import chunked_cross_entropy

__all__ = ["ElasticZO", "chunked_cross_entropy"]

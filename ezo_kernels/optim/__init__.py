"""Optimisers that train converted models, and the baselines they are held against."""

from .elastic_zo import ElasticZO
from .elastic_zo_int8 import ElasticZOInt8
from .int8_state import IntegerSchedule
from .losses import chunked_cross_entropy

__all__ = ["ElasticZO", "ElasticZOInt8", "IntegerSchedule", "chunked_cross_entropy"]

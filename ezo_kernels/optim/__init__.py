"""Optimisers that train converted models, and the baselines they are held against."""

from ..ops.cross_entropy import chunked_cross_entropy
from .diagnostics import Diagnostics
from .elastic_zo import ElasticZO
from .elastic_zo_int8 import ElasticZOInt8
from .findings import Finding, TrainingWarning
from .int8_state import IntegerSchedule
from .nodes import NodePerturbation
from .seed_log import SeedLog

__all__ = [
    "Diagnostics",
    "ElasticZO",
    "ElasticZOInt8",
    "Finding",
    "IntegerSchedule",
    "NodePerturbation",
    "SeedLog",
    "TrainingWarning",
    "chunked_cross_entropy",
]

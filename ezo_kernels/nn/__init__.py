"""Drop-in layers and the conversion of a model."""

from .conv import ZOConv1d, ZOConv2d, conv_pool_relu
from .convert import convert_, head_parameters, trunk_parameters, unconvert_
from .dropout import ZODropout
from .embedding import ZOEmbedding
from .int8_layers import Int8Conv2d, Int8Linear
from .linear import ZOLinear, ZOTransposedLinear, linear_relu
from .summary import summary

__all__ = [
    "Int8Conv2d",
    "Int8Linear",
    "ZOConv1d",
    "ZOConv2d",
    "ZODropout",
    "ZOEmbedding",
    "ZOLinear",
    "ZOTransposedLinear",
    "conv_pool_relu",
    "convert_",
    "head_parameters",
    "linear_relu",
    "summary",
    "trunk_parameters",
    "unconvert_",
]

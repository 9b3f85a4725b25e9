"""Layers whose inputs and weights are quantized, put in place of their floating-point classes."""

from gplq.layers.block import CompensatedBlock, LinearCompensation
from gplq.layers.conv import QuantizedConv2d
from gplq.layers.gelu import RecomputedGELU
from gplq.layers.linear import QuantizedLinear
from gplq.layers.linear_map import LinearMap, WeightView
from gplq.layers.multihead import DecomposedMultiheadAttention

__all__ = [
    'CompensatedBlock',
    'DecomposedMultiheadAttention',
    'LinearCompensation',
    'LinearMap',
    'QuantizedConv2d',
    'QuantizedLinear',
    'RecomputedGELU',
    'WeightView',
]

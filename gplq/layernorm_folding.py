"""Let a LayerNorm divide by the input scales of the layer behind it."""

from __future__ import annotations

import torch
from torch import nn

from gplq.layers import QuantizedLinear
from gplq.record import record_of

__all__ = ['fold_into_layernorms']


@torch.no_grad()
def fold_into_layernorms(model: nn.Module) -> int:
    """Move per-channel input scales into the affine of the LayerNorm in front, exactly.

    Quantizing its output is then rounding alone, with no division a channel. The layer's weight takes the scales in
    turn, so its codes and the function stay. Only LayerNorms that a single layer reads are touched; zeros that are
    padded in between stay zeros.

    Returns:
        How many LayerNorms were changed.
    """
    count = 0
    for norm_name, layer_name in record_of(model).plan.norms:
        norm, layer = model.get_submodule(norm_name), model.get_submodule(layer_name)
        if not isinstance(layer, QuantizedLinear) or not isinstance(norm.weight, nn.Parameter):
            continue
        quantizer, weight = layer.quantization.input, layer.quantization.weight
        if quantizer is None or weight is None or not weight.folded:
            continue
        scale = quantizer.scale
        norm.weight.div_(scale)
        if isinstance(norm.bias, nn.Parameter):
            norm.bias.div_(scale)
        codes = weight.codes(layer.weight, scale)
        quantizer.log_scale.zero_()
        # From the codes, so that a saved file restores these values to the last bit.
        layer.weight.copy_(weight.restore(codes, quantizer.scale))
        count += 1
    return count

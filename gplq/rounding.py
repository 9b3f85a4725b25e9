"""Round one weight in place, with its input's scales folded in."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.layers import LinearMap, WeightView
from gplq.weights import choose_weight_scales

__all__ = ['round_view']


@torch.no_grad()
def round_view(view: WeightView, scheme: str, importance: Tensor | None, matrix: Tensor | None = None) -> None:
    """Choose scales for a weight, round it and write it back; ``matrix`` replaces the present weight."""
    quantizer = view.map.weight
    assert quantizer is not None
    matrix = view.matrix() if matrix is None else matrix
    column_scale = _columns(view.map, matrix.shape[1])
    if view.map.input is not None and view.map.input.offset is not None:
        # The offset's share of the output is a bias: it is taken from the weight before rounding.
        exact = matrix @ (column_scale * view.map.input.offset)
    # The mean square of x-hat, divided by the scale, is that of what the folded column multiplies.
    weighting = None if importance is None else importance / column_scale.square()
    scales = choose_weight_scales(matrix * column_scale, quantizer.spec.bits, scheme, weighting)
    rounded = quantizer.quantize(matrix, column_scale, scales)
    if view.map.input is not None and view.map.input.offset is not None:
        view.map.bias_correction += exact - rounded @ (column_scale * view.map.input.offset)
        view.map.corrected = True
    view.write(rounded)


def _columns(a_map: LinearMap, columns: int) -> Tensor:
    return a_map.column_scale.expand(columns)

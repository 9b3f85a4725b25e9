"""Input scales of a linear layer that suit both sides once they are folded into its weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gplq.functional import dequantize, quantize
from gplq.observers.base import Range, scale_from_range
from gplq.recipe import Recipe
from gplq.spec import FLOAT_BITS, QuantizerSpec
from gplq.weights import choose_weight_scales, restore_weight, round_weight

__all__ = ['InputScale', 'search_input_scale']

# Coarser than the weight stage's own grid: here it only ranks input scales.
_WEIGHT_RATIOS = (1.0, 0.85, 0.7, 0.55)


class InputScale(NamedTuple):
    """What the search settled: scale and offset (in steps) a channel, and the choice itself."""

    scale: Tensor
    offset: Tensor | None
    exponent: float
    clip: float
    balanced: bool


@torch.no_grad()
def search_input_scale(
    vectors: Tensor, seen: Range, weight: Tensor, spec: QuantizerSpec, weight_bits: int, recipe: Recipe
) -> InputScale:
    """Scales ``s_c ~ range_c ** alpha`` of least error of the layer's output with both sides quantized.

    Folding multiplies weight column c by ``s_c``, so per-channel scales (alpha 1) hand the channels' imbalance
    to the weights and one common scale (alpha 0) leaves it with the activations; the search finds the middle.
    With ``recipe.balance`` the scales ``range_c ** alpha / column_c ** (1 - alpha)``, ``column_c`` the largest
    weight of a column, compete too: they do not change when a channel's scale is moved from LayerNorm to weights.

    Args:
        vectors: inputs ``(n, channels)`` of the layer.
        seen: smallest and largest input of each channel.
        weight: ``(rows, channels)``.
        spec: of the input.
        weight_bits: of the weight, 32 to leave it as it is.
        recipe: gives exponents, clips and whether scales are folded.
    """
    widest, _ = scale_from_range(*seen, spec)
    # One that is constant has a scale too, unless it is zero.
    alive = (seen.high > 0) | (seen.low < 0)
    if not bool(alive.any()):
        return InputScale(widest, _offset(seen, widest, spec, 1.0), 1.0, 1.0, False)
    # A dead channel says nothing of its scale; a large one would swamp its row of folded weights.
    widest = torch.where(alive, widest, widest[alive].min())
    columns = weight.abs().amax(dim=0).clamp(min=torch.finfo(torch.float32).eps)
    target = vectors @ weight.t()
    best: InputScale | None = None
    least = float('inf')
    for exponent, balanced in _families(recipe):
        base = widest.pow(exponent)
        if balanced:
            base = base * columns.pow(exponent - 1)
        # The widest channel just fits at clip 1.
        base = base * (widest / base).max()
        for clip in recipe.clips:
            scale = base * clip
            offset = _offset(seen, scale, spec, clip)
            inputs = dequantize(quantize(vectors, scale, spec.qmin, spec.qmax, offset), scale, offset)
            error = float((inputs @ _rounded(weight, scale, weight_bits, recipe).t() - target).square().mean())
            if error < least or best is None:
                least, best = error, InputScale(scale, offset, exponent, clip, balanced)
    assert best is not None
    return best


def _families(recipe: Recipe) -> list[tuple[float, bool]]:
    plain = [(alpha, False) for alpha in recipe.exponents]
    # At alpha 1 both families are the per-channel scale.
    return plain + [(alpha, True) for alpha in recipe.exponents if recipe.balance and alpha < 1]


def _offset(seen: Range, scale: Tensor, spec: QuantizerSpec, clip: float) -> Tensor | None:
    return seen.low.clamp(max=0) * clip / scale - spec.qmin if spec.offset else None


def _rounded(weight: Tensor, scale: Tensor, bits: int, recipe: Recipe) -> Tensor:
    if bits == FLOAT_BITS:
        return weight
    folded = scale if recipe.fold else torch.ones_like(scale)
    matrix = weight * folded
    scales = choose_weight_scales(matrix, bits, 'mse', ratios=_WEIGHT_RATIOS)
    return restore_weight(round_weight(matrix, scales, bits), scales) / folded

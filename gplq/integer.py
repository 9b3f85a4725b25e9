"""Recompute quantized layers and products from integer codes alone: the proof that they can be executed so."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gplq.errors import StageError, TargetError
from gplq.layers import LinearCompensation, QuantizedConv2d, WeightView
from gplq.products import QuantizedProduct
from gplq.spec import FLOAT_BITS

__all__ = [
    'IntegerLinear',
    'check_scales_leave_sum',
    'compensation_from_codes',
    'integer_linear',
    'linear_from_codes',
    'product_from_codes',
]


class IntegerLinear(NamedTuple):
    """A linear map as an integer machine stores it.

    ``y = scale * (codes @ input codes - zero_point * sum of input codes) + bias``, one scale and zero point an
    output channel; everything that came from the input's scales and offsets is inside ``codes`` and ``bias``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor


@torch.no_grad()
def integer_linear(view: WeightView, bias: Tensor | None = None) -> IntegerLinear:
    """Constants of a rounded linear map; ``bias`` stands in for the layer's own where a parent passes one.

    Raises:
        StageError: if the weight is not rounded yet, was changed since, or the input is in floating point.
        TargetError: if scales are not folded, so that no integer product exists.
    """
    quantizer, weight = view.map.input, view.map.weight
    if quantizer is None or weight is None or not weight.enabled or not quantizer.enabled:
        bits = [FLOAT_BITS if part is None else part.spec.bits for part in (weight, quantizer)]
        remedy = (
            'its recipe leaves one of them in floating point, so that it has no integer product'
            if FLOAT_BITS in bits
            else 'run calibrate and quantize_weights'
        )
        raise StageError(f'{view.name} (W{bits[0]}A{bits[1]}): input and weight are not both quantized: {remedy}')
    if not weight.folded and quantizer.scale.numel() > 1:
        raise TargetError(
            f'{view.name}: its input has a scale a channel that is not folded (fold=False); no integer product exists'
        )
    codes = view.codes()
    scale = weight.scale if weight.folded else weight.scale * quantizer.scale.reshape(-1)[0]
    own = view.bias_vector() if bias is None else bias
    total = torch.zeros_like(scale) if own is None else own.to(scale)
    if view.map.corrected:
        total = total + view.map.bias_correction
    if quantizer.offset is not None:
        matrix = view.matrix().to(scale)
        total = total + matrix @ (quantizer.scale * quantizer.offset).expand(matrix.shape[1])
    return IntegerLinear(codes.to(torch.int64), scale, weight.zero_point, total)


@torch.no_grad()
def linear_from_codes(view: WeightView, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Output of a Linear (``(..., in) -> (..., out)``) or Conv2d (NCHW) by an integer product of codes.

    Only the last step, one multiplication and addition an output, is in floating point.
    """
    constants = integer_linear(view, bias)
    assert view.map.input is not None
    parts = view.map.input.parts(x)
    if isinstance(view.owner, QuantizedConv2d):
        return _convolution(view.owner, constants, parts[0].codes)
    scaled = torch.zeros((), dtype=torch.float64)
    for codes, factor in parts:
        integers = codes.to(torch.int64)
        y = (integers @ constants.codes.t()).double()
        if constants.zero_point is not None:
            y = y - integers.sum(-1, keepdim=True) * constants.zero_point.double()
        # A power of two for twin uniform: a shift.
        scaled = scaled + y * factor.double()
    result: Tensor = scaled * constants.scale.double() + constants.bias.double()
    return result.to(x.dtype)


def _convolution(layer: QuantizedConv2d, constants: IntegerLinear, codes: Tensor) -> Tensor:
    # Doubles hold integers to 2**53 exactly, and CPUs have no integer convolution.
    kernel = constants.codes.reshape(layer.weight.shape).double()
    codes = codes.double()
    y = layer._conv_forward(codes, kernel, None)
    if constants.zero_point is not None:
        ones = torch.ones_like(kernel)
        y = y - layer._conv_forward(codes, ones, None) * constants.zero_point.double()[:, None, None]
    y = y * constants.scale.double()[:, None, None] + constants.bias.double()[:, None, None]
    result: Tensor = y.to(layer.weight.dtype)
    return result


@torch.no_grad()
def product_from_codes(
    product: QuantizedProduct,
    left: Tensor,
    right: Tensor,
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """A product from the codes of its operands; scales multiply the result.

    Args:
        product: its quantizers.
        left: ``(..., n, k)``.
        right: ``(..., k, m)``.
        multiply: the model's own operation where that is no matrix product, such as an einsum; its operands have one
            scale each.

    Raises:
        TargetError: if a scale runs along the summed axis, so that it cannot leave the product.
    """
    check_scales_leave_sum(product)
    quantize_left, quantize_right = product.operands
    total = torch.zeros((), dtype=torch.float64)
    for one, by in quantize_left.parts(left):
        for other, times in quantize_right.parts(right):
            integers = multiply(one.to(torch.int64), other.to(torch.int64))
            total = total + integers.double() * by.double() * times.double()
    scale = quantize_left.scale_of(left).double() * quantize_right.scale_of(right).double()
    return (total * scale).to(left.dtype)


def check_scales_leave_sum(product: QuantizedProduct, name: str = 'a product') -> None:
    """Check that codes can be multiplied and the scales applied to the result.

    Raises:
        TargetError: if a scale runs along the axis that is summed.
    """
    for quantizer, axis in zip(product.operands, (-1, -2), strict=True):
        if len(quantizer.shape) >= -axis and quantizer.shape[axis] > 1:
            raise TargetError(f'{name}: a scale of shape {quantizer.shape} runs along the summed axis')


@torch.no_grad()
def compensation_from_codes(layer: LinearCompensation, x: Tensor) -> Tensor:
    """A block's compensation from the codes of its input and matrix."""
    y = layer.input.codes(x).to(torch.int64) @ layer.codes.to(torch.int64)
    return (y.double() * layer.scale.double() + layer.bias.double()).to(x.dtype)

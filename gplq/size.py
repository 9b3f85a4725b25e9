"""Bytes that a model takes when every quantized weight is packed."""

from __future__ import annotations

from torch import nn

from gplq.layers import CompensatedBlock, LinearCompensation, LinearMap, WeightView
from gplq.packing import packed_bytes
from gplq.quantizer import Quantizer
from gplq.record import is_prepared, weight_views
from gplq.spec import FLOAT_BITS

__all__ = ['effective_bits', 'float_bytes', 'packed_model_bytes', 'view_bytes']


def float_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in the FP32 model (its quantizers' own not counted)."""
    own = _quantizer_tensors(model)
    total: int = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in own
    )
    return total


def packed_model_bytes(model: nn.Module, part: nn.Module | None = None) -> int:
    """Bytes with weights at their planned bits, scales, corrections and compensation included.

    Args:
        model: prepared, or plain FP32.
        part: count only this submodule of it.
    """
    part = model if part is None else part
    total: int = sum(t.numel() * t.element_size() for t in part.state_dict(keep_vars=True).values())
    if not is_prepared(model):
        return total
    inside = {id(module) for module in part.modules()}
    for plan, view in weight_views(model):
        if plan.weight_bits != FLOAT_BITS and id(view.owner) in inside:
            matrix = view.matrix()
            total += packed_bytes(matrix.numel(), plan.weight_bits) - matrix.numel() * matrix.element_size()
    for module in part.modules():
        if isinstance(module, CompensatedBlock):
            count = module.compensation.codes.numel()
            total += packed_bytes(count, module.compensation.bits) - count
    return total


def view_bytes(view: WeightView, bits: int) -> int:
    """Bytes of one weight at ``bits`` with its scales."""
    matrix = view.matrix()
    if bits == FLOAT_BITS:
        return matrix.numel() * matrix.element_size()
    per_row = 4 * (2 if view.map.weight is not None and view.map.weight.zero_point is not None else 1)
    return packed_bytes(matrix.numel(), bits) + per_row * matrix.shape[0]


def effective_bits(model: nn.Module) -> float:
    """Mean bits of the targeted weights, 8-bit layers and compensation counted; 32 where nothing is quantized."""
    bits = weights = 0
    for plan, view in weight_views(model) if is_prepared(model) else ():
        count = view.matrix().numel()
        weights += count
        bits += count * plan.weight_bits
    for module in model.modules():
        if isinstance(module, CompensatedBlock):
            bits += module.compensation.codes.numel() * module.compensation.bits
    return bits / weights if weights else float(FLOAT_BITS)


def _quantizer_tensors(model: nn.Module) -> set[str]:
    own = (LinearMap, LinearCompensation, Quantizer)
    return {
        f'{name}.{key}'
        for name, module in model.named_modules()
        if isinstance(module, own)
        for key in module.state_dict()
    }

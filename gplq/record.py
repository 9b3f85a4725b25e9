"""What GPLQ remembers of a model that it prepared: the plan and how far the work has come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum

from torch import nn

from gplq.errors import StageError
from gplq.layers import DecomposedMultiheadAttention, LinearMap, WeightView
from gplq.plan import MapPlan, Plan
from gplq.products import QuantizedProduct
from gplq.quantizer import Quantizer

__all__ = [
    'Record',
    'Stage',
    'as_meant',
    'floating_point',
    'forget',
    'is_prepared',
    'map_of',
    'named_products',
    'named_quantizers',
    'product_of',
    'record_of',
    'scale_parameters',
    'set_record',
    'weight_views',
]

_ATTRIBUTE = 'gplq_record'


class Stage(str, Enum):
    """How far a model has come; each stage needs the one before."""

    PREPARED = 'prepared'
    CALIBRATED = 'calibrated'
    QUANTIZED = 'quantized'


@dataclass
class Record:
    """Hangs on the model's root; deep copies carry their own."""

    plan: Plan
    stage: Stage
    # Whether the activation stage has trained since they were calibrated: what the model computes with its activations
    # quantized is then what it is meant to compute.
    trained: bool = False


def set_record(model: nn.Module, record: Record) -> None:
    """Attach ``record`` to ``model``."""
    setattr(model, _ATTRIBUTE, record)


def is_prepared(model: nn.Module) -> bool:
    """Whether :func:`gplq.prepare` or :func:`gplq.load` has seen this very module."""
    return isinstance(getattr(model, _ATTRIBUTE, None), Record)


def record_of(model: nn.Module, *stages: Stage) -> Record:
    """The model's record.

    Raises:
        StageError: if the model was not prepared, or is in none of ``stages`` where any are named.
    """
    record = getattr(model, _ATTRIBUTE, None)
    if not isinstance(record, Record):
        raise StageError(f'{type(model).__name__} is not prepared: call gplq.prepare(model, recipe, example) first')
    if stages and record.stage not in stages:
        wanted = ' or '.join(stage.value for stage in stages)
        raise StageError(f'{type(model).__name__} is {record.stage.value}, this needs a model that is {wanted}')
    return record


def forget(model: nn.Module, name: str) -> None:
    """Take a submodule out of the plan, because a floating-point one has taken its place."""
    record = record_of(model)

    def kept(other: str) -> bool:
        return other != name and not other.startswith(f'{name}.')

    plan = record.plan
    record.plan = replace(
        plan,
        maps=tuple(a_map for a_map in plan.maps if kept(a_map.name)),
        products=tuple(product for product in plan.products if kept(product.owner)),
        owners=tuple(owner for owner in plan.owners if kept(owner.name)),
        multiheads=tuple(filter(kept, plan.multiheads)),
        blocks=tuple(filter(kept, plan.blocks)),
        norms=tuple(pair for pair in plan.norms if all(map(kept, pair))),
    )


def map_of(model: nn.Module, plan: MapPlan) -> LinearMap:
    """The linear map that ``plan`` describes."""
    a_map = getattr(model.get_submodule(plan.name), plan.attribute)
    assert isinstance(a_map, LinearMap)
    return a_map


def weight_views(model: nn.Module) -> Iterator[tuple[MapPlan, WeightView]]:
    """Every linear map of the plan with the place of its weight, in the order of the forward pass."""
    for plan in record_of(model).plan.maps:
        owner = model.get_submodule(plan.name)
        a_map = map_of(model, plan)
        if not isinstance(owner, DecomposedMultiheadAttention):
            yield plan, WeightView(plan.name, owner, a_map)
            continue
        part = ('query', 'key', 'value').index(plan.kind)
        name = f'{plan.name}.{plan.kind}'
        if owner._qkv_same_embed_dim:
            parameter, first, rows = 'in_proj_weight', part * plan.rows, plan.rows
        else:
            parameter, first, rows = f'{plan.kind[0]}_proj_weight', 0, plan.rows
        yield plan, WeightView(name, owner, a_map, parameter, 'in_proj_bias', first, rows)


def named_products(model: nn.Module) -> Iterator[tuple[str, QuantizedProduct]]:
    """Every quantized product, named by its owner and index."""
    for plan in record_of(model).plan.products:
        yield f'{plan.owner}:{plan.index}', product_of(model.get_submodule(plan.owner), plan.index)


def product_of(owner: nn.Module, index: int) -> QuantizedProduct:
    """The quantized product that is the ``index``-th of its owner's forward."""
    products = (p for p in owner.quantized_products if isinstance(p, QuantizedProduct))  # type: ignore[union-attr]
    return next(p for p in products if p.index == index)


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every activation quantizer; names as :meth:`gplq.plan.Plan.with_signs` takes them."""
    for plan in record_of(model).plan.maps:
        quantizer = map_of(model, plan).input
        if quantizer is not None:
            yield f'{plan.name}:{plan.kind}', quantizer
    for name, product in named_products(model):
        for site, quantizer in zip(product.sites, product.operands, strict=True):
            yield f'{name}:{site}', quantizer


def scale_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every scale and offset that learns, of activations and of weights."""
    parameters = [p for _, q in named_quantizers(model) for p in q.parameters()]
    weights = (view.map.weight for _, view in weight_views(model))
    return parameters + [q.log_scale for q in weights if q is not None and q.log_scale is not None]


@contextmanager
def floating_point(model: nn.Module) -> Iterator[None]:
    """Switch every quantizer off; with weights not yet rounded the model is its FP32 self."""
    quantizers = [q for _, q in named_quantizers(model)]
    enabled = [q.enabled for q in quantizers]
    weights = [q for q in (view.map.weight for _, view in weight_views(model)) if q is not None]
    learning = [q.learning for q in weights]
    for quantizer in quantizers:
        quantizer.enabled = False
    for weight in weights:
        weight.learning = False
    try:
        yield
    finally:
        for quantizer, state in zip(quantizers, enabled, strict=True):
            quantizer.enabled = state
        for weight, state in zip(weights, learning, strict=True):
            weight.learning = state


def as_meant(model: nn.Module) -> AbstractContextManager[None]:
    """The model as it is meant to be before its weights are rounded.

    That is in floating point, or with its activations quantized where they were trained to be.
    """
    return nullcontext() if record_of(model).trained else floating_point(model)

"""Put a plan into a model: swap classes in place and give them quantizers."""

from __future__ import annotations

import torch
from torch import nn

from gplq.errors import CheckpointError, StageError
from gplq.layers import DecomposedMultiheadAttention, LinearMap, QuantizedConv2d, QuantizedLinear, RecomputedGELU
from gplq.plan import MapPlan, OperandPlan, OwnerPlan, Plan
from gplq.products import ProductOwner, QuantizedProduct
from gplq.quantizer import Quantizer
from gplq.record import Record, Stage, is_prepared, set_record
from gplq.row_quantizer import RowQuantizer
from gplq.spec import FLOAT_BITS
from gplq.swap import swap_class
from gplq.two_part import TwoPartQuantizer
from gplq.weights import WeightQuantizer

__all__ = ['insert']


def insert(model: nn.Module, plan: Plan) -> None:
    """Give ``model`` everything that ``plan`` names; quantizers start switched off.

    Raises:
        StageError: if the model is prepared already.
        CheckpointError: if the plan names modules that the model does not have.
    """
    if is_prepared(model):
        raise StageError(f'{type(model).__name__} is prepared already; start from a fresh model')
    strays = {product.owner for product in plan.products} - {owner.name for owner in plan.owners}
    if strays:
        raise CheckpointError(f'the plan has products of {sorted(strays)[0]!r}, which is not among its owners')
    for name in plan.multiheads:
        swap_class(_find(model, name, nn.MultiheadAttention), DecomposedMultiheadAttention)
    for a_map in plan.maps:
        _insert_map(model, a_map, plan)
    for owner in plan.owners:
        _insert_owner(model, owner, plan)
    for module in model.modules():
        if type(module) is nn.GELU:
            module.__class__ = RecomputedGELU
        if isinstance(module, nn.TransformerEncoderLayer):
            # In inference torch would run the layer as one kernel on the raw weights; this tells it not to.
            module.activation_relu_or_gelu = 0
    set_record(model, Record(plan, Stage.PREPARED))


def _insert_map(model: nn.Module, plan: MapPlan, whole: Plan) -> None:
    kind = {'linear': nn.Linear, 'conv2d': nn.Conv2d}.get(plan.kind, nn.MultiheadAttention)
    module = _find(model, plan.name, kind)
    weight = None
    if plan.weight_bits != FLOAT_BITS:
        recipe = whole.recipe
        weight = WeightQuantizer(
            plan.weight_bits,
            plan.rows,
            asymmetric=recipe.weight_scheme == 'percentile_asymmetric',
            folded=recipe.fold,
            learned=recipe.trained_steps if recipe.train_weights else None,
        )
    a_map = LinearMap(None if plan.input is None else _quantizer(plan.input), weight, plan.rows)
    a_map.to(_device(module))
    if isinstance(module, nn.Linear):
        swap_class(module, QuantizedLinear)
        module.quantization = a_map
    elif isinstance(module, nn.Conv2d):
        swap_class(module, QuantizedConv2d)
        module.quantization = a_map
    else:
        module.add_module(f'{plan.kind}_map', a_map)


def _insert_owner(model: nn.Module, plan: OwnerPlan, whole: Plan) -> None:
    owner = _find(model, plan.name, nn.Module)
    products = nn.ModuleList()
    for product in whole.products:
        if product.owner == plan.name:
            sites = (product.left.site, product.right.site)
            operands = (_quantizer(product.left), _quantizer(product.right))
            products.append(QuantizedProduct(product.index, sites, operands))
    products.to(_device(owner))
    swap_class(owner, ProductOwner)
    assert isinstance(owner, ProductOwner)
    owner.quantized_products = products
    owner.product_calls = plan.product_calls
    owner.functional_linears = plan.functional_linears
    owner.owner_name = plan.name


def _quantizer(plan: OperandPlan) -> Quantizer:
    kinds = {'uniform': Quantizer, 'row': RowQuantizer, 'column': RowQuantizer}
    return kinds.get(plan.spec.scheme, TwoPartQuantizer)(plan.spec, plan.shape, plan.merged_heads)


def _find(model: nn.Module, name: str, kind: type[nn.Module]) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, kind):
        found = 'is missing' if module is None else f'is a {type(module).__name__}'
        raise CheckpointError(
            f'the plan quantizes {name!r} as a {kind.__name__}, but in this {type(model).__name__} it {found}: '
            'the file belongs to another architecture'
        )
    return module


def _device(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return torch.device('cpu') if parameter is None else parameter.device

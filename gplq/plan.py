"""Which sites of a model are quantized and how: plain data, made once, saved with the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from gplq.errors import CheckpointError
from gplq.recipe import Recipe
from gplq.spec import QuantizerSpec, check_bits

__all__ = ['NOT_RUN', 'Floating', 'MapPlan', 'OperandPlan', 'OwnerPlan', 'Plan', 'ProductPlan']

# No published backbone comes near; a file that says more is damaged or hostile.
MAX_SITES = 100_000
MAX_DIMENSION = 2**24


@dataclass(frozen=True)
class OperandPlan:
    """One quantizer: site name, spec, shape of its scale, heads merged into the batch (0: none)."""

    site: str
    spec: QuantizerSpec
    shape: tuple[int, ...]
    merged_heads: int = 0


@dataclass(frozen=True)
class MapPlan:
    """A linear map: the module that holds the weight, which part of it, its input and its weight.

    ``kind`` is ``'linear'``, ``'conv2d'``, or ``'query'``, ``'key'``, ``'value'`` for the input projections of
    ``nn.MultiheadAttention``. ``weight_bits`` is 32 where the weight stays in floating point.
    """

    name: str
    kind: str
    input: OperandPlan | None
    weight_bits: int
    rows: int
    multiplications: int

    @property
    def attribute(self) -> str:
        """Under which name the module holds it."""
        return 'quantization' if self.kind in ('linear', 'conv2d') else f'{self.kind}_map'


@dataclass(frozen=True)
class ProductPlan:
    """The ``index``-th product of a module's forward and its two operands."""

    owner: str
    index: int
    left: OperandPlan
    right: OperandPlan
    multiplications: int


@dataclass(frozen=True)
class OwnerPlan:
    """A module whose forward is watched: how many products it computes, which children it calls functionally."""

    name: str
    product_calls: int
    functional_linears: tuple[str, ...]


# Ends the reason of a layer whose multiplications nobody knows.
NOT_RUN = 'it did not run in the example, so its multiplications are not counted'


@dataclass(frozen=True)
class Floating:
    """A layer or product that stays in floating point, and why; the root's name is ``''``."""

    name: str
    what: str
    reason: str
    multiplications: int


@dataclass(frozen=True)
class Plan:
    """All decisions about one model; ``norms`` pairs each LayerNorm with the one layer that reads it."""

    recipe: Recipe
    maps: tuple[MapPlan, ...] = ()
    products: tuple[ProductPlan, ...] = ()
    owners: tuple[OwnerPlan, ...] = ()
    floating: tuple[Floating, ...] = ()
    blocks: tuple[str, ...] = ()
    multiheads: tuple[str, ...] = ()
    norms: tuple[tuple[str, str], ...] = ()

    def block_of(self, a_map: MapPlan) -> str | None:
        """The block that a map lies in, None outside of all."""
        return next((name for name in self.blocks if a_map.name.startswith(f'{name}.')), None)

    def operands(self) -> dict[str, OperandPlan]:
        """Every quantizer by name, as ``named_quantizers`` gives them."""
        named = {f'{m.name}:{m.kind}': m.input for m in self.maps if m.input is not None}
        for product in self.products:
            for operand in (product.left, product.right):
                named[f'{product.owner}:{product.index}:{operand.site}'] = operand
        return named

    def with_signs(self, signs: dict[str, bool]) -> Plan:
        """The plan with the signs that calibration settled, by quantizer name (see ``named_quantizers``)."""

        def settle(name: str, operand: OperandPlan) -> OperandPlan:
            if name not in signs:
                return operand
            return replace(operand, spec=replace(operand.spec, signed=signs[name]))

        maps = tuple(
            m if m.input is None else replace(m, input=settle(f'{m.name}:{m.kind}', m.input)) for m in self.maps
        )
        products = tuple(
            replace(
                p,
                left=settle(f'{p.owner}:{p.index}:{p.left.site}', p.left),
                right=settle(f'{p.owner}:{p.index}:{p.right.site}', p.right),
            )
            for p in self.products
        )
        return replace(self, maps=maps, products=products)

    def to_json(self) -> str:
        """One line of JSON."""
        values = asdict(self)
        values['recipe'] = self.recipe.to_dict()
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of :meth:`to_json`, for text from files that nobody vouches for.

        Raises:
            CheckpointError: if the text is not a plan.
            RecipeError: if its recipe is not supported.
        """
        try:
            values = json.loads(text)
            recipe = Recipe.from_dict(values['recipe'])
            plan = cls(
                recipe=recipe,
                maps=tuple(_map(m) for m in _list(values['maps'])),
                products=tuple(_product(p) for p in _list(values['products'])),
                owners=tuple(
                    OwnerPlan(
                        _text(o['name']),
                        _count(o['product_calls']),
                        tuple(_text(n) for n in _list(o['functional_linears'])),
                    )
                    for o in _list(values['owners'])
                ),
                floating=tuple(
                    Floating(_text(f['name']), _text(f['what']), _text(f['reason']), _count(f['multiplications']))
                    for f in _list(values['floating'])
                ),
                blocks=tuple(_text(b) for b in _list(values['blocks'])),
                multiheads=tuple(_text(m) for m in _list(values['multiheads'])),
                norms=tuple((_text(pair[0]), _text(pair[1])) for pair in _list(values['norms'])),
            )
        except CheckpointError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
            raise CheckpointError(f'the quantization plan is damaged ({type(error).__name__}: {error})') from None
        except json.JSONDecodeError as error:
            raise CheckpointError(f'the quantization plan is not JSON: {error}') from None
        return plan


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_SITES:
        raise CheckpointError(f'the quantization plan holds {type(value).__name__} where a list is due')
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise CheckpointError(f'the quantization plan holds {value!r:.60} where a name is due')
    return value


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
        raise CheckpointError(f'the quantization plan holds {value!r:.60} where a count is due')
    return value


def _size(value: Any) -> int:
    if _count(value) > MAX_DIMENSION:
        raise CheckpointError(f'the quantization plan holds the size {value}: more than {MAX_DIMENSION}')
    return int(value)


def _operand(values: Any) -> OperandPlan:
    spec = values['spec']
    if spec['signed'] not in (None, True, False) or not isinstance(spec['offset'], bool):
        raise CheckpointError(f'the quantization plan holds the spec {spec!r:.100}')
    site = _text(values['site'])
    if not site.isidentifier():
        raise CheckpointError(f'the quantization plan holds {site!r:.60} where a site is due')
    return OperandPlan(
        site=site,
        spec=QuantizerSpec(
            bits=spec['bits'],
            signed=spec['signed'],
            granularity=spec['granularity'],
            offset=spec['offset'],
            scheme=spec['scheme'],
        ),
        shape=tuple(_size(n) for n in _list(values['shape'])),
        merged_heads=_size(values['merged_heads']),
    )


def _map(values: Any) -> MapPlan:
    return MapPlan(
        name=_text(values['name']),
        kind=_text(values['kind']),
        input=None if values['input'] is None else _operand(values['input']),
        weight_bits=check_bits(values['weight_bits'], 'weight_bits', allow_float=True),
        rows=_size(values['rows']),
        multiplications=_count(values['multiplications']),
    )


def _product(values: Any) -> ProductPlan:
    left, right = _operand(values['left']), _operand(values['right'])
    if left.site == right.site:
        raise CheckpointError(f'the quantization plan holds a product of {left.site!r:.60} with itself')
    return ProductPlan(
        owner=_text(values['owner']),
        index=_count(values['index']),
        left=left,
        right=right,
        multiplications=_count(values['multiplications']),
    )

"""All decisions about one model."""

from __future__ import annotations

import re
from collections import defaultdict

from torch import nn

from gplq.errors import RecipeError
from gplq.plan import Floating, MapPlan, Plan
from gplq.planning.example import Example
from gplq.planning.layers import LayerPlanner
from gplq.planning.products import ProductPlanner
from gplq.products import ProductOwner

__all__ = ['make_plan']


def make_plan(example: Example) -> Plan:
    """Decide what is quantized how.

    Raises:
        TargetError: if a targeted layer never ran.
        ProductError: if an attention module's products cannot be found.
        RecipeError: if the recipe's compensation does not fit the model's blocks.
    """
    layers, products = LayerPlanner(example), ProductPlanner(example)
    maps = layers.plan()
    owners, found = products.plan()
    return Plan(
        recipe=example.recipe,
        maps=tuple(maps),
        products=tuple(found),
        owners=tuple(owners),
        floating=(*layers.floating, *products.floating, *_by_design(example)),
        blocks=tuple(_blocks(example, {p.owner for p in found}, maps)),
        multiheads=example.targets.multiheads,
        norms=tuple(_norms(example, maps)),
    )


def _blocks(example: Example, owners: set[str], maps: list[MapPlan]) -> list[str]:
    """Innermost members of a list that map tokens to as many, and hold an attention; in running order."""
    found: list[str] = []
    for name in dict.fromkeys(example.trace.ran):
        parent = example.modules.get(name.rpartition('.')[0]) if name else None
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)) or name not in example.trace.blocks:
            continue
        if example.trace.ran.count(name) == 1 and any(o == name or o.startswith(name + '.') for o in owners):
            found.append(name)
    innermost = [n for n in found if not any(other.startswith(n + '.') for other in found)]
    tokens = [name for name in innermost if _channels_last(example, name, maps)]
    if example.recipe.compensation == 'qwt' and innermost and not tokens:
        raise RecipeError(
            f"compensation='qwt' needs blocks of tokens (..., channels); those of {type(example.model).__name__}, "
            f"such as {innermost[0]}, run on feature maps (channels, height, width): use 'ridge' or 'affine'"
        )
    return tokens


def _channels_last(example: Example, block: str, maps: list[MapPlan]) -> bool:
    """Whether the last axis of a block's input is that of its channels, and no other could be."""
    shape = example.trace.blocks[block]
    layers = [example.modules[m.name] for m in maps if m.name.startswith(f'{block}.')]
    width = next((layer.in_features for layer in layers if isinstance(layer, nn.Linear)), None)
    return shape[-1] == width and (len(shape) < 4 or shape[1] != width)


def _norms(example: Example, maps: list[MapPlan]) -> list[tuple[str, str]]:
    """LayerNorms that one layer alone reads, with that layer: its input scales can move into them."""
    readers: dict[str, set[str]] = defaultdict(set)
    sources: dict[str, set[str]] = defaultdict(set)
    for call in example.trace.linears:
        readers[call.norm].add(call.layer)
        sources[call.layer].add(call.norm)
    pairs = []
    for a_map in maps:
        norm = next(iter(sources[a_map.name]), '')
        alone = norm and sources[a_map.name] == {norm} and readers[norm] == {a_map.name}
        foldable = a_map.kind == 'linear' and a_map.input is not None
        # What a classifier reads is what others take for the model's features.
        final = a_map.name in example.trace.final_layers
        if alone and foldable and not final and norm not in example.trace.shared_norms:
            pairs.append((norm, a_map.name))
    return pairs


def _by_design(example: Example) -> list[Floating]:
    counts: dict[str, int] = defaultdict(int)
    for name in dict.fromkeys(example.trace.ran):
        module = example.modules[name]
        if not list(module.children()) and not isinstance(
            module, (nn.Linear, nn.Conv2d, nn.Dropout, nn.Identity, nn.Flatten, ProductOwner)
        ):
            kind = type(module).__name__
            if re.search('norm|act|gelu|relu|softmax|silu', kind, re.I):
                counts[kind] += 1
    return [Floating(f'{n} x {kind}', kind, 'floating point by design', 0) for kind, n in counts.items()]

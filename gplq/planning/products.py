"""Which products of activations are quantized how, and why the others are not."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace

from torch import nn

from gplq.errors import ProductError, TargetError
from gplq.plan import Floating, OperandPlan, OwnerPlan, ProductPlan
from gplq.planning.example import Example
from gplq.spec import FLOAT_BITS, QuantizerSpec, Scheme
from gplq.trace import ProductCall, SoftmaxCall

__all__ = ['ProductPlanner']

_HEADS = ('num_heads', 'n_heads', 'heads', 'nhead', 'num_attention_heads')


@dataclass(frozen=True)
class _Role:
    """What a product is: ``'query_key'`` or ``'attention_value'``, and whether the attention map is on the right."""

    kind: str
    attention_right: bool = False


class ProductPlanner:
    """Plans the products around every softmax; :attr:`floating` fills with the others."""

    def __init__(self, example: Example) -> None:
        self.recipe, self.targets, self.trace = example.recipe, example.targets, example.trace
        self.modules = example.modules
        self.floating: list[Floating] = []
        self.owner_products: dict[str, list[int]] = {}

    def plan(self) -> tuple[list[OwnerPlan], list[ProductPlan]]:
        """Modules whose forward must be watched, and their products; call it once.

        Raises:
            ProductError: if a targeted attention's products cannot be found.
            TargetError: if a module uses the weight of a targeted layer that is not its child.
        """
        roles = self._roles()
        owners = self._owners(roles)
        products = self._products(roles)
        self._check_attention(roles)
        self.floating += self._others()
        return owners, products

    def _roles(self) -> dict[int, _Role]:
        """QK has the softmax's size and goes into it; PV reads what comes out (DESIGN: attention by interception)."""
        roles: dict[int, _Role] = {}
        for number, softmax in enumerate(self.trace.softmaxes):
            near = self._products_before(softmax)
            fitting = [i for i in near if self.trace.products[i].output_numel == softmax.numel]
            # A pooling attention's query is learned, so its only product has a constant side; where there is
            # another, the constant one is a relative position.
            for index in [i for i in fitting if not self.trace.products[i].constant] or fitting:
                roles[index] = _Role('query_key')
            for index, call in enumerate(self.trace.products):
                if number in call.left_softmaxes | call.right_softmaxes and not call.constant:
                    roles[index] = _Role('attention_value', number in call.right_softmaxes)
        return roles

    def _products_before(self, softmax: SoftmaxCall) -> list[int]:
        """Products that went into a softmax within the same attention, not by way of earlier blocks."""
        running = set(softmax.stack)

        def near(call: ProductCall) -> bool:
            # The module itself, or its parent where a product is a module of its own.
            return call.stack[-1:] == ('',) or any(name in running for name in call.stack[-2:] if name)

        return [index for index in sorted(softmax.products) if near(self.trace.products[index])]

    def _owners(self, roles: dict[int, _Role]) -> list[OwnerPlan]:
        """Modules whose forward must be watched, with the products each one's mode will count."""
        functional: dict[str, list[str]] = defaultdict(list)
        for call in self.trace.linears:
            module = self.modules.get(call.layer)
            if call.layer in self.targets.layers and isinstance(module, nn.Linear) and call.owner != call.layer:
                prefix = f'{call.owner}.' if call.owner else ''
                if not call.layer.startswith(prefix):
                    raise TargetError(
                        f'{call.owner} uses the weight of {call.layer}, which is not its child: name it in skip'
                    )
                functional[call.owner].append(call.layer[len(prefix) :])
        names = {self.trace.products[index].stack[-1] for index in roles}
        names = {name for name in names if self.targets.covers(name)} | set(functional)
        counted: dict[str, list[int]] = {name: [] for name in names}
        for index, product in enumerate(self.trace.products):
            nearest = next((name for name in reversed(product.stack) if name in names), None)
            if nearest is not None:
                counted[nearest].append(index)
        self.owner_products = counted
        runs = {name: max(1, self.trace.ran.count(name)) for name in names}
        for name, indexes in counted.items():
            if len(indexes) % runs[name]:
                raise ProductError(f'{name}: its {runs[name]} runs in the example computed different products')
        order = {name: position for position, name in enumerate(self.modules)}
        return [
            OwnerPlan(name, len(counted[name]) // runs[name], tuple(dict.fromkeys(functional[name])))
            for name in sorted(names, key=order.__getitem__)
        ]

    def _products(self, roles: dict[int, _Role]) -> list[ProductPlan]:
        place = {
            index: (owner, position)
            for owner, indexes in self.owner_products.items()
            for position, index in enumerate(indexes[: len(indexes) // max(1, self.trace.ran.count(owner))])
        }
        plans: list[ProductPlan] = []
        for index, call in enumerate(self.trace.products):
            role = roles.get(index)
            name = _innermost(call.stack)
            reason = None
            if call.constant and role is None:
                reason = 'one operand follows from parameters alone, such as relative positions'
            elif role is None:
                reason = 'neither feeds a softmax nor reads one'
            elif not self.targets.covers(name):
                reason = 'outside targets or named in skip'
            elif self.recipe.activation_bits == FLOAT_BITS:
                reason = 'activations stay in floating point'
            if reason is not None or role is None:
                self.floating.append(Floating(name, 'product', reason or '', call.multiplications))
            elif index in place:
                plans.append(self._product(call, role, *place[index]))
        return plans

    def _product(self, call: ProductCall, role: _Role, owner: str, position: int) -> ProductPlan:
        module = self.modules[owner]
        bits = self.recipe.activation_bits
        if role.kind == 'query_key':
            left = _operand('query', QuantizerSpec(bits, True, 'head'), call.left_shape, module, call)
            right = _operand('key', QuantizerSpec(bits, True, 'head'), call.right_shape, module, call)
        else:
            attention = QuantizerSpec(bits, None, 'head', scheme=self._map_scheme(call, role))
            value = QuantizerSpec(bits, True, 'head')
            if role.attention_right:
                left = _operand('value', value, call.left_shape, module, call)
                right = _operand('attention_map', attention, call.right_shape, module, call)
            else:
                left = _operand('attention_map', attention, call.left_shape, module, call)
                right = _operand('value', value, call.right_shape, module, call)
                if not call.einsum and _columns_are_channels(module, call):
                    right = _per_channel(right, call.right_shape[-1])
        return ProductPlan(owner, position, left, right, call.multiplications)

    def _map_scheme(self, call: ProductCall, role: _Role) -> Scheme:
        scheme = self.recipe.attention_map
        if scheme != 'row':
            return scheme
        if call.einsum:
            return 'uniform'
        return 'column' if role.attention_right else 'row'

    def _check_attention(self, roles: dict[int, _Role]) -> None:
        for name, why in self.trace.opaque.items():
            if self.targets.covers(name):
                raise ProductError(f"{name}: {why} hides its products; name it in skip=('{name}',) to leave it out")
        for number, softmax in enumerate(self.trace.softmaxes):
            name = _innermost(softmax.stack)
            reads = any(number in (c.left_softmaxes | c.right_softmaxes) for c in self.trace.products)
            feeds = any(roles.get(i, _Role('')).kind == 'query_key' for i in softmax.products)
            if not self._products_before(softmax) and softmax.layers:
                # Outlook and factorized attention: the map comes straight from a layer, there is no such product.
                feeds = reads
            if not reads and not feeds and softmax.mixed and self.targets.covers(name):
                raise ProductError(
                    f'{name or "the model"}: its softmax reads activations multiplied in a way that is no matrix '
                    f"product, and cannot be quantized; name it in skip=('{name}',) to leave it out"
                )
            if reads != feeds and self.targets.covers(name):
                missing = 'query-key' if reads else 'attention-value'
                raise ProductError(
                    f'{name}: the {missing} product of its softmax cannot be found; '
                    f'name the attention module in skip to leave it out'
                )
        for name, module in self.modules.items():
            if not self.targets.covers(name) or name not in self.trace.ran:
                continue
            projections = [c for c in module.children() if isinstance(c, nn.Linear)]
            if re.search('attention|attn', type(module).__name__, re.I) and len(projections) >= 2:
                stacks = [c.stack for c in self.trace.products] + [c.stack for c in self.trace.softmaxes]
                if not any(name in stack for stack in stacks):
                    raise ProductError(
                        f'{name}: no product or softmax of this {type(module).__name__} was seen, it may run in a '
                        f"custom kernel; name it in skip=('{name}',) to leave it out"
                    )

    def _others(self) -> list[Floating]:
        """Functions that multiply without being a layer or a product of two activations."""
        found: dict[tuple[str, str, str], int] = defaultdict(int)
        for call in self.trace.others:
            reason = 'no product of two activations'
            if call.by_parameter:
                reason = 'one operand is a parameter of no layer'
            elif call.by_softmax:
                reason = 'weights values by a softmax one by one, not as a matrix product'
            found[_innermost(call.stack), call.function, reason] += call.multiplications
        return [Floating(name, what, reason, count) for (name, what, reason), count in found.items()]


def _innermost(stack: tuple[str, ...]) -> str:
    """The module whose forward was running, ``''`` for the root."""
    return stack[-1] if stack else ''


def _heads(owner: nn.Module) -> int:
    """How many heads a module says it has, 1 if it says nothing."""
    return next((h for a in _HEADS if isinstance(h := getattr(owner, a, None), int) and h > 1), 1)


def _operand(
    site: str, spec: QuantizerSpec, shape: tuple[int, ...], owner: nn.Module, call: ProductCall
) -> OperandPlan:
    """One scale a head where the head's axis is certain, else one in all."""
    heads = _heads(owner)
    batch = shape[:-2]
    axes = [axis for axis, size in enumerate(batch) if axis > 0 and size == heads]
    if not call.einsum and heads > 1:
        if len(axes) == 1:
            return OperandPlan(site, spec, (heads,) + (1,) * (len(shape) - axes[0] - 1))
        if not axes and len(batch) == 1 and call.merged == heads:
            return OperandPlan(site, spec, (heads, 1, 1), merged_heads=heads)
    return OperandPlan(site, replace(spec, granularity='tensor'), (1,))


def _per_channel(operand: OperandPlan, channels: int) -> OperandPlan:
    """One scale a head and output column; columns leave the product, so this stays executable."""
    shape = (*operand.shape[:-1], channels)
    spec = QuantizerSpec(operand.spec.bits, operand.spec.signed, 'channel')
    return OperandPlan(operand.site, spec, shape, operand.merged_heads)


def _columns_are_channels(owner: nn.Module, call: ProductCall) -> bool:
    """Whether the value's columns are channels, fixed by the architecture, and not tokens as in XCiT."""
    heads = _heads(owner)
    widths = {w for c in owner.children() if isinstance(c, nn.Linear) for w in (c.in_features, c.out_features)}
    if isinstance(owner, nn.MultiheadAttention):
        return True
    rows, columns = call.right_shape[-2:]
    if columns * heads not in widths:
        return False
    # Where there happen to be as many tokens as channels in a head, sizes cannot tell.
    return rows * heads not in widths or call.right_adjacent

"""Find what can be quantized by running an example, decide how, and put the quantizers in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gplq.errors import CalibrationError, ProductError, RecipeError, StageError, TargetError
from gplq.insert import insert
from gplq.layers import DecomposedMultiheadAttention
from gplq.plan import NOT_RUN, Floating, MapPlan, OperandPlan, OwnerPlan, Plan, ProductPlan
from gplq.products import ProductOwner
from gplq.recipe import Recipe, as_recipe
from gplq.record import is_prepared
from gplq.spec import FLOAT_BITS, Granularity, QuantizerSpec
from gplq.swap import swap_class
from gplq.targets import match_names
from gplq.trace import LinearCall, ProductCall, SoftmaxCall, Trace, evaluating, trace_forward

__all__ = ['prepare']

_HEADS = ('num_heads', 'n_heads', 'heads', 'nhead', 'num_attention_heads')


def prepare(
    model: nn.Module,
    recipe: Recipe | str,
    example_inputs: Any = None,
    *,
    forward: Callable[[nn.Module], Any] | None = None,
) -> Plan:
    """Insert quantizers for every targeted site; they let values pass until :func:`gplq.calibrate`.

    An example is needed because head counts and attention products exist only in a forward pass. It runs once
    or twice, in inference mode, with the random state put back. All parameters keep their names and values.

    Args:
        model: any module; it is changed in place, never wrapped.
        recipe: settings, or ``'w4a4'`` and the like.
        example_inputs: a tensor, or a tuple of arguments, for ``model(...)``.
        forward: instead of ``example_inputs``, a function that runs the part to be quantized.

    Returns:
        The plan: every site and everything left in floating point.

    Raises:
        TargetError: if a pattern matches nothing, or a targeted layer never ran.
        ProductError: if an attention module's products cannot be found.
        StageError: if the model is prepared already.
    """
    recipe = as_recipe(recipe)
    if is_prepared(model):
        raise StageError(f'{type(model).__name__} is prepared already; start from a fresh model')
    if not recipe.quantizes:
        plan = Plan(recipe)
        insert(model, plan)
        return plan
    run = _runner(example_inputs, forward)
    targets = _Targets(model, recipe)
    for name in targets.multiheads:
        # Taken apart before the trace: its products are hidden inside one fused call.
        swap_class(model.get_submodule(name), DecomposedMultiheadAttention)
    trace, expected = trace_forward(model, run)
    plan = _Planner(model, recipe, targets, trace).plan()
    insert(model, plan)
    with evaluating(model):
        _check_unchanged(model, expected, run(model))
    return plan


def _runner(example: Any, forward: Callable[[nn.Module], Any] | None) -> Callable[[nn.Module], Any]:
    if forward is not None:
        return forward
    if example is None:
        raise CalibrationError("prepare needs example_inputs (a batch of the model's input) or forward")
    arguments = example if isinstance(example, tuple) else (example,)
    for x in arguments:
        if isinstance(x, Tensor) and (x.numel() == 0 or (x.is_floating_point() and not x.isfinite().all())):
            raise CalibrationError(f'the example of shape {tuple(x.shape)} is empty or not finite')
    return lambda model: model(*arguments)


def _check_unchanged(model: nn.Module, expected: Any, found: Any) -> None:
    """Insertion must not change the function; if it does, a layer is not what its class says."""
    for before, after in zip(_flat(expected), _flat(found), strict=True):
        scale = before.abs().max().clamp(min=1e-6)
        if not torch.isfinite(before).all():
            raise CalibrationError("the model's output for the example is not finite")
        # Half precision adds up in another order, so a few of its steps are no sign of anything.
        if float((before - after).abs().max() / scale) > max(1e-3, 8 * torch.finfo(before.dtype).eps):
            raise ProductError(
                f"{type(model).__name__} computes something else once its layers are replaced: a layer's forward "
                'differs from its class; name it in skip'
            )


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    if isinstance(value, dict):
        return [x for item in value.values() for x in _flat(item)]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in _flat(item)]
    return []


class _Targets:
    """The names that a recipe's patterns choose, and why the others are left."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        modules = {name: module for name, module in model.named_modules() if name}
        kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
        candidates = [name for name, module in modules.items() if isinstance(module, kinds)]
        if not candidates:
            raise TargetError(f'{type(model).__name__} has no Linear, Conv2d or MultiheadAttention to quantize')
        matched = match_names(candidates, recipe.targets, 'targets')
        skipped = match_names(modules, recipe.skip, 'skip') if recipe.skip else frozenset()
        self.layers = matched - skipped
        if not self.layers:
            raise TargetError(f'skip={recipe.skip} leaves nothing of targets={recipe.targets}')
        self.multiheads = tuple(
            name for name in candidates if name in self.layers and isinstance(modules[name], nn.MultiheadAttention)
        )
        self._recipe = recipe
        self._skipped = skipped
        self._all = match_names(modules, recipe.targets, 'targets')

    def covers(self, module: str) -> bool:
        """Whether products of this module (the root is ``''``) are to be quantized."""
        if module == '':
            return '*' in self._recipe.targets
        return module in self._all and module not in self._skipped

    def reason(self, name: str) -> str:
        """Why a layer that could be quantized is not targeted."""
        return 'named in skip' if name in self._skipped else 'outside targets'


@dataclass(frozen=True)
class _Role:
    """What a product is: ``'query_key'`` or ``'attention_value'``, and whether the attention map is on the right."""

    kind: str
    attention_right: bool = False


class _Planner:
    """Turns a trace into a plan."""

    def __init__(self, model: nn.Module, recipe: Recipe, targets: _Targets, trace: Trace) -> None:
        self.model = model
        self.recipe = recipe
        self.targets = targets
        self.trace = trace
        self.modules = dict(model.named_modules())
        self.floating: list[Floating] = []
        self.owner_products: dict[str, list[int]] = {}

    def plan(self) -> Plan:
        maps = self._maps()
        roles = self._roles()
        owners = self._owners(roles)
        products = self._products(roles)
        self._check_attention(roles)
        return Plan(
            recipe=self.recipe,
            maps=tuple(maps),
            products=tuple(products),
            owners=tuple(owners),
            floating=tuple(self.floating + self._others() + self._unseen() + self._by_design()),
            blocks=tuple(self._blocks({p.owner for p in products}, maps)),
            multiheads=self.targets.multiheads,
            norms=tuple(self._norms(maps)),
        )

    # Layers

    def _maps(self) -> list[MapPlan]:
        calls: dict[str, list[LinearCall]] = defaultdict(list)
        functional: dict[tuple[str, str], list[LinearCall]] = defaultdict(list)
        for call in self.trace.linears:
            # A decomposed attention multiplies by thirds of its weight, which are no parameters themselves; a
            # layer may standardize its weight on the fly.
            computed = not call.layer and call.owner in self.targets.layers
            if call.layer or computed:
                calls[call.owner if computed else call.layer].append(call)
            else:
                functional[call.owner, call.kind].append(call)
        shared = self._shared_weights()
        maps: list[MapPlan] = []
        for name, made in calls.items():
            module = self.modules.get(name)
            multiplications = sum(call.multiplications for call in made)
            reason = self._unsupported(name, module, made, shared)
            if reason is None and isinstance(module, nn.MultiheadAttention):
                maps += self._projections(name, module, made)
            elif reason is None:
                assert isinstance(module, (nn.Linear, nn.Conv2d))
                maps.append(self._map(name, module, made, multiplications))
            else:
                self.floating.append(Floating(name, type(module).__name__, reason, multiplications))
        for (owner, kind), made in functional.items():
            reason = 'its weight is computed, or a parameter of no layer'
            what = 'F.linear' if kind == 'linear' else kind
            self.floating.append(Floating(owner, what, reason, sum(call.multiplications for call in made)))
        ran = set(calls)
        unseen = sorted(self.targets.layers - ran)
        if unseen:
            raise TargetError(
                f'{len(unseen)} targeted layers never ran in the example, such as {unseen[:3]}: '
                'leave them out with skip, or give an example that reaches them'
            )
        return maps

    def _shared_weights(self) -> dict[str, str]:
        first: dict[int, str] = {}
        shared: dict[str, str] = {}
        for name, module in self.modules.items():
            weight = module._parameters.get('weight')
            if weight is None:
                continue
            if id(weight) in first:
                shared[name] = first[id(weight)]
                shared[first[id(weight)]] = name
            else:
                first[id(weight)] = name
        return shared

    def _unsupported(
        self, name: str, module: nn.Module | None, made: list[LinearCall], shared: dict[str, str]
    ) -> str | None:
        if module is None or name == '' or not isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            if module is not None and not isinstance(module, (nn.Linear, nn.Conv2d)):
                return 'unsupported layer type'
            return "its weight is computed, not a layer's parameter"
        if name not in self.targets.layers:
            return self.targets.reason(name)
        if all(call.constant for call in made):
            return 'its input follows from parameters alone, so its output can be computed once'
        if name in shared:
            return f'weight shared with {shared[name]}'
        if not isinstance(module, nn.MultiheadAttention) and any(not call.layer for call in made):
            return 'its weight is computed on the fly, not a parameter'
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            return None if _same_as_linear(module) else 'its class changes what a Linear computes'
        if isinstance(module, nn.Conv2d) and type(module)._conv_forward is not nn.Conv2d._conv_forward:
            return 'its class changes what a Conv2d computes'
        if isinstance(module, nn.Conv2d) and type(module).forward is not nn.Conv2d.forward:
            return None if _same_as_conv(module, made[0].shape) else 'its class changes what a Conv2d computes'
        if isinstance(module, nn.Conv2d) and any(call.owner != name for call in made):
            return 'its weight is used without calling the layer'
        return None

    def _map(self, name: str, module: nn.Linear | nn.Conv2d, made: list[LinearCall], multiplications: int) -> MapPlan:
        kind = 'linear' if isinstance(module, nn.Linear) else 'conv2d'
        on_image = any(call.on_image for call in made)
        final = name in self.trace.final_layers
        weight_bits, input_bits = self.recipe.weight_bits, self.recipe.activation_bits
        if on_image or final:
            weight_bits = max(weight_bits, self.recipe.first_last_bits)
            input_bits = max(input_bits, self.recipe.first_last_bits)
        site = 'linear_input' if kind == 'linear' else 'conv_input'
        if on_image:
            site = 'patch_embed_input'
        elif final:
            site = 'classifier_input'
        elif kind == 'linear' and all(call.after_gelu for call in made):
            site = 'gelu_output'
        columns = module.in_features if isinstance(module, nn.Linear) else 1
        return MapPlan(
            name=name,
            kind=kind,
            input=self._linear_input(site, input_bits, columns, normed=all(call.norm for call in made)),
            weight_bits=weight_bits,
            rows=int(module.weight.shape[0]),
            multiplications=multiplications,
        )

    def _linear_input(self, site: str, bits: int, columns: int, *, normed: bool = False) -> OperandPlan | None:
        if bits == FLOAT_BITS:
            return None
        if site == 'gelu_output' and self.recipe.gelu_output == 'twin_uniform':
            return OperandPlan(site, QuantizerSpec(bits, signed=None, scheme='twin_uniform'), (1,))
        wanted = self.recipe.linear_input == 'channel' or (self.recipe.linear_input == 'post_norm' and normed)
        per_channel = wanted and columns > 1
        granularity: Granularity = 'channel' if per_channel else 'tensor'
        shifted = site == 'gelu_output' and self.recipe.gelu_output == 'unsigned_offset'
        # One column stands for a convolution, whose padding must stay zero.
        if shifted or (self.recipe.input_offset and columns > 1):
            spec = QuantizerSpec(bits, signed=False, granularity=granularity, offset=True)
        else:
            spec = QuantizerSpec(bits, signed=None, granularity=granularity)
        return OperandPlan(site, spec, (columns,) if per_channel else (1,))

    def _projections(self, name: str, module: nn.MultiheadAttention, made: list[LinearCall]) -> list[MapPlan]:
        widths = {'query': module.embed_dim, 'key': module.kdim, 'value': module.vdim}
        share = sum(call.multiplications for call in made) // 3
        normed = all(call.norm for call in made)
        return [
            MapPlan(
                name=name,
                kind=kind,
                input=self._linear_input('linear_input', self.recipe.activation_bits, int(columns or 0), normed=normed),
                weight_bits=self.recipe.weight_bits,
                rows=module.embed_dim,
                multiplications=share,
            )
            for kind, columns in widths.items()
        ]

    # Products

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
            name = call.stack[-1] if call.stack else ''
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
            attention = QuantizerSpec(bits, None, 'head', scheme=self.recipe.attention_map)
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

    def _check_attention(self, roles: dict[int, _Role]) -> None:
        for name, why in self.trace.opaque.items():
            if self.targets.covers(name):
                raise ProductError(f"{name}: {why} hides its products; name it in skip=('{name}',) to leave it out")
        for number, softmax in enumerate(self.trace.softmaxes):
            name = softmax.stack[-1] if softmax.stack else ''
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

    # The rest

    def _others(self) -> list[Floating]:
        """Functions that multiply without being a layer or a product of two activations."""
        found: dict[tuple[str, str, str], int] = defaultdict(int)
        for call in self.trace.others:
            reason = 'one operand is a parameter of no layer' if call.by_parameter else 'no product of two activations'
            found[call.stack[-1] if call.stack else '', call.function, reason] += call.multiplications
        return [Floating(name, what, reason, count) for (name, what, reason), count in found.items()]

    def _unseen(self) -> list[Floating]:
        """Layers that the example did not reach, such as a detector's heads where it runs the backbone alone."""
        kinds = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
        ran = set(self.trace.ran) | {call.layer for call in self.trace.linears} | self.targets.layers
        names = [name for name, module in self.modules.items() if isinstance(module, kinds) and name not in ran]
        # What a MultiheadAttention holds runs by its weight alone.
        return [
            Floating(name, type(self.modules[name]).__name__, f'{self.targets.reason(name)}; {NOT_RUN}', 0)
            for name in names
            if not any(name.startswith(f'{owner}.') for owner in self.targets.multiheads)
        ]

    def _blocks(self, owners: set[str], maps: list[MapPlan]) -> list[str]:
        """Innermost members of a list that map tokens to as many, and hold an attention; in running order."""
        found: list[str] = []
        for name in dict.fromkeys(self.trace.ran):
            parent = self.modules.get(name.rpartition('.')[0]) if name else None
            if not isinstance(parent, (nn.ModuleList, nn.Sequential)) or name not in self.trace.blocks:
                continue
            if self.trace.ran.count(name) == 1 and any(o == name or o.startswith(name + '.') for o in owners):
                found.append(name)
        innermost = [n for n in found if not any(other.startswith(n + '.') for other in found)]
        tokens = [name for name in innermost if self._channels_last(name, maps)]
        if self.recipe.compensation == 'qwt' and innermost and not tokens:
            raise RecipeError(
                f"compensation='qwt' needs blocks of tokens (..., channels); those of {type(self.model).__name__}, "
                f"such as {innermost[0]}, run on feature maps (channels, height, width): use 'ridge' or 'affine'"
            )
        return tokens

    def _channels_last(self, block: str, maps: list[MapPlan]) -> bool:
        """Whether the last axis of a block's input is that of its channels, and no other could be."""
        shape = self.trace.blocks[block]
        layers = [self.modules[m.name] for m in maps if m.name.startswith(f'{block}.')]
        width = next((layer.in_features for layer in layers if isinstance(layer, nn.Linear)), None)
        return shape[-1] == width and (len(shape) < 4 or shape[1] != width)

    def _norms(self, maps: list[MapPlan]) -> list[tuple[str, str]]:
        """LayerNorms that one layer alone reads, with that layer: its input scales can move into them."""
        readers: dict[str, set[str]] = defaultdict(set)
        sources: dict[str, set[str]] = defaultdict(set)
        for call in self.trace.linears:
            readers[call.norm].add(call.layer)
            sources[call.layer].add(call.norm)
        pairs = []
        for a_map in maps:
            norm = next(iter(sources[a_map.name]), '')
            alone = norm and sources[a_map.name] == {norm} and readers[norm] == {a_map.name}
            foldable = a_map.kind == 'linear' and a_map.input is not None and not a_map.input.spec.offset
            # What a classifier reads is what others take for the model's features.
            final = a_map.name in self.trace.final_layers
            if alone and foldable and not final and norm not in self.trace.shared_norms:
                pairs.append((norm, a_map.name))
        return pairs

    def _by_design(self) -> list[Floating]:
        counts: dict[str, int] = defaultdict(int)
        for name in dict.fromkeys(self.trace.ran):
            module = self.modules[name]
            if not list(module.children()) and not isinstance(
                module, (nn.Linear, nn.Conv2d, nn.Dropout, nn.Identity, nn.Flatten, ProductOwner)
            ):
                kind = type(module).__name__
                if re.search('norm|act|gelu|relu|softmax|silu', kind, re.I):
                    counts[kind] += 1
        return [Floating(f'{n} x {kind}', kind, 'floating point by design', 0) for kind, n in counts.items()]


def _operand(
    site: str, spec: QuantizerSpec, shape: tuple[int, ...], owner: nn.Module, call: ProductCall
) -> OperandPlan:
    """One scale a head where the head's axis is certain, else one in all."""
    heads = next((h for a in _HEADS if isinstance(h := getattr(owner, a, None), int) and h > 1), 1)
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
    heads = next((h for a in _HEADS if isinstance(h := getattr(owner, a, None), int) and h > 1), 1)
    widths = {w for c in owner.children() if isinstance(c, nn.Linear) for w in (c.in_features, c.out_features)}
    if isinstance(owner, nn.MultiheadAttention):
        return True
    rows, columns = call.right_shape[-2:]
    if columns * heads not in widths:
        return False
    # Where there happen to be as many tokens as channels in a head, sizes cannot tell.
    return rows * heads not in widths or call.right_adjacent


def _same_as_linear(module: nn.Linear) -> bool:
    """A subclass with its own forward still counts if it computes the same."""
    with evaluating(module):
        x = torch.randn(2, module.in_features, device=module.weight.device, dtype=module.weight.dtype)
        try:
            return torch.equal(module(x), F.linear(x, module.weight, module.bias))
        except (RuntimeError, TypeError, ValueError):
            return False


def _same_as_conv(module: nn.Conv2d, shape: Sequence[int]) -> bool:
    with evaluating(module):
        x = torch.randn(1, *shape[-3:], device=module.weight.device, dtype=module.weight.dtype)
        try:
            return torch.equal(module(x), module._conv_forward(x, module.weight, module.bias))
        except (RuntimeError, TypeError, ValueError):
            return False

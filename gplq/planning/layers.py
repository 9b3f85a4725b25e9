"""Which layers are quantized how, and why the others are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from gplq.errors import TargetError
from gplq.plan import NOT_RUN, Floating, MapPlan, OperandPlan
from gplq.planning.example import Example
from gplq.spec import FLOAT_BITS, Granularity, QuantizerSpec
from gplq.trace import LinearCall, evaluating

__all__ = ['LayerPlanner']


class LayerPlanner:
    """Plans every Linear, Conv2d and projection of an attention; :attr:`floating` fills with the others."""

    def __init__(self, example: Example) -> None:
        self.recipe, self.targets, self.trace = example.recipe, example.targets, example.trace
        self.modules = example.modules
        self.floating: list[Floating] = []

    def plan(self) -> list[MapPlan]:
        """Decide; call it once.

        Raises:
            TargetError: if a targeted layer never ran.
        """
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
        self.floating += self._unseen()
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

"""One forward pass, watched: which layers and products run, in which module, on what."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from gplq.products import product_operands, scaled_dot_product_parts

__all__ = ['LinearCall', 'OtherCall', 'ProductCall', 'SoftmaxCall', 'Trace', 'evaluating', 'trace_forward']

_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax})
_CONV = frozenset({F.conv2d, torch.conv2d})
_OTHER_CONV = frozenset({F.conv1d, F.conv3d, F.conv_transpose2d, torch.conv_transpose2d})
# Operations that move values but change none, so that what is known of a tensor stays true of the result.
_MOVES = frozenset(
    {
        Tensor.view,
        Tensor.reshape,
        Tensor.permute,
        Tensor.transpose,
        Tensor.flatten,
        Tensor.unflatten,
        Tensor.contiguous,
        Tensor.unsqueeze,
        Tensor.squeeze,
        Tensor.to,
        Tensor.float,
        Tensor.clone,
        torch.reshape,
        torch.permute,
        torch.transpose,
        torch.flatten,
        torch.roll,
        F.dropout,
        F.pad,
    }
)
# Operations that add tensors or put them side by side, whose result still follows from layers alone.
_JOINS = frozenset(
    {torch.add, torch.sub, torch.cat, torch.stack, torch.concat}
    | {Tensor.add, Tensor.sub, Tensor.add_, Tensor.sub_}
    | {getattr(Tensor, f'__{name}__') for name in ('add', 'radd', 'iadd', 'sub', 'rsub', 'isub')}
)


_ELEMENTWISE = frozenset(
    {torch.mul, torch.multiply, Tensor.mul, Tensor.mul_, Tensor.multiply, Tensor.multiply_}
    | {getattr(Tensor, f'__{name}__') for name in ('mul', 'rmul', 'imul')}
)
_MERGES = frozenset({Tensor.view, Tensor.reshape, Tensor.flatten, torch.reshape, torch.flatten})


@dataclass(frozen=True)
class _Tag:
    """What is known of a tensor: the products, softmaxes and layers it comes from, and what made it.

    ``merged`` is the inner factor of an axis third from last into which two were merged, 0 without one; ``mixed``
    says that activations were multiplied by others in a way that is no product, and no layer has run since; ``weights``
    that it is a softmax's very output.
    """

    constant: bool = False
    products: frozenset[int] = frozenset()
    softmaxes: frozenset[int] = frozenset()
    layers: frozenset[str] = frozenset()
    gelu: bool = False
    image: bool = False
    norm: str = ''
    merged: int = 0
    mixed: bool = False
    weights: bool = False


@dataclass(frozen=True)
class LinearCall:
    """A Linear or Conv2d (or other convolution) that ran.

    ``layer`` is the module that holds the weight, empty if none does; ``owner`` the module whose forward called
    it. ``shape`` is the input's, ``norm`` the LayerNorm whose very output it is, empty if none.
    """

    layer: str
    owner: str
    kind: str
    shape: tuple[int, ...]
    multiplications: int
    after_gelu: bool
    on_image: bool
    constant: bool
    norm: str


@dataclass(frozen=True)
class ProductCall:
    """A product of two tensors that are not parameters; ``stack`` names the running modules, innermost last.

    ``merged`` is how many heads lie innermost in a batch axis that they share with the images, 0 if none do;
    ``right_adjacent`` says that the right operand views memory in which its columns are neighbors and its rows are not,
    as the channels that a layer wrote.
    """

    stack: tuple[str, ...]
    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]
    output_numel: int
    multiplications: int
    constant: bool
    einsum: bool
    left_softmaxes: frozenset[int]
    right_softmaxes: frozenset[int]
    merged: int
    right_adjacent: bool


@dataclass(frozen=True)
class SoftmaxCall:
    """A softmax over something that depends on the input; ``products`` and ``layers`` list what it came from.

    ``mixed`` says that activations were multiplied by others on the way, by other operations than products.
    """

    stack: tuple[str, ...]
    numel: int
    products: frozenset[int]
    layers: frozenset[str] = frozenset()
    mixed: bool = False


@dataclass(frozen=True)
class OtherCall:
    """A function that multiplies otherwise: by a parameter that belongs to no layer, or by a softmax one by one."""

    stack: tuple[str, ...]
    function: str
    multiplications: int
    by_parameter: bool = False
    by_softmax: bool = False


@dataclass
class Trace:
    """All that one forward pass showed."""

    linears: list[LinearCall] = field(default_factory=list)
    products: list[ProductCall] = field(default_factory=list)
    softmaxes: list[SoftmaxCall] = field(default_factory=list)
    others: list[OtherCall] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    final_layers: frozenset[str] = frozenset()
    shared_norms: set[str] = field(default_factory=set)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inference mode of the modules, no gradients, random state as before; each module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    devices = {p.device.index for p in model.parameters() if p.device.type == 'cuda'}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(d for d in devices if d is not None)):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def trace_forward(model: nn.Module, forward: Callable[[nn.Module], Any]) -> tuple[Trace, Any]:
    """Run ``forward(model)`` in inference mode and report what ran, with the output."""
    tracer = _Tracer(model)
    with evaluating(model), tracer.modules():
        with tracer.counter, tracer:
            output = forward(model)
    # Logits are (batch, classes); feature maps and token sequences have more dimensions.
    tracer.trace.final_layers = frozenset().union(*(tracer.layers_behind(x) for x in _tensors(output) if x.dim() == 2))
    # What leaves the model may be read by anyone.
    tracer.trace.shared_norms |= {tracer.norm_behind(x) for x in _tensors(output)}
    return tracer.trace, output


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _inner_factor(before: torch.Size, after: torch.Size) -> int:
    """Of the axes that a reshape merged into one in front of the last two, the innermost's length; 0 without any.

    Fairseq's ``(n, batch, heads * d) -> (n, batch * heads, d)``, turned around afterwards, counts as well.
    """
    if len(before) > len(after) >= 3 and before[-2:] == after[-2:] and after[-3] % max(1, before[-3]) == 0:
        # As many images as heads: either could lie inside.
        return 0 if before[-3] ** 2 == after[-3] > 1 else int(before[-3])
    if len(before) == len(after) == 3 and before[0] == after[0] and before[1] and after[1] % before[1] == 0:
        inner = after[1] // before[1]
        return inner if before[2] == inner * after[2] else 0
    return 0


def _moves_channels(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a roll or padding puts a channel in another's place, or values that are no channel's."""
    options = dict(zip(('input', 'shifts' if func is torch.roll else 'pad'), args, strict=False)) | kwargs
    if func is torch.roll:
        dims = kwargs.get('dims', args[2] if len(args) > 2 else ())
        dims = dims if isinstance(dims, (tuple, list)) else (dims,)
        return not dims or any(axis in (-1, options['input'].dim() - 1) for axis in dims)
    if func is F.pad:
        value = kwargs.get('value', args[3] if len(args) > 3 else None)
        return any(options['pad'][:2]) or bool(value)
    return False


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiplications of whatever runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiplications = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            # torch counts a multiplication and an addition.
            self.multiplications += int(count(*args, **(kwargs or {}), out_val=output)) // 2
        return output


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self.counter = _Counter()
        self._names = {module: name for name, module in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._layers = {
            id(parameter): (name, module)
            for name, module in model.named_modules()
            for parameter in module._parameters.values()
            if parameter is not None
        }
        self._fixed = {id(buffer) for buffer in model.buffers()}
        self._running: list[str] = []
        # Kept alive for the pass: tags hang on tensor objects, whose ids must not be used again.
        self._kept: list[Tensor] = []
        self._tags: dict[int, _Tag] = {}

    @contextlib.contextmanager
    def modules(self) -> Iterator[None]:
        """Follow which module's forward is running."""
        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self._names[module]
        if not self._running:
            # The first module to run, the model or its backbone, is given the images.
            for x in _tensors((args, kwargs)):
                self._mark(x, _Tag(image=True))
        self._running.append(name)
        self.trace.ran.append(name)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self._running.pop()
        given, made = next(_tensors(args), None), output
        if given is not None and isinstance(made, Tensor) and made.shape == given.shape:
            self.trace.blocks[name] = tuple(made.shape)

    def _mark(self, x: Tensor, tag: _Tag) -> None:
        self._kept.append(x)
        self._tags[id(x)] = tag

    def _tag(self, x: Tensor) -> _Tag:
        if id(x) in self._tags:
            return self._tags[id(x)]
        return _Tag(constant=isinstance(x, nn.Parameter) or id(x) in self._fixed)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        before = self.counter.multiplications
        output = func(*args, **kwargs)
        operands = product_operands(func, args, kwargs)
        if operands is not None:
            self._record_product(*operands, output, einsum=func is torch.einsum)
            return output
        given = list(_tensors((args, kwargs)))
        tags = [self._tag(x) for x in given]
        if func in _SOFTMAX:
            self._softmax(args[0], output)
            return output
        layers = frozenset().union(*(tag.layers for tag in tags))
        moving = {id(x) for x, tag in zip(given, tags, strict=True) if not tag.constant}
        mixed = any(tag.mixed for tag in tags) or (func not in _JOINS and len(moving) > 1)
        if func not in _JOINS and sum(bool(tag.layers) for tag in tags) > 1:
            # One activation times another, or a kernel of its own: no longer what a layer put out.
            layers = frozenset()
        is_layer = func is F.linear or func in _CONV or func in _OTHER_CONV
        if is_layer:
            layers = frozenset({self._linear(func, args, kwargs, output)})
            mixed = False
        elif func is F.multi_head_attention_forward:
            self.trace.opaque[self._running[-1] if self._running else ''] = 'fused attention'
        learned = any(isinstance(x, nn.Parameter) for x in given)
        multiplied = self.counter.multiplications - before
        if func is F.bilinear:
            # A kernel of its own, which torch does not count.
            multiplied = output.numel() * math.prod(x.shape[-1] for x in given[:2])
        if multiplied and not is_layer:
            name = getattr(func, '__name__', str(func))
            self.trace.others.append(OtherCall(tuple(self._running), name, multiplied, by_parameter=learned))
        if func in _ELEMENTWISE and len(moving) > 1 and any(tag.weights for tag in tags):
            self.trace.others.append(OtherCall(tuple(self._running), 'mul', output.numel(), by_softmax=True))
        tag = _Tag(
            constant=all(tag.constant for tag in tags),
            products=frozenset().union(*(tag.products for tag in tags)),
            softmaxes=frozenset().union(*(tag.softmaxes for tag in tags)),
            layers=layers if not learned or func is F.linear else frozenset(),
            gelu=func is F.gelu or (func in _MOVES and bool(tags) and tags[0].gelu),
            image=not learned and any(tag.image for tag in tags),
            norm=self._follow_norm(func, args, kwargs, tags, output),
            merged=max((tag.merged for tag in tags), default=0),
            mixed=mixed,
            weights=func in _MOVES and bool(tags) and tags[0].weights,
        )
        for x in _tensors(output):
            if not isinstance(x, nn.Parameter):
                merged = _inner_factor(given[0].shape, x.shape) if func in _MERGES else 0
                self._mark(x, replace(tag, merged=merged) if merged else tag)
        return output

    def _follow_norm(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tags: list[_Tag], output: Any
    ) -> str:
        """The LayerNorm whose output the result still is; notes those that something else than a layer reads."""
        if func is F.layer_norm:
            weight = kwargs.get('weight', args[2] if len(args) > 2 else None)
            return str(self._layers.get(id(weight), ('', None))[0])
        if func in _MOVES:
            norm = tags[0].norm if tags else ''
            # What a norm put out by channels must still lie so: token mixers turn it around first.
            turned = norm and (output.shape[-1], output.stride(-1)) != (args[0].shape[-1], args[0].stride(-1))
            if norm and (turned or _moves_channels(func, args, kwargs)):
                self.trace.shared_norms.add(norm)
                return ''
            return norm
        if func is not F.linear and any(True for _ in _tensors(output)):
            self.trace.shared_norms |= {tag.norm for tag in tags if tag.norm}
        return ''

    def _softmax(self, x: Tensor, output: Tensor) -> None:
        tag = self._tag(x)
        if tag.constant:
            self._mark(output, tag)
            return
        index = len(self.trace.softmaxes)
        self.trace.softmaxes.append(SoftmaxCall(tuple(self._running), x.numel(), tag.products, tag.layers, tag.mixed))
        self._mark(output, _Tag(softmaxes=frozenset({index}), merged=tag.merged, weights=True))

    def _record_product(self, left: Tensor, right: Tensor, output: Tensor, *, einsum: bool = False) -> None:
        tags = self._tag(left), self._tag(right)
        self.trace.shared_norms |= {tag.norm for tag in tags if tag.norm}
        inner = left.shape[-1]
        call = ProductCall(
            stack=tuple(self._running),
            left_shape=tuple(left.shape),
            right_shape=tuple(right.shape),
            output_numel=output.numel(),
            multiplications=output.numel() * inner,
            constant=any(tag.constant for tag in tags),
            einsum=einsum,
            left_softmaxes=tags[0].softmaxes,
            right_softmaxes=tags[1].softmaxes,
            merged=max(tag.merged for tag in tags),
            right_adjacent=right._is_view() and right.stride(-1) == 1 < right.stride(-2),
        )
        index = len(self.trace.products)
        self.trace.products.append(call)
        self._mark(output, _Tag(products=frozenset({index}), merged=call.merged))

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take the fused attention apart, so that its parts are seen like those of any other."""

        def multiply(left: Tensor, right: Tensor) -> Tensor:
            output = torch.matmul(left, right)
            self._record_product(left, right, output)
            return output

        def query_key(left: Tensor, right: Tensor) -> Tensor:
            output = multiply(left, right)
            softmax = SoftmaxCall(tuple(self._running), output.numel(), frozenset({len(self.trace.products) - 1}))
            self.trace.softmaxes.append(softmax)
            return output

        def attention_value(left: Tensor, right: Tensor) -> Tensor:
            self._mark(left, _Tag(softmaxes=frozenset({len(self.trace.softmaxes) - 1})))
            return multiply(left, right)

        return scaled_dot_product_parts(query_key, attention_value, *args, **kwargs)

    def norm_behind(self, x: Tensor) -> str:
        """The LayerNorm whose very output ``x`` is."""
        return self._tag(x).norm

    def layers_behind(self, x: Tensor) -> frozenset[str]:
        """Linear layers from which ``x`` follows without any other parameter."""
        return self._tag(x).layers

    def _linear(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> str:
        """Record a call and return the name of the layer that holds the weight."""
        x = args[0] if args else kwargs['input']
        weight = args[1] if len(args) > 1 else kwargs['weight']
        layer, _ = self._layers.get(id(weight), ('', None))
        owner = self._running[-1] if self._running else ''
        if self._modules[owner]._parameters.get('weight') is weight:
            # Tied layers share the weight: the one that runs is meant.
            layer = owner
        if func is F.linear:
            kind = 'linear'
        else:
            kind = 'conv2d' if func in _CONV else 'convolution'
        if func in _OTHER_CONV and func is not F.conv1d and func is not F.conv3d:
            multiplications = x.numel() * (weight.numel() // weight.shape[0])
        else:
            multiplications = output.numel() * (weight.numel() // weight.shape[0])
        tag = self._tag(x)
        if tag.norm and not layer:
            self.trace.shared_norms.add(tag.norm)
        self.trace.linears.append(
            LinearCall(
                layer=layer,
                owner=owner,
                kind=kind,
                shape=tuple(x.shape),
                multiplications=multiplications,
                after_gelu=tag.gelu,
                on_image=tag.image,
                constant=tag.constant,
                norm=tag.norm,
            )
        )
        return str(layer)

"""What stands in for quantized layers and products while a model is exported: the same maps on codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gplq.errors import TargetError
from gplq.independent_copy import independent_copy
from gplq.integer import check_scales_leave_sum, integer_linear
from gplq.layers import LinearCompensation, LinearMap, QuantizedConv2d, WeightView
from gplq.plan import MapPlan
from gplq.products import QuantizedProduct
from gplq.quantizer import Quantizer
from gplq.record import named_products, record_of, weight_views
from gplq.row_quantizer import RowQuantizer
from gplq.two_part import TwoPartQuantizer

__all__ = ['exported_twin', 'outputs_and_codes']

# x86 machines without VNNI add two products of bytes, an unsigned one by a signed one, in 16 bits: larger signed codes
# on the right would be cut off there without a word.
_LARGEST_SIGNED = 32767 // (2 * 255)
# What larger weights are taken apart by.
_SIXTEEN = 16


def exported_twin(model: nn.Module) -> nn.Module:
    """A copy of a quantized model in inference mode that computes what is exported, in torch or as ONNX operators.

    It computes in single precision, whatever the model does: ONNX's operators for quantized values know no other that
    both engines run.

    Raises:
        TargetError: if scales do not leave an integer product, see :func:`gplq.integer.integer_linear`.
    """
    twin = independent_copy(model).eval().requires_grad_(False)
    _stand_in(twin)
    return twin.float()


def outputs_and_codes(twin: nn.Module, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of one forward pass of a twin, and its codes as bytes, in the order of its QuantizeLinear operators.

    Where sites round the same input alike, as separate queries and keys do, the file has one operator for them.
    """
    codes: list[Tensor] = []
    seen: list[tuple[Tensor, _Coded]] = []

    def watch(site: _Coded, x: Tensor, found: Tensor) -> None:
        if not any(_same(x, other) and site.rounds_like(before) for other, before in seen):
            seen.append((x, site))
            codes.append(found)

    modules = [module for module in twin.modules() if isinstance(module, _Coded)]
    for module in modules:
        module.watcher = watch
    try:
        with torch.no_grad():
            outputs = twin(*inputs)
    finally:
        for module in modules:
            module.watcher = None
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)], codes


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors, neither of which is gone, are of the same memory."""
    return (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())


def _stand_in(model: nn.Module) -> None:
    """Replace every quantized map, product and compensation by what is exported for it."""
    for plan, view in list(weight_views(model)):
        setattr(view.owner, plan.attribute, _ExportedMap(plan, view))
    for name, product in list(named_products(model)):
        products = model.get_submodule(name.rpartition(':')[0]).quantized_products
        assert isinstance(products, nn.ModuleList)
        position = next(i for i, other in enumerate(products) if other is product)
        products[position] = _ExportedProduct(name, product)
    for name in record_of(model).plan.blocks:
        block = model.get_submodule(name)
        layer = getattr(block, 'compensation', None)
        if isinstance(layer, LinearCompensation):
            block.compensation = _ExportedCompensation(name, layer)


class _Coded(nn.Module):
    """Codes of a site as floats, between QuantizeLinear and DequantizeLinear of step 1.

    Written so that no engine has something to rearrange, which would move values that lie next to a tie. They are
    bounded above before the offset is taken off, since OpenVINO takes it off a LayerNorm's bias otherwise, and below
    by QuantizeLinear itself. Signed codes are made unsigned before they are rounded, as OpenVINO does in any case: in
    single precision some values come to lie at a tie by it. Not so those of a product of two operands that are both
    computed, which OpenVINO runs on integers only if neither has a zero point.

    Args:
        quantizer: of the site.
        name: of the layer or product, for messages.
        byte: its codes' type; signed ones have no zero point.
    """

    scale: Tensor
    highest: Tensor
    lowest: Tensor
    zero_point: Tensor
    zero: Tensor
    one: Tensor

    def __init__(self, quantizer: Quantizer, name: str, byte: torch.dtype = torch.uint8) -> None:
        super().__init__()
        if isinstance(quantizer, TwoPartQuantizer):
            raise TargetError(
                f'{name}: {quantizer.spec.scheme} quantizers have no operator in ONNX: export a model with uniform '
                "ones, such as those of method='gplq'"
            )
        self.quantizer = quantizer
        self.folded = not isinstance(quantizer, RowQuantizer) and bool((quantizer.scale == 1).all())
        # As a constant: an engine's exponential of its logarithm may differ in the last bit.
        self.register_buffer('scale', quantizer.scale.detach())
        # In steps, of a value: the offset belongs to it.
        offset = torch.zeros(()) if quantizer.offset is None else quantizer.offset.detach()
        self.register_buffer('highest', quantizer.spec.qmax + offset)
        self.register_buffer('lowest', quantizer.spec.qmin + offset)
        self.signed = byte == torch.int8
        self.shifted = bool(self.lowest.any()) and not self.signed
        self.register_buffer('zero_point', torch.tensor(0 if self.signed else -quantizer.spec.qmin, dtype=byte))
        self.register_buffer('zero', torch.zeros((), dtype=byte))
        self.register_buffer('one', torch.ones(()))
        # Sees the codes of every call outside of an export.
        self.watcher: Callable[[_Coded, Tensor, Tensor], None] | None = None

    def rounds_like(self, other: _Coded) -> bool:
        """Whether both give the same codes of any input."""
        constants = ('scale', 'highest', 'lowest')
        alike = self.signed == other.signed and type(self.quantizer) is type(other.quantizer)
        return alike and all(torch.equal(getattr(self, name), getattr(other, name)) for name in constants)

    def scale_over(self, batch: int) -> Tensor:
        """The constant that codes are multiplied by, beside their rows' units, for a leading axis of ``batch``."""
        return self.quantizer.over(self.scale, batch)

    def units(self, x: Tensor) -> Tensor | None:
        """What the rows' codes of ``x`` are multiplied by as well, where they have units of their own."""
        return self.quantizer.units(x) if isinstance(self.quantizer, RowQuantizer) else None

    def forward(self, x: Tensor) -> Tensor:
        split = self.quantizer.split_heads(x)
        units = self.units(split)
        # OpenVINO makes a division a product with a reciprocal, which may differ in the last bit.
        per_unit = _wide(self.scale.reciprocal(), split)
        if units is not None:
            per_unit = units.reciprocal() * per_unit
        steps = split if self.folded else split * per_unit
        steps = torch.minimum(steps, self.highest)
        if self.signed:
            # Whole numbers before QuantizeLinear, which OpenVINO rounds 128 higher than they are.
            steps = torch.maximum(steps, self.lowest).round()
        elif self.shifted:
            steps = steps - self.lowest
        # Before they are bytes: behind DequantizeLinear ONNX Runtime makes nodes that it cannot load of a Reshape.
        steps = steps.reshape(x.shape) if self.quantizer.merged_heads else steps
        if torch.compiler.is_exporting():
            onnx = torch.onnx.ops.symbolic
            codes = onnx('QuantizeLinear', (steps, self.one, self.zero), dtype=self.zero.dtype, shape=steps.shape)
            values = onnx('DequantizeLinear', (codes, self.one, self.zero_point), dtype=steps.dtype, shape=steps.shape)
        else:
            codes = steps if self.signed else steps.round().clamp(min=0)
            values = codes - self.zero_point
            if self.watcher is not None:
                self.watcher(self, x, codes.to(self.zero.dtype))
        return values


def _wide(scale: Tensor, x: Tensor) -> Tensor:
    """A scale to be applied to ``x``, written out along its last axis where there are several.

    Where a scale a head has a last axis of 1 and the batch is of any size, OpenVINO (2026.4) takes the first head's for
    all of them.
    """
    return scale.expand(*scale.shape[:-1], x.shape[-1]) if scale.numel() > 1 else scale


class _Matrix(nn.Module):
    """Values of a rounded weight, read from its codes; one scale along ``axis``.

    Codes are signed bytes without a zero point, and no larger than all machines multiply. With any others OpenVINO
    multiplies in floating point, and on machines with VNNI rounds the activations once more to do so. Larger values,
    those of 8 bits, are taken apart into sixteens and what is left: two products, whose sums are brought together.
    """

    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> None:
        super().__init__()
        self.axis, self.dim = axis, codes.dim()
        self.register_buffer('scale', scale)
        if zero_point is not None:
            codes = codes - zero_point.to(codes).reshape([-1 if each == axis else 1 for each in range(self.dim)])
        if int(codes.abs().max()) <= _LARGEST_SIGNED:
            self.parts = nn.ModuleList([_Part(codes, 1, scale, axis)])
        else:
            sixteens = codes.div(_SIXTEEN, rounding_mode='floor')
            left, one = codes - _SIXTEEN * sixteens, torch.ones_like(scale)
            self.parts = nn.ModuleList(
                [_Part(sixteens, _SIXTEEN, _SIXTEEN * one, axis), _Part(left, 1, one, axis)],
            )

    def multiply(self, operation: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """``operation(x, values)`` as an engine computes it: exactly on codes, the scale behind it."""
        # To broadcast against a result: along its last axis, or before two axes of positions.
        scale = self.scale if self.axis else self.scale[:, None, None]
        parts = [part for part in self.parts if isinstance(part, _Part)]
        if torch.compiler.is_exporting():
            first, *rest = (operation(x, part.values()) for part in parts)
            return (first + rest[0]) * scale if rest else first
        x = x.double()
        first, *rest = (operation(x, part.codes.double()) * part.unit for part in parts)
        return sum(rest, first).float() * scale


class _Part(nn.Module):
    """Codes of a weight, each of so many units, as signed bytes; their values are ``steps`` times as large."""

    codes: Tensor
    steps: Tensor
    zero: Tensor

    def __init__(self, codes: Tensor, unit: int, steps: Tensor, axis: int) -> None:
        super().__init__()
        self.unit, self.axis = unit, axis
        self.register_buffer('codes', codes.to(torch.int8).contiguous())
        self.register_buffer('steps', steps)
        self.register_buffer('zero', torch.zeros_like(steps, dtype=torch.int8))

    def values(self) -> Tensor:
        """In an export alone."""
        values: Tensor = torch.onnx.ops.symbolic(
            'DequantizeLinear',
            (self.codes, self.steps, self.zero),
            {'axis': self.axis},
            dtype=torch.float32,
            shape=self.codes.shape,
        )
        return values


class _ExportedMap(LinearMap):
    """A linear map of codes by codes; only scale and bias of the result are in floating point."""

    constant: Tensor

    def __init__(self, plan: MapPlan, view: WeightView) -> None:
        super().__init__(view.map.input, view.map.weight, len(view.map.bias_correction))
        zero = torch.zeros_like(view.map.bias_correction)
        constants = integer_linear(view, zero)
        assert view.map.input is not None
        self.coded = _Coded(view.map.input, plan.name)
        self.register_buffer('constant', constants.bias)
        self.patches = _patches(view.owner)
        if isinstance(view.owner, QuantizedConv2d) and not self.patches:
            codes = constants.codes.reshape(view.owner.weight.shape)
            self.matrix = _Matrix(codes, constants.scale, constants.zero_point, axis=0)
        else:
            self.matrix = _Matrix(constants.codes.t(), constants.scale, constants.zero_point, axis=1)

    def run(
        self,
        operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        if x.dim() == 2:
            # ONNX Runtime makes a floating-point Gemm of a product of two plain matrices and a bias.
            return self.run(operation, x.unsqueeze(1), weight, bias).squeeze(1)
        constant = self.constant if bias is None else self.constant + bias
        x = self.coded(x)
        if self.patches:
            rows = _as_patches(x, self.patches)
            return _multiply(rows, self.matrix, constant).permute(0, 3, 1, 2)
        if self.matrix.dim == 4:
            return self.matrix.multiply(lambda x, kernel: operation(x, kernel, None), x) + constant[:, None, None]
        return _multiply(x, self.matrix, constant)


def _multiply(x: Tensor, matrix: _Matrix, bias: Tensor) -> Tensor:
    """``x @ matrix + bias``, of an ``x`` of three axes or more, in operators that engines leave as they are."""
    y = matrix.multiply(_product, x)
    # ONNX Runtime would make a product of two plain matrices of one with a bias of one axis behind it.
    known = torch.compiler.is_exporting() and all(isinstance(length, int) for length in x.shape)
    return y + (bias.reshape(*[1] * (x.dim() - 1), -1) if known else bias)


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    # As one operator: for a batch of a known size torch would make it a product of two plain matrices. In PyTorch not
    # torch.matmul, which an attention around this map would take for one of its own products.
    y: Tensor = (
        torch.onnx.ops.symbolic('MatMul', (x, matrix), dtype=x.dtype, shape=(*x.shape[:-1], matrix.shape[-1]))
        if torch.compiler.is_exporting()
        else torch.ops.aten.matmul.default(x, matrix)
    )
    return y


def _patches(owner: nn.Module) -> tuple[int, int] | None:
    """Kernel of a convolution whose windows do not overlap, so that it is a matrix product of patches."""
    if not isinstance(owner, QuantizedConv2d):
        return None
    plain = owner.groups == 1 and owner.padding in ((0, 0), 'valid') and owner.dilation == (1, 1)
    height, width = owner.kernel_size
    return (height, width) if plain and owner.stride == owner.kernel_size else None


def _as_patches(x: Tensor, kernel: tuple[int, int]) -> Tensor:
    """``(b, c, h, w) -> (b, rows, columns, c * kernel)``."""
    height, width = kernel
    rows, columns = x.shape[2] // height, x.shape[3] // width
    x = x[:, :, : rows * height, : columns * width]
    x = x.reshape(x.shape[0], x.shape[1], rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(x.shape[0], rows, columns, -1)


class _ExportedProduct(QuantizedProduct):
    """A product of codes by codes; scales multiply the result."""

    lowest: Tensor

    def __init__(self, name: str, product: QuantizedProduct) -> None:
        super().__init__(product.index, product.sites, product.operands)
        check_scales_leave_sum(product, name)
        left, right = product.operands
        # Any bytes may be multiplied by signed ones if these are small.
        self.small = max(-right.spec.qmin, right.spec.qmax) <= _LARGEST_SIGNED
        signed, unsigned = torch.int8, torch.uint8
        self.left = _Coded(left, name, signed if self.small and left.spec.qmin < 0 else unsigned)
        self.right = _Coded(right, name, signed if self.small else unsigned)
        self.register_buffer('lowest', torch.tensor(-(2.0**31)))

    @property
    def settled(self) -> bool:
        """Never: the fused attention is not for export."""
        return False

    def forward(self, left: Tensor, right: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        y = multiply(self.left(left), self.right(right))
        if not self.small:
            # OpenVINO runs it in floating point. No sum is below what an accumulator of 32 bits holds; saying so keeps
            # it from multiplying an operand by the scale first, so that it adds whole numbers. (Said by a Clip, it
            # would keep ONNX Runtime from integers.)
            y = torch.maximum(y, self.lowest)
        scale = _wide(self.left.scale_over(left.shape[0]) * self.right.scale_over(right.shape[0]), y)
        # Behind both constants, which OpenVINO would bring together otherwise, with another last bit.
        for units in (self.left.units(left), self.right.units(right)):
            scale = scale if units is None else scale * units
        return y * scale


class _ExportedCompensation(nn.Module):
    bias: Tensor

    def __init__(self, name: str, layer: LinearCompensation) -> None:
        super().__init__()
        self.coded = _Coded(layer.input, name)
        self.matrix = _Matrix(layer.codes, layer.scale, None, axis=1)
        self.register_buffer('bias', layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _multiply(self.coded(x), self.matrix, self.bias)

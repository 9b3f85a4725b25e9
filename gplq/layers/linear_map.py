"""One linear map (Linear, Conv2d, or a third of an attention's input projection) and its quantizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gplq.errors import StageError
from gplq.quantized_linear import quantized_linear
from gplq.quantizer import Quantizer
from gplq.single_precision import SinglePrecision
from gplq.weights import WeightQuantizer

__all__ = ['LinearMap', 'WeightView']


class LinearMap(SinglePrecision):
    """Quantizes the input of a linear map and keeps what the weight stage decides about its weight.

    Args:
        input: quantizer of the input, None to leave it in floating point.
        weight: scales of the weight, None to leave it in floating point.
        rows: output channels.
    """

    bias_correction: Tensor

    def __init__(self, input: Quantizer | None, weight: WeightQuantizer | None, rows: int) -> None:
        super().__init__()
        self.input = input
        self.weight = weight
        # Apart from the layer's bias: some layers have none, others are called with one made on the fly.
        self.register_buffer('bias_correction', torch.zeros(rows))
        self.corrected = False
        # Set while a stage looks on; sees the quantized input and the output of every call, the latter with its
        # gradient where there is one.
        self.watcher: Callable[[Tensor, Tensor], None] | None = None

    def run(
        self,
        operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """``operation(quantized x, weight, bias)``; ``weight`` is already rounded after the weight stage."""
        if self.weight is not None and self.weight.learning:
            weight = self.weight.rounded(weight, self.column_scale)
        if self.corrected:
            correction = self.bias_correction
            bias = correction if bias is None else bias + correction
            bias = bias.to(weight.dtype)
        if operation is F.linear and self.input is not None and self.input.settled and self.watcher is None:
            return quantized_linear(x, weight, bias, self.input.grid(x))
        if self.input is not None:
            x = self.input(x)
        y = operation(x, weight, bias)
        if self.watcher is not None:
            # An attention may be running around this map: its mode must not take the watcher's products for its own.
            with torch._C.DisableTorchFunction():
                self.watcher(x.detach(), y)
        return y

    @property
    def column_scale(self) -> Tensor:
        """Input scale that is folded into the weight's columns, ``(columns,)`` or ``(1,)``; ones if none is."""
        if self.input is None or self.weight is None or not self.weight.folded:
            return torch.ones(1, device=self.bias_correction.device)
        return self.input.scale.detach()


@dataclass(frozen=True)
class WeightView:
    """Where a linear map's weight lies: a parameter of ``owner``, all of its rows or a slice of them.

    ``name`` is the owner's name in the model with the slice's suffix, as ``summary`` prints it.
    """

    name: str
    owner: nn.Module
    map: LinearMap
    parameter: str = 'weight'
    bias: str = 'bias'
    first_row: int = 0
    rows: int | None = None

    def matrix(self) -> Tensor:
        """The weight as ``(rows, columns)``, to read: a copy where the parameter's memory has another order."""
        weight = self._slice()
        return weight.reshape(weight.shape[0], -1)

    def trained_matrix(self) -> Tensor:
        """The weight as ``(rows, columns)`` with its gradient."""
        weight: Tensor = getattr(self.owner, self.parameter)
        weight = weight if self.rows is None else weight[self.first_row : self.first_row + self.rows]
        return weight.reshape(weight.shape[0], -1)

    def bias_vector(self) -> Tensor | None:
        """The owner's bias ``(rows,)``, None if it has none."""
        bias: Tensor | None = getattr(self.owner, self.bias, None)
        if bias is None:
            return None
        bias = bias.detach()
        return bias if self.rows is None else bias[self.first_row : self.first_row + self.rows]

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Put values ``(rows, columns)`` into the parameter."""
        weight = self._slice()
        weight.copy_(matrix.reshape(weight.shape))

    def freeze(self) -> None:
        """Keep optimizers from moving the parameter."""
        getattr(self.owner, self.parameter).requires_grad_(False)

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Integer codes, as FP32, of a rounded weight ``(rows, columns)``.

        Raises:
            StageError: if the weight is no longer what the weight stage made of it, but for a cast.
        """
        quantizer = self.map.weight
        assert quantizer is not None and quantizer.enabled
        matrix = self.matrix()
        column_scale = self.map.column_scale.expand(matrix.shape[1])
        codes = quantizer.codes(matrix, column_scale)
        restored = quantizer.restore(codes, column_scale).to(matrix.dtype)
        # Another device may compute the last bits otherwise.
        precision = torch.finfo(matrix.dtype)
        if not torch.allclose(restored, matrix, rtol=max(1e-5, precision.eps), atol=precision.tiny):
            raise StageError(
                f'{self.name}: the weight was changed after quantize_weights and is no longer on its grid: '
                'train before quantize_weights, and start again from the checkpoint of the activation stage'
            )
        return codes

    def _slice(self) -> Tensor:
        """The parameter, or the rows of it that are this map's; shares its memory."""
        weight: Tensor = getattr(self.owner, self.parameter).detach()
        return weight if self.rows is None else weight[self.first_row : self.first_row + self.rows]

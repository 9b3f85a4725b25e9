"""The activation quantizer: a module that owns a scale (and offset) and calls the pure functions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gplq.functional import fake_quantize, quantize
from gplq.grid import Grid
from gplq.observers import Observer
from gplq.single_precision import SinglePrecision
from gplq.spec import QuantizerSpec

__all__ = ['Part', 'Quantizer']


class Part(NamedTuple):
    """Whole numbers, as floats, and what they are multiplied by beside the scale."""

    codes: Tensor
    factor: Tensor


class Quantizer(SinglePrecision):
    """Quantizes one site; passes values through until it is calibrated and ``enabled``.

    The scale is kept as its logarithm, so that one learning rate moves scales of 0.001 and of 10 by the same
    share and none can become negative. The offset is in steps: values are ``scale * (code + offset)``.

    Args:
        spec: bits, sign, granularity.
        shape: of the scale, to broadcast against the site's tensors, e.g. ``(channels,)`` or ``(heads, 1, 1)``.
        merged_heads: number of heads where they are merged into the batch dimension (``(batch * heads, n, d)``),
            else 0.
    """

    elements_per_scale: Tensor

    def __init__(self, spec: QuantizerSpec, shape: tuple[int, ...], merged_heads: int = 0) -> None:
        super().__init__()
        self.spec = spec
        self.merged_heads = merged_heads
        self.enabled = False
        self.observer: Observer | None = None
        # Share of values that pass as they are, while a reconstruction learns (QDrop).
        self.drop = 0.0
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.offset = nn.Parameter(torch.zeros(shape)) if spec.offset else None
        self.register_buffer('elements_per_scale', torch.ones(()))
        self._scale_gradient: float | None = None

    @property
    def scale(self) -> Tensor:
        """Positive step size, shape as given."""
        return self.log_scale.exp()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the scale."""
        return tuple(self.log_scale.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Quantized values where enabled, ``x`` itself otherwise; shape and dtype of ``x``."""
        if self.observer is not None:
            self.observer.observe(self.groups(x.detach()))
            return x
        if not self.enabled:
            return x
        spec = self.spec
        split = self.split_heads(x)
        scale = self._scale_at(split)
        y = fake_quantize(split, scale, spec.qmin, spec.qmax, self.offset, self.scale_gradient)
        return self._dropped(x, y.view(x.shape) if self.merged_heads else y)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x`` as a float tensor of the same shape."""
        split = self.split_heads(x)
        y = quantize(split, self._scale_at(split), self.spec.qmin, self.spec.qmax, self.offset)
        return y.reshape(x.shape)

    def parts(self, x: Tensor) -> tuple[Part, ...]:
        """The codes in parts that an integer machine multiplies one by one; values are ``scale_of`` times their sum."""
        return (Part(self.codes(x), self.log_scale.new_ones(())),)

    def scale_over(self, batch: int) -> Tensor:
        """The scale for a leading axis of length ``batch``: repeated where heads are merged into that axis."""
        return self.over(self.scale, batch)

    def scale_of(self, x: Tensor) -> Tensor:
        """What the codes of ``x`` are multiplied by, to broadcast against it."""
        return self.scale_over(x.shape[0])

    def _scale_at(self, split: Tensor) -> Tensor:
        """The same against what :meth:`split_heads` makes of it."""
        return self.scale

    def over(self, of_scale: Tensor, batch: int) -> Tensor:
        """What has the scale's shape, for a leading axis of length ``batch``; see :meth:`scale_over`."""
        return of_scale.repeat(batch // self.merged_heads, 1, 1) if self.merged_heads else of_scale

    def grid(self, x: Tensor) -> Grid:
        """How ``x`` is rounded, for operations that do it themselves."""
        return self._grid(self.scale_of(x))

    def grid_over(self, batch: int) -> Grid:
        """The same in units of the scale that is learned, where it is the operation that has the values."""
        return self._grid(self.scale_over(batch))

    def _grid(self, scale: Tensor) -> Grid:
        return Grid(scale, self.spec.qmin, self.spec.qmax, self.offset, self.scale_gradient)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value in units of the scale."""
        shift = torch.zeros_like(self.log_scale) if self.offset is None else self.offset
        return shift + self.spec.qmin, shift + self.spec.qmax

    @property
    def settled(self) -> bool:
        """Whether values are quantized and nobody observes them."""
        return self.enabled and self.observer is None and self.drop == 0

    def _dropped(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.drop == 0 else torch.where(torch.rand_like(x) < self.drop, x, y)

    def groups(self, x: Tensor) -> Tensor:
        """``x`` as a matrix, one row a scale: ``(number of scales, elements that share it)``."""
        x = self.split_heads(x)
        shape = (1,) * (x.dim() - len(self.shape)) + self.shape
        kept = [axis for axis, size in enumerate(shape) if size > 1]
        reduced = [axis for axis in range(x.dim()) if axis not in kept]
        return x.permute(*kept, *reduced).reshape(self.log_scale.numel(), -1)

    @torch.no_grad()
    def initialize(self, scale: Tensor, offset: Tensor | None, *, signed: bool, elements: float) -> None:
        """Take calibrated values and start to quantize.

        Args:
            scale: any shape with as many elements as this quantizer has scales.
            offset: likewise, in steps; None without offset.
            signed: the sign that calibration settled.
            elements: number of values of one sample that share a scale, for LSQ's gradient factor. Counted per
                sample and not per batch, so that ranks and joint batches agree.
        """
        self.spec = replace(self.spec, signed=signed)
        tiny = torch.finfo(torch.float32).tiny
        self.log_scale.copy_(scale.float().clamp(min=tiny).log().reshape(self.shape))
        if self.offset is not None and offset is not None:
            self.offset.copy_(offset.reshape(self.shape))
        self.elements_per_scale.fill_(max(1.0, elements))
        self._scale_gradient = None
        self.enabled = True

    @property
    def scale_gradient(self) -> float:
        """LSQ's ``g = 1 / sqrt(n * qmax)`` (Esser et al. 2020, sec. 2.2); read once, it is on every forward."""
        if self._scale_gradient is None:
            self._scale_gradient = 1.0 / math.sqrt(float(self.elements_per_scale) * self.spec.qmax)
        return self._scale_gradient

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._scale_gradient = None

    def split_heads(self, x: Tensor) -> Tensor:
        """``(batch * heads, n, d)`` -> ``(batch, heads, n, d)`` where heads are merged into the batch."""
        return x.reshape(-1, self.merged_heads, *x.shape[1:]) if self.merged_heads else x

    def extra_repr(self) -> str:
        spec = self.spec
        sign = {None: 'sign open', True: 'signed', False: 'unsigned'}[spec.signed]
        return f'{spec.bits} bit, {sign}, per {spec.granularity}, shape={self.shape}, enabled={self.enabled}'

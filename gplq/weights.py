"""Weight quantization a row (output channel): choice of scale, rounding, and the module that keeps both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gplq.functional import fake_quantize
from gplq.quantiles import PERCENTILES, row_quantiles
from gplq.single_precision import SinglePrecision
from gplq.spec import QuantizerSpec

__all__ = ['WeightQuantizer', 'WeightScales', 'choose_weight_scales', 'restore_weight', 'round_weight']

MSE_RATIOS: tuple[float, ...] = tuple(torch.linspace(1.0, 0.3, 36).tolist())


class WeightScales(NamedTuple):
    """``weight ~ scale * (codes - zero_point)``, one a row; ``zero_point`` is None for symmetric schemes."""

    scale: Tensor
    zero_point: Tensor | None


def round_weight(weight: Tensor, scales: WeightScales, bits: int) -> Tensor:
    """Codes of a matrix ``(rows, columns)``, as floats: signed, or from 0 up with a zero point.

    Scales ``(candidates, rows)`` give the codes of each.
    """
    codes = (weight / scales.scale[..., None]).round_()
    if scales.zero_point is None:
        return codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes.add_(scales.zero_point[..., None]).clamp_(0, 2**bits - 1)


def restore_weight(codes: Tensor, scales: WeightScales) -> Tensor:
    """Values of codes ``(rows, columns)``, with any axes of candidates in front."""
    if scales.zero_point is not None:
        codes = codes - scales.zero_point[..., None]
    return codes * scales.scale[..., None]


def choose_weight_scales(
    weight: Tensor,
    bits: int,
    scheme: str,
    importance: Tensor | None = None,
    ratios: Sequence[float] = MSE_RATIOS,
) -> WeightScales:
    """Scale (and zero point) of each row of ``weight``, ``(rows, columns)``.

    Schemes: ``min_max``; ``percentile``, symmetric (GPLQ sec. 4); ``percentile_asymmetric``, the best by squared
    error of three percentiles (RepQ-ViT's released code); ``mse``, symmetric, the clipping of least squared error.

    Args:
        weight: the matrix in the domain in which it is rounded (input scales folded in).
        bits: 2 to 8.
        scheme: see above.
        importance: mean square of what each column multiplies, ``(columns,)``; weighs the squared error.
        ratios: shares of the largest value that ``mse`` tries.
    """
    if scheme == 'min_max':
        return _symmetric(weight.abs().amax(dim=1), bits)
    if scheme == 'percentile':
        # GPLQ names none; this is the first of RepQ-ViT's three.
        return _symmetric(row_quantiles(weight.abs(), PERCENTILES[0])[0], bits)
    if scheme == 'percentile_asymmetric':
        candidates = [_between(weight, share, bits) for share in PERCENTILES]
    else:
        largest = weight.abs().amax(dim=1)
        candidates = [_symmetric(largest * ratio, bits) for ratio in ratios]
    return _best(weight, candidates, bits, importance)


def _best(weight: Tensor, candidates: list[WeightScales], bits: int, importance: Tensor | None) -> WeightScales:
    scale, zero_point = candidates[0]
    least = torch.full_like(scale, torch.inf)
    for candidate in candidates:
        error = (restore_weight(round_weight(weight, candidate, bits), candidate) - weight).square_()
        if importance is not None:
            error.mul_(importance)
        total = error.sum(dim=1)
        better = total < least
        least = torch.where(better, total, least)
        scale = torch.where(better, candidate.scale, scale)
        if zero_point is not None and candidate.zero_point is not None:
            zero_point = torch.where(better, candidate.zero_point, zero_point)
    return WeightScales(scale, zero_point)


def _symmetric(largest: Tensor, bits: int) -> WeightScales:
    scale = largest / (2 ** (bits - 1) - 1)
    return WeightScales(torch.where(scale > 0, scale, torch.ones_like(scale)), None)


def _between(weight: Tensor, share: float, bits: int) -> WeightScales:
    low, high = row_quantiles(weight, 1 - share, share)
    return _asymmetric(low, high, bits)


def _asymmetric(low: Tensor, high: Tensor, bits: int) -> WeightScales:
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return WeightScales(scale, (-low / scale).round())


def _relative(column_scale: Tensor) -> Tensor:
    """Input scales without their geometric mean, as constants."""
    column_scale = column_scale.detach()
    return column_scale / column_scale.log().mean().exp()


class WeightQuantizer(SinglePrecision):
    """Scales of one weight matrix and the rounding itself; empty until the weight stage.

    The layer's own parameter then holds the rounded values, so every FP32 key keeps its meaning; the codes
    follow from it (:meth:`codes`).

    Args:
        bits: 2 to 8.
        rows: output channels.
        asymmetric: whether there is a zero point a row.
        folded: whether codes are those of ``weight * input scale``.
        learned: for weights that are rounded while the model is trained, how their steps are found, see
            :class:`gplq.Recipe`; ``log_scale`` is gone once the weight stage has settled them.
    """

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, bits: int, rows: int, *, asymmetric: bool, folded: bool, learned: str | None = None) -> None:
        super().__init__()
        self.learning = False
        self.learned = learned
        self.log_scale = None
        if learned is not None:
            self.log_scale = nn.Parameter(torch.zeros(rows), requires_grad=learned != 'statistics')
        self.spec = QuantizerSpec(bits, signed=not asymmetric, granularity='channel', offset=asymmetric)
        self.folded = folded
        self.enabled = False
        # Whether `scale` is what a search found and the weight stage is to take.
        self.proposed = False
        self.register_buffer('scale', torch.ones(rows))
        self.register_buffer('zero_point', torch.zeros(rows) if asymmetric else None)

    @property
    def scales(self) -> WeightScales:
        return WeightScales(self.scale, self.zero_point)

    @torch.no_grad()
    def start_learning(self, weight: Tensor, column_scale: Tensor) -> None:
        """Take the scales of least squared error of ``weight``, ``(rows, columns)``, and round it from now on."""
        assert self.log_scale is not None
        folded = weight.float() * _relative(column_scale)
        if self.learned == 'statistics':
            self._follow(folded)
        else:
            self.log_scale.copy_(choose_weight_scales(folded, self.spec.bits, 'mse').scale.log())
        self.learning = True

    @torch.no_grad()
    def _follow(self, folded: Tensor) -> None:
        """Steps by which twice the mean size of a row takes half of the codes (OFQ's StatsQ).

        The released code's levels lie between whole numbers; these are whole, as the integer product needs them.
        """
        assert self.log_scale is not None
        step = 2 * folded.abs().mean(dim=1) / 2 ** (self.spec.bits - 1)
        self.log_scale.copy_(step.clamp(min=torch.finfo(torch.float32).tiny).log())

    def _steps(self, folded: Tensor) -> Tensor:
        """The step of each row, ``(rows,)``, with the gradient that training takes."""
        assert self.log_scale is not None
        if self.learned == 'statistics':
            if torch.is_grad_enabled():
                self._follow(folded.detach())
            return self.log_scale.detach().exp()
        if self.learned != 'norm':
            return self.log_scale.exp()
        # VVTQ's factor has the sum of sizes where LSQ's has their number: 1 / sqrt(qmax * ||w||_1).
        factor = folded.detach().abs().mean(dim=1).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
        return (self.log_scale * factor + (self.log_scale * (1 - factor)).detach()).exp()

    def rounded(self, weight: Tensor, column_scale: Tensor) -> Tensor:
        """``weight``, of a Linear or a convolution, on the grid of its steps; with LSQ's gradients.

        The grid is that of the weight with the input scales folded in, so that the weight stage keeps it. Their common
        size is left out: an input scale that grows does not make the weight's steps larger.
        """
        assert self.log_scale is not None
        matrix = weight.reshape(weight.shape[0], -1)
        relative = _relative(column_scale)
        factor = (matrix.shape[1] * self.spec.qmax) ** -0.5
        folded = matrix * relative
        y = fake_quantize(folded, self._steps(folded)[:, None], self.spec.lowest, self.spec.qmax, None, factor)
        return (y / relative).reshape(weight.shape).to(weight.dtype)

    def on_grid(self, matrix: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
        """While it learns: a weight ``(rows, columns)`` as it is rounded, and the step of each row."""
        assert self.log_scale is not None
        return matrix * _relative(column_scale), self.log_scale.detach().exp()

    @torch.no_grad()
    def settle_learning(self, column_scale: Tensor) -> WeightScales:
        """Stop learning; the scales of the folded weight."""
        assert self.log_scale is not None
        common = (column_scale / _relative(column_scale)).reshape(-1)[0]
        scales = WeightScales(self.log_scale.exp() * common, None)
        self.forget_learning()
        return scales

    def forget_learning(self) -> None:
        """Round no longer while the model runs; the weights are rounded, or about to be."""
        self.learning = False
        self.log_scale = None

    @torch.no_grad()
    def propose(self, scale: Tensor) -> None:
        """Take scales ``(rows,)`` that a search has found, for :meth:`keep` to come."""
        self.scale.copy_(scale)
        self.proposed = True

    def forget_proposal(self) -> None:
        """The input's scales have changed, and with them the folded weight that a search has seen."""
        self.proposed = False

    @torch.no_grad()
    def keep(self, values: Tensor, column_scale: Tensor, scales: WeightScales) -> Tensor:
        """Keep ``scales`` and return ``values``, which lie on their grid, unfolded; both ``(rows, columns)``.

        ``column_scale``, ``(columns,)`` or one value, is the input scale that ``values`` have folded in.
        """
        self.scale.copy_(scales.scale)
        if self.zero_point is not None and scales.zero_point is not None:
            self.zero_point.copy_(scales.zero_point)
        self.enabled = True
        return values / column_scale

    def restore(self, codes: Tensor, column_scale: Tensor) -> Tensor:
        """The unfolded matrix that codes ``(rows, columns)`` stand for."""
        return restore_weight(codes, self.scales) / column_scale

    def codes(self, weight: Tensor, column_scale: Tensor) -> Tensor:
        """Integer codes, as FP32, of a matrix that :meth:`keep` returned, whatever it was cast to since."""
        return round_weight(weight.float() * column_scale, self.scales, self.spec.bits)

"""One weight rounded in place: scales suit what the inputs weigh, and the mean error goes into the bias."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gplq
from gplq.column_statistics import ColumnStatistics
from gplq.layers import LinearMap, WeightView
from gplq.quantizer import Quantizer
from gplq.rounding import round_view
from gplq.spec import QuantizerSpec
from gplq.weights import WeightQuantizer

# Two bits, symmetric: codes -2, -1, 0, 1, so a positive weight is 0 or the scale itself.
NEAREST = gplq.Recipe(weight_bits=2, rounding='nearest')


def view_of(weight: list[float], input_scale: list[float] | None = None, *, offset: bool = False) -> WeightView:
    """A Linear of one output without bias."""
    layer = nn.Linear(len(weight), 1, bias=False)
    layer.weight.data = torch.tensor([weight])
    quantizer = None
    if input_scale is not None:
        quantizer = Quantizer(QuantizerSpec(4, signed=not offset, granularity='channel', offset=offset), (len(weight),))
        shift = torch.full((len(weight),), -3.0) if offset else None
        quantizer.initialize(torch.tensor(input_scale), shift, signed=not offset, elements=1)
    return WeightView('layer', layer, LinearMap(quantizer, WeightQuantizer(2, 1, asymmetric=False, folded=True), 1))


def statistics_of(x: list[list[float]]) -> ColumnStatistics:
    statistics = ColumnStatistics(len(x[0]), torch.device('cpu'))
    statistics.add(torch.tensor(x))
    return statistics


def rounded(view: WeightView) -> list[float]:
    values: list[float] = view.matrix()[0].tolist()
    return values


def test_without_statistics_all_columns_count_the_same() -> None:
    """(1 - s)^2 + (0.5 - s)^2 is least at s = 0.75; the grid of ratios has 0.74 and 0.76."""
    view = view_of([1.0, 0.5])
    round_view(view, NEAREST, None)
    assert rounded(view) == pytest.approx([0.75, 0.75], abs=0.011)
    assert not view.map.corrected


def test_columns_whose_inputs_are_large_decide_the_scale() -> None:
    """The first column multiplies next to nothing, so the scale is the second one's weight."""
    view = view_of([1.0, 0.5])
    round_view(view, NEAREST, statistics_of([[0.01, 10.0], [-0.01, -10.0]]))
    assert rounded(view) == pytest.approx([0.5, 0.5])


def test_importance_is_that_of_folded_columns() -> None:
    """Inputs of the same size: an error of the first folded column, divided by its scale of 10, is a tenth in y."""
    view = view_of([0.1, 0.5], input_scale=[10.0, 1.0])
    round_view(view, NEAREST, statistics_of([[1.0, 1.0], [-1.0, -1.0]]))
    assert float(view.map.weight.scale) == pytest.approx(0.5, abs=0.011)  # type: ignore[union-attr]
    assert rounded(view) == pytest.approx([0.05, 0.5], abs=0.011)


@pytest.mark.parametrize('rounding', ['nearest', 'feedback', 'descent'])
def test_the_mean_output_stays(rounding: str) -> None:
    view = view_of([1.0, 0.5, -0.3])
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 1.0, -2.0])
    before = (x @ view.matrix().t()).mean()
    round_view(view, NEAREST.replace(rounding=rounding), statistics_of(x.tolist()))
    y = view.map.run(nn.functional.linear, x, view.owner.weight, None)  # type: ignore[arg-type]
    assert float(view.map.bias_correction.abs()) > 0.01
    assert float(y.detach().mean()) == pytest.approx(float(before), abs=1e-5)


def test_descent_has_less_error_around_the_mean_than_feedback() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator) + 5
    errors = []
    for rounding in ('nearest', 'feedback', 'descent'):
        weight = torch.randn(24, generator=torch.Generator().manual_seed(1))
        view = view_of(weight.tolist())
        round_view(view, NEAREST.replace(rounding=rounding), statistics_of(x.tolist()))
        y = view.map.run(nn.functional.linear, x, view.owner.weight, None)  # type: ignore[arg-type]
        errors.append(float((y.detach()[:, 0] - x @ weight).square().mean()))
    assert errors[2] < 0.8 * errors[1] < errors[0]


def test_the_correction_by_hand() -> None:
    """Rounded to (0.5, 0.5): what is missing is 0.5 of the first input, whose mean is 0.004."""
    view = view_of([1.0, 0.5])
    round_view(view, NEAREST, statistics_of([[0.01, 10.0], [-0.002, -10.0]]))
    assert view.map.corrected
    assert view.map.bias_correction.tolist() == pytest.approx([0.5 * 0.004], rel=1e-4)


def test_without_statistics_a_channels_offset_counts_from_the_mean_offset() -> None:
    """Inputs are scale * (code + offset). Folded, the weights are (2, 0.5); rounded (2, 0), unfolded (1, 0)."""
    ranges = NEAREST.replace(exponents=(1.0,), clips=(1.0,), balance=False)
    view = view_of([1.0, 0.5], input_scale=[2.0, 1.0], offset=True)
    round_view(view, ranges, None)
    assert rounded(view) == pytest.approx([1.0, 0.0])
    assert view.map.bias_correction.tolist() == pytest.approx([0.0]), 'all offsets are alike: codes lie around them'
    view = view_of([1.0, 0.5], input_scale=[2.0, 1.0], offset=True)
    view.map.input.offset.data = torch.tensor([-1.0, -5.0])  # type: ignore[union-attr]
    round_view(view, ranges, None)
    # The mean offset is -3. What rounding took from the second weight, 0.5, meets an input 1 * (-5 + 3) from there.
    assert view.map.bias_correction.tolist() == pytest.approx([0.5 * -2])
    view = view_of([1.0, 0.5], input_scale=[2.0, 1.0], offset=True)
    view.map.input.offset.data = torch.tensor([-1.0, -5.0])  # type: ignore[union-attr]
    round_view(view, NEAREST, None)
    assert not view.map.corrected, 'scales that were searched for make offsets that say nothing of the inputs'


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_codes_survive_few_digits(dtype: torch.dtype) -> None:
    """What is held after rounding is what a saved file restores from the codes, to the last bit."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False).to(dtype)
    quantizer = WeightQuantizer(8, 32, asymmetric=True, folded=True)
    view = WeightView('layer', layer, LinearMap(None, quantizer, 32))
    layer.weight.data = (torch.randn(32, 64) + 2).to(dtype)
    round_view(view, gplq.Recipe.repq_vit(8, 8), None)
    columns = torch.ones(64)
    held = view.matrix().clone()
    assert torch.equal(quantizer.restore(quantizer.codes(held, columns), columns).to(dtype), held)


def test_another_matrix_is_rounded_in_its_place() -> None:
    view = view_of([1.0, 0.5])
    round_view(view, NEAREST, None, torch.tensor([[0.0, 3.0]]))
    assert rounded(view) == pytest.approx([0.0, 3.0])

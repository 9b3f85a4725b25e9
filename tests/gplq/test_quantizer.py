"""The quantizer module: grouping of elements by scale, calibration, LSQ's gradient factor."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from gplq.observers import MinMaxObserver
from gplq.quantizer import Quantizer
from gplq.spec import QuantizerSpec


def test_passes_values_until_initialized() -> None:
    quantizer = Quantizer(QuantizerSpec(4), (1,))
    x = torch.randn(3, 4)
    assert quantizer(x) is x
    quantizer.initialize(torch.tensor(0.5), None, signed=True, elements=4)
    assert not torch.equal(quantizer(x), x)
    assert quantizer.scale.item() == pytest.approx(0.5)


def test_groups_of_channels() -> None:
    quantizer = Quantizer(QuantizerSpec(4, granularity='channel'), (2,))
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    assert quantizer.groups(x).tolist() == [[1.0, 3.0], [2.0, 4.0]]


def test_groups_of_heads() -> None:
    """``(batch, heads, n, d)`` with one scale a head."""
    quantizer = Quantizer(QuantizerSpec(4, granularity='head'), (2, 1, 1))
    x = torch.arange(16.0).reshape(2, 2, 2, 2)
    assert quantizer.groups(x).tolist() == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]


def test_heads_merged_into_the_batch() -> None:
    """``(batch * heads, n, d)`` is quantized as ``(batch, heads, n, d)`` is."""
    scale = torch.tensor([0.1, 0.7])
    apart = Quantizer(QuantizerSpec(4, granularity='head'), (2, 1, 1))
    merged = Quantizer(QuantizerSpec(4, granularity='head'), (2, 1, 1), merged_heads=2)
    for quantizer in (apart, merged):
        quantizer.initialize(scale, None, signed=True, elements=1)
    x = torch.randn(3, 2, 4, 5)
    flat = x.reshape(6, 4, 5)
    assert torch.equal(merged(flat), apart(x).reshape(6, 4, 5))
    assert torch.equal(merged.codes(flat), apart.codes(x).reshape(6, 4, 5))
    assert torch.equal(merged.groups(flat), apart.groups(x))
    assert torch.allclose(merged.codes(flat) * merged.scale_over(6), merged(flat))


def test_per_head_and_channel() -> None:
    quantizer = Quantizer(QuantizerSpec(4, granularity='channel'), (2, 1, 3))
    x = torch.arange(24.0).reshape(2, 2, 2, 3)
    groups = quantizer.groups(x)
    assert groups.shape == (6, 4)
    assert groups[0].tolist() == [0, 3, 12, 15]
    assert groups[5].tolist() == [8, 11, 20, 23]


def test_no_groups_mix_when_the_batch_is_one() -> None:
    quantizer = Quantizer(QuantizerSpec(4, granularity='channel'), (3,))
    x = torch.arange(3.0).reshape(1, 3)
    assert quantizer.groups(x).tolist() == [[0.0], [1.0], [2.0]]


def test_gradient_of_the_scale_does_not_depend_on_the_batch() -> None:
    """Twice the same samples, mean loss: the same gradient, whatever was calibrated in one batch or two ranks."""

    def gradient(x: torch.Tensor) -> torch.Tensor:
        quantizer = Quantizer(QuantizerSpec(4), (1,))
        quantizer.initialize(torch.tensor(0.3), None, signed=True, elements=x[0].numel())
        quantizer(x).square().flatten(1).sum(1).mean().backward()
        assert quantizer.log_scale.grad is not None
        return quantizer.log_scale.grad

    x = torch.randn(4, 5, 6)
    assert torch.allclose(gradient(x), gradient(torch.cat([x, x])))


def test_gradient_factor_is_lsq_s() -> None:
    quantizer = Quantizer(QuantizerSpec(4), (1,))
    quantizer.initialize(torch.tensor(0.3), None, signed=True, elements=100)
    assert quantizer.scale_gradient == pytest.approx((100 * 7) ** -0.5)
    quantizer.initialize(torch.tensor(0.3), None, signed=False, elements=400)
    assert quantizer.scale_gradient == pytest.approx((400 * 15) ** -0.5)


def test_gradient_of_the_logarithm() -> None:
    """d/d(log s) = s * d/ds, by hand: one value clipped at 7, upstream 1, factor 1 / sqrt(1 * 7)."""
    quantizer = Quantizer(QuantizerSpec(4), (1,))
    quantizer.initialize(torch.tensor(0.5), None, signed=True, elements=1)
    quantizer(torch.tensor([100.0])).sum().backward()
    assert quantizer.log_scale.grad is not None
    assert float(quantizer.log_scale.grad) == pytest.approx(0.5 * 7 / 7**0.5, rel=1e-5)


def test_loading_another_element_count_renews_the_factor() -> None:
    first = Quantizer(QuantizerSpec(4), (1,))
    first.initialize(torch.tensor(0.3), None, signed=True, elements=100)
    second = Quantizer(QuantizerSpec(4), (1,))
    second.initialize(torch.tensor(0.3), None, signed=True, elements=1)
    assert second.scale_gradient != first.scale_gradient
    second.load_state_dict(first.state_dict())
    assert second.scale_gradient == first.scale_gradient


def test_zero_scale_stays_finite() -> None:
    quantizer = Quantizer(QuantizerSpec(4), (2,))
    quantizer.initialize(torch.tensor([0.0, 1.0]), None, signed=True, elements=1)
    assert bool(quantizer(torch.tensor([[0.0, 3.0]])).isfinite().all())


def test_observing_sees_values_and_passes_them() -> None:
    quantizer = Quantizer(QuantizerSpec(4, granularity='channel'), (2,))
    quantizer.observer = MinMaxObserver()
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]], requires_grad=True)
    assert quantizer(x) is x
    assert quantizer.observer.seen.low.tolist() == [1.0, -2.0]
    assert quantizer.observer.seen.high.tolist() == [3.0, 4.0]


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies_own_their_scale(copied) -> None:  # type: ignore[no-untyped-def]
    quantizer = Quantizer(QuantizerSpec(4), (1,))
    quantizer.initialize(torch.tensor(0.5), None, signed=False, elements=1)
    twin = copied(quantizer)
    x = torch.randn(5)
    assert torch.equal(twin(x), quantizer(x))
    with torch.no_grad():
        twin.log_scale.add_(1)
    assert quantizer.scale.item() == pytest.approx(0.5)


def test_state_dict_holds_no_more_than_it_needs() -> None:
    keys = Quantizer(QuantizerSpec(4, signed=False, offset=True), (1,)).state_dict().keys()
    assert set(keys) == {'log_scale', 'offset', 'elements_per_scale'}

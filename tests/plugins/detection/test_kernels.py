"""Answers are worked out by hand, or by another formula than torchvision's."""

from __future__ import annotations

import math

import gplq.plugins.detection  # isort: skip  (before mmcv.ops)
import pytest
import torch
from mmcv.ops import (
    DeformConv2d,
    ModulatedDeformConv2d,
    MultiScaleDeformableAttention,
    nms,
    roi_align,
    sigmoid_focal_loss,
    soft_nms,
)
from torch.nn import functional as F

# The second box covers half of the first and a half of its own size beside it: IoU 50 / 150.
BOXES = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [40, 40, 50, 50]])
SCORES = torch.tensor([0.9, 0.8, 0.7])


def test_plugin_is_what_mmcv_found() -> None:
    assert gplq.plugins.detection.install_operators()


@pytest.mark.parametrize(('threshold', 'kept'), [(0.3, [0, 2]), (0.34, [0, 1, 2])])
def test_nms_suppresses_above_the_threshold(threshold: float, kept: list[int]) -> None:
    dets, indices = nms(BOXES, SCORES, threshold)
    assert indices.tolist() == kept
    assert torch.equal(dets, torch.cat([BOXES, SCORES[:, None]], dim=1)[kept])


def test_nms_with_offset_counts_pixels() -> None:
    # 11 x 11 pixels each, 6 x 11 shared: 66 / (242 - 66) = 0.375.
    assert nms(BOXES, SCORES, 0.37, offset=1)[1].tolist() == [0, 2]
    assert nms(BOXES, SCORES, 0.38, offset=1)[1].tolist() == [0, 1, 2]


def test_nms_reads_bfloat16() -> None:
    assert nms(BOXES.bfloat16(), SCORES.bfloat16(), 0.3)[1].tolist() == [0, 2]


@pytest.mark.parametrize(
    ('method', 'second'), [('linear', 0.8 * (1 - 1 / 3)), ('gaussian', 0.8 * math.exp(-1 / 9 / 0.5))]
)
def test_soft_nms_lowers_the_overlapping_score(method: str, second: float) -> None:
    dets, indices = soft_nms(BOXES, SCORES, iou_threshold=0.3, sigma=0.5, method=method)
    expected = {0: 0.9, 1: second, 2: 0.7}
    assert indices.tolist() == sorted(expected, key=lambda i: -expected[i])
    assert torch.equal(dets[:, :4], BOXES[indices])
    assert dets[:, 4].tolist() == pytest.approx([expected[i] for i in indices.tolist()])


def test_soft_nms_drops_what_falls_below_the_least_score() -> None:
    _, indices = soft_nms(BOXES, SCORES, iou_threshold=0.3, min_score=0.6, method='linear')
    assert indices.tolist() == [0, 2]


def test_roi_align_reads_a_linear_map_at_the_centers_of_the_bins() -> None:
    # Bilinear samples of f(y, x) = 10 y + x are exact, and their mean is f at the middle of the bin.
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing='ij')
    feature_map = (10 * rows + columns)[None, None]
    roi = torch.tensor([[0, 2.0, 4.0, 10.0, 12.0]])  # image coordinates, stride 2: columns 1 to 5, rows 2 to 6
    pooled = roi_align(feature_map, roi, 2, 0.5, 2, 'avg', True)
    # The center of the first bin lies at column 1 + 1 and row 2 + 1 of a map whose pixel centers are at + 0.5.
    corner = 10 * 2.5 + 1.5
    assert torch.allclose(pooled[0, 0], corner + torch.tensor([[0.0, 2.0], [20.0, 22.0]]))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_roi_align_spreads_the_whole_gradient_on_the_right_image(dtype: torch.dtype) -> None:
    feature_map = torch.zeros(2, 3, 8, 8, dtype=dtype, requires_grad=True)
    roi = torch.tensor([[1, 2.0, 4.0, 10.0, 12.0]], dtype=dtype)
    roi_align(feature_map, roi, 2, 0.5, 2, 'avg', True).sum().backward()
    # Each bin is a mean, whose weights add up to one: four bins a channel.
    assert feature_map.grad[0].abs().max() == 0
    assert torch.allclose(feature_map.grad[1].sum(dim=(1, 2)), torch.full((3,), 4.0, dtype=dtype))


def test_roi_align_gradient_matches_differences() -> None:
    feature_map = torch.rand(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    roi = torch.tensor([[0, 0.3, 0.4, 3.9, 4.2]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, roi, 2, 1.0, 2, 'avg', True), feature_map)


def test_roi_align_by_maximum_says_what_it_needs() -> None:
    with pytest.raises(NotImplementedError, match="pool_mode='max'.*compiled"):
        roi_align(torch.zeros(1, 1, 4, 4), torch.tensor([[0, 0.0, 0, 4, 4]]), 2, 1.0, 2, 'max', True)


def test_deform_conv_with_whole_offsets_reads_the_shifted_map() -> None:
    conv = DeformConv2d(2, 3, 3, padding=1)
    x = torch.rand(1, 2, 6, 6, requires_grad=True)
    offset = torch.zeros(1, 18, 6, 6)
    offset[:, 1::2] = 1  # (y, x) pairs: every sample one column further right
    shifted = F.pad(x, (0, 1))[..., 1:]
    out = conv(x, offset)
    expected = F.conv2d(shifted, conv.weight, padding=1)
    # The last column's samples would lie two columns outside; the first one's left neighbour is column 0.
    assert torch.allclose(out[..., 1:], expected[..., 1:], atol=1e-5)
    out[..., 1:].square().sum().backward()
    gradients = conv.weight.grad.clone(), x.grad.clone()
    conv.weight.grad, x.grad = None, None
    expected[..., 1:].square().sum().backward()
    assert torch.allclose(gradients[0], conv.weight.grad, atol=1e-3)
    assert torch.allclose(gradients[1], x.grad, atol=1e-3)


def test_modulated_deform_conv_scales_samples() -> None:
    conv = ModulatedDeformConv2d(2, 3, 3, padding=1, bias=True)
    torch.nn.init.constant_(conv.bias, 0.25)
    x, offset, mask = torch.rand(1, 2, 5, 5), torch.zeros(1, 18, 5, 5), torch.full((1, 9, 5, 5), 0.5)
    mask.requires_grad_()
    out = conv(x, offset, mask)
    assert torch.allclose(out, F.conv2d(x, conv.weight, padding=1) * 0.5 + 0.25, atol=1e-5)
    out.sum().backward()
    # The output is linear in the mask and 0.5 times its gradient everywhere is the output without bias.
    assert (0.5 * mask.grad).sum().item() == pytest.approx((out - 0.25).sum().item(), rel=1e-4)
    assert conv.bias.grad.tolist() == [25.0] * 3


def test_sigmoid_focal_loss_at_zero_logits() -> None:
    # p = 1/2 everywhere: alpha_t * (1/2) ** 2 * ln 2; target 2 of two classes is background.
    logits = torch.zeros(2, 2, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 2]), 2.0, 0.25, None, 'none')
    quarter = math.log(2) / 4
    assert torch.allclose(loss, quarter * torch.tensor([[0.25, 0.75], [0.75, 0.75]]))
    loss.sum().backward()
    step = 1e-3
    for row, column in [(0, 0), (1, 1)]:
        moved = logits.detach().clone()
        moved[row, column] += step
        above = sigmoid_focal_loss(moved, torch.tensor([0, 2]), 2.0, 0.25, None, 'sum')
        moved[row, column] -= 2 * step
        below = sigmoid_focal_loss(moved, torch.tensor([0, 2]), 2.0, 0.25, None, 'sum')
        assert logits.grad[row, column].item() == pytest.approx((above - below).item() / (2 * step), rel=1e-2)


def test_deformable_attention_of_zero_offsets_samples_the_reference_point() -> None:
    from gplq.plugins.detection.kernels import ms_deform_attn_backward, ms_deform_attn_forward

    value = torch.arange(4.0).reshape(1, 4, 1, 1)  # one 2 x 2 map, one head, one channel
    shapes, starts = torch.tensor([[2, 2]]), torch.tensor([0])
    location = torch.tensor([0.75, 0.25]).reshape(1, 1, 1, 1, 1, 2)  # (x, y): the center of the pixel 1
    weight = torch.full((1, 1, 1, 1, 1), 0.5)
    out = ms_deform_attn_forward(value, shapes, starts, location, weight, 64)
    assert out.item() == pytest.approx(0.5)
    gradients = torch.zeros_like(value), torch.zeros_like(location), torch.zeros_like(weight)
    ms_deform_attn_backward(value, shapes, starts, location, weight, torch.ones_like(out), *gradients, 64)
    assert gradients[0].flatten().tolist() == pytest.approx([0, 0.5, 0, 0])
    assert gradients[2].item() == pytest.approx(1.0)


def test_deformable_attention_module_trains() -> None:
    module = MultiScaleDeformableAttention(embed_dims=8, num_heads=2, num_levels=1, num_points=2, batch_first=True)
    query = torch.rand(1, 3, 8)
    out = module(
        query,
        value=torch.rand(1, 4, 8),
        reference_points=torch.full((1, 3, 1, 2), 0.5),
        spatial_shapes=torch.tensor([[2, 2]]),
        level_start_index=torch.tensor([0]),
    )
    out.sum().backward()
    assert out.shape == (1, 3, 8)
    assert module.value_proj.weight.grad.abs().sum() > 0

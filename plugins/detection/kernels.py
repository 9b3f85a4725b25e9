"""What mmcv's compiled operators do, on the kernels of torchvision."""

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

__all__ = [
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
    'nms',
    'roi_align_backward',
    'roi_align_forward',
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softnms',
]

# Names, argument order and the habit of filling tensors given as arguments are mmcv's.


def _computable(tensor: Tensor) -> Tensor:
    """Give a half-precision tensor in float32: torchvision has no bfloat16 kernels and few half ones."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that survive, best first: (N, 4), (N,) -> (K,)."""
    boxes = _computable(boxes)
    if offset:
        # A box from x1 to x2 is then x2 - x1 + 1 wide.
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the scores of overlapping boxes instead of removing them (Soft-NMS, eqs. 1 to 3).

    Fills `dets` (N, 5) with boxes and new scores and returns their indices (K,); rows from K on stay as they
    were. `method` is 0 for removal, 1 for linear and 2 for Gaussian decay.
    """
    scores = scores.clone()
    alive = torch.ones_like(scores, dtype=torch.bool)
    size = boxes[:, 2:] - boxes[:, :2] + offset
    area = size[:, 0] * size[:, 1]
    kept: list[int] = []
    for _ in range(len(scores)):
        best = int(torch.where(alive, scores, -torch.inf).argmax())
        if not alive[best]:
            break
        dets[len(kept), :4] = boxes[best]
        dets[len(kept), 4] = scores[best]
        kept.append(best)
        alive[best] = False
        corner = torch.minimum(boxes[:, 2:], boxes[best, 2:]) - torch.maximum(boxes[:, :2], boxes[best, :2]) + offset
        overlap = corner.clamp(min=0).prod(dim=1)
        iou = overlap / (area + area[best] - overlap)
        if method == 2:
            decay = torch.exp(-(iou**2) / sigma)
        else:
            decay = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else torch.zeros_like(iou), 1.0)
        scores = torch.where(alive, scores * decay, scores)
        alive &= scores >= min_score
    return torch.tensor(kept, dtype=torch.long)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average bilinear samples in each bin of each region into `output` (K, C, height, width)."""
    if pool_mode != 1:
        raise NotImplementedError("RoIAlign with pool_mode='max' needs mmcv's compiled operators; 'avg' does not")
    features = _computable(input)
    output.copy_(
        torch.ops.torchvision.roi_align(
            features,
            rois.to(features.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            sampling_ratio,
            aligned,
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of `roi_align_forward` to `grad_input` (N, C, H, W)."""
    gradient = _computable(grad_output)
    grad_input += torch.ops.torchvision._roi_align_backward(
        gradient,
        rois.to(gradient.dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Convolve at learned offsets (Deformable ConvNets, eq. 2) into `output`."""
    output.copy_(
        torch.ops.torchvision.deform_conv2d(
            *_unmodulated(input, weight, offset),
            *(dH, dW, padH, padW, dilationH, dilationW, group, deformable_group),
            False,
        )
    )


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fill the gradients of `deform_conv_forward` with respect to input and offset."""
    gradients = torch.ops.torchvision._deform_conv2d_backward(
        _computable(grad_output),
        *_unmodulated(input, weight, offset),
        *(dH, dW, padH, padW, dilationH, dilationW, group, deformable_group),
        False,
    )
    grad_input.copy_(gradients[0])
    grad_offset.copy_(gradients[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add `scale` times the gradient of `deform_conv_forward` with respect to the weight."""
    gradients = torch.ops.torchvision._deform_conv2d_backward(
        _computable(grad_output),
        *_unmodulated(input, grad_weight, offset),
        *(dH, dW, padH, padW, dilationH, dilationW, group, deformable_group),
        False,
    )
    grad_weight += scale * gradients[1]


def _unmodulated(input: Tensor, weight: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    """Give torchvision's first five operands when there is neither mask nor bias."""
    input = _computable(input)
    # torchvision wants tensors in these places; with use_mask=False it does not read the mask.
    mask = input.new_zeros((input.shape[0], 1))
    return input, _computable(weight), _computable(offset), mask, input.new_zeros(weight.shape[0])


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Convolve at learned offsets with learned weights of the samples (Deformable ConvNets v2, eq. 1)."""
    input = _computable(input)
    output.copy_(
        torch.ops.torchvision.deform_conv2d(
            input,
            _computable(weight),
            _computable(offset),
            _computable(mask),
            _computable(bias) if with_bias else input.new_zeros(weight.shape[0]),
            *(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group),
            True,
        )
    )


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill the gradients of `modulated_deform_conv_forward`."""
    input = _computable(input)
    gradients = torch.ops.torchvision._deform_conv2d_backward(
        _computable(grad_output),
        input,
        _computable(weight),
        _computable(offset),
        _computable(mask),
        _computable(bias) if with_bias else input.new_zeros(weight.shape[0]),
        *(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group),
        True,
    )
    for target, gradient in zip((grad_input, grad_weight, grad_offset, grad_mask), gradients, strict=False):
        target.copy_(gradient)
    if with_bias:
        grad_bias.copy_(gradients[4])


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Attend to a few sampled points of every level (Deformable DETR, eq. 3) by mmcv's own torch code."""
    # Not at the top: importing mmcv.ops needs this module's functions in place.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Fill the gradients of `ms_deform_attn_forward`, which is computed once more."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (value, sampling_locations, attention_weights)]
        output = ms_deform_attn_forward(
            leaves[0], value_spatial_shapes, value_level_start_index, leaves[1], leaves[2], im2col_step
        )
        gradients = torch.autograd.grad(output, leaves, grad_output)
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        target.copy_(gradient)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `output` (N, C) with the focal loss (RetinaNet, eq. 5) of classes `target` (N,), C for none."""
    output.copy_(_sigmoid_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill `grad_input` (N, C) with the derivative of each loss with respect to its logit."""
    with torch.enable_grad():
        leaf = input.detach().requires_grad_()
        loss = _sigmoid_focal_loss(leaf, target, weight, gamma, alpha)
        grad_input.copy_(torch.autograd.grad(loss.sum(), leaf)[0])


def _sigmoid_focal_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    if weight.numel():
        raise NotImplementedError("sigmoid_focal_loss with class weights needs mmcv's compiled operators")
    logit = input.float()
    positive = target[:, None] == torch.arange(logit.shape[1], device=logit.device)
    probability = torch.where(positive, logit.sigmoid(), 1 - logit.sigmoid())
    log_probability = torch.nn.functional.logsigmoid(torch.where(positive, logit, -logit))
    balance = torch.where(positive, alpha, 1 - alpha)
    return (-balance * (1 - probability) ** gamma * log_probability).to(input.dtype)

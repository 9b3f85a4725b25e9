"""Layer normalization over the channels of a feature map."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ['LN2d']


class LN2d(nn.Module):
    """Normalize each position of a map over its channels (ViTDet, section 3): (N, C, H, W) -> (N, C, H, W).

    Under autocast it computes and answers in float32 on every device: mmdet casts the coordinates of
    regions of interest to the maps' type, and bfloat16 would round them to whole pixels.
    """

    # mmcv names a norm inside a ConvModule after its class: without `layer`, `batch` or `group` in the
    # class's name it becomes `norm_layer`, which is the key in the published checkpoints.
    def __init__(self, num_features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()
        channels_last = x.permute(0, 2, 3, 1)
        normalized = F.layer_norm(channels_last, self.weight.shape, self.weight, self.bias, self.eps)
        return normalized.permute(0, 3, 1, 2)

"""The simple feature pyramid of plain backbones."""

from collections.abc import Sequence

from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from gplq.errors import RecipeError

from .layer_norm import LN2d

__all__ = ['SimpleFPN']


class SimpleFPN(BaseModule):
    """Build a pyramid from the one map of a plain backbone (ViTDet, section 3, "simple feature pyramid").

    `scales` says how much larger than the backbone's map each level is: 4 and 2 by transposed convolutions,
    1 as it is, 1/2 and 1/4 by max pooling. For a ViT of patch 16 the default gives strides 4, 8, 16, 32;
    with patch 8 the same strides are (2, 1, 0.5, 0.25). Levels beyond `len(scales)` subsample the last one.

    One map (N, in_channels, H, W) -> `num_outs` maps (N, out_channels, scale * H, scale * W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_outs: int = 5,
        scales: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if num_outs < len(scales):
            raise RecipeError(f'SimpleFPN: num_outs={num_outs} is less than the number of scales {tuple(scales)}')
        norm_cfg = dict(type=LN2d) if norm_cfg is None else norm_cfg
        self.num_extra = num_outs - len(scales)
        self.lateral_convs = nn.ModuleList()
        self.fpn_convs = nn.ModuleList()
        for index, scale in enumerate(scales):
            resample, channels = _resample(in_channels, scale, norm_cfg)
            # `fpn1`, `fpn2`, ... are the names in the published checkpoints.
            self.add_module(f'fpn{index + 1}', resample)
            self.lateral_convs.append(ConvModule(channels, out_channels, 1, norm_cfg=norm_cfg, act_cfg=None))
            self.fpn_convs.append(ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=None))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(inputs) != 1:
            raise RecipeError(f'SimpleFPN takes the one map of a plain backbone, got {len(inputs)} maps')
        outputs = []
        for index, (lateral, output) in enumerate(zip(self.lateral_convs, self.fpn_convs, strict=True)):
            resample = self.get_submodule(f'fpn{index + 1}')
            outputs.append(output(lateral(resample(inputs[0]))))
        for _ in range(self.num_extra):
            outputs.append(F.max_pool2d(outputs[-1], kernel_size=1, stride=2))
        return tuple(outputs)


def _resample(channels: int, scale: float, norm_cfg: dict) -> tuple[nn.Module, int]:
    """Give the layers that resize a map by `scale`, and the number of channels they leave."""
    if scale == 4.0:
        layers = nn.Sequential(
            nn.ConvTranspose2d(channels, channels // 2, 2, 2),
            build_norm_layer(norm_cfg, channels // 2)[1],
            nn.GELU(),
            nn.ConvTranspose2d(channels // 2, channels // 4, 2, 2),
        )
        return layers, channels // 4
    if scale == 2.0:
        return nn.Sequential(nn.ConvTranspose2d(channels, channels // 2, 2, 2)), channels // 2
    if scale == 1.0:
        return nn.Identity(), channels
    if scale in (0.5, 0.25):
        stride = round(1 / scale)
        return nn.MaxPool2d(kernel_size=stride, stride=stride), channels
    raise RecipeError(f'SimpleFPN: scale {scale} is none of 4, 2, 1, 0.5, 0.25')

"""Any timm model with feature maps as a backbone for mmdet."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

if importlib.util.find_spec('timm') is None:
    raise ImportError("TimmBackbone needs timm: pip install 'timm>=1.0'")

from timm.layers.format import Format

from gplq.plugins.detection.layer_norm import LN2d
from gplq.plugins.pretrained import read_state_dict
from gplq.plugins.timm_weights import check_model_name, check_timm_depth, fit_timm_state, made_by_timm
from gplq.plugins.type_name import pretrained_source

__all__ = ['TimmBackbone']


class TimmBackbone(BaseModule):
    """Give the feature maps of a timm model by its name, for example `swin_tiny_patch4_window7_224`.

    `out_indices` counts the model's stages, or for a plain ViT its blocks. Options of the model go into
    `model_args`, for example `dict(img_size=(800, 1344))`. The number of channels of each map is in
    `channels`.

    `pretrained=True` fetches the weights that timm has of it; `init_cfg=dict(type='Pretrained', checkpoint=PATH)`
    starts from a timm classifier's or a detector's weights in a file, `.safetensors` or `.pth`, which is read when
    the weights are initialized, so that a detector can be built without it.

    `norm_outputs=True` puts a LayerNorm over channels behind each map, as mmdet's Swin has it: the residual stream of a
    pre-norm model is of any size.

    Images (N, 3, H, W) -> one map (N, channels[i], H_i, W_i) per index.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: bool = False,
        model_args: dict[str, Any] | None = None,
        norm_outputs: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        check_model_name(model_name, 'TimmBackbone')
        self.model_name, self.model_args = model_name, dict(model_args or {})
        model: Any = made_by_timm(
            'TimmBackbone',
            model_name,
            pretrained=pretrained,
            features_only=True,
            out_indices=tuple(out_indices),
            **(model_args or {}),
        )
        self.model = model
        self.channels: list[int] = model.feature_info.channels()
        # Swin and its kin give (N, H, W, C).
        self.channels_last = model.output_fmt == Format.NHWC
        self.norms = nn.ModuleList(LN2d(channels) for channels in self.channels if norm_outputs)

    def init_weights(self) -> None:
        # timm has initialized or loaded the model when it made it.
        if self.init_cfg is None:
            return
        source = pretrained_source(self.init_cfg)
        if source is None:
            super().init_weights()
            return
        found = read_state_dict(source)
        check_timm_depth(self.model, self.model_name, self.model_args, found, source)
        state = fit_timm_state(self.model, found, source)
        self.model.load_state_dict(state)
        print_log(f'TimmBackbone: {len(state)} tensors loaded from {source}', logger='current')

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.model(x)
        if self.channels_last:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        if self.norms:
            maps = [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        return tuple(maps)

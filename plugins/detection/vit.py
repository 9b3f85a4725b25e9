"""The plain vision transformer of ViTDet as a backbone for mmdet."""

from collections.abc import Sequence

import torch
from mmcv.cnn.bricks import DropPath
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gplq.errors import RecipeError
from gplq.plugins.checkpoint_file import check_depth, parameter_names
from gplq.plugins.positions import absolute_positions, relative_bias
from gplq.plugins.pretrained import fit_backbone_state, inside_backbone, read_state_dict
from gplq.plugins.type_name import pretrained_source

from .windows import join_windows, split_windows

__all__ = ['ViT']


class ViT(BaseModule):
    """A plain ViT whose blocks attend within windows, except a few that attend globally (ViTDet, section 3).

    Parameter names and shapes are those of the ViTDet checkpoints of mmdetection's `projects/ViTDet`, the
    defaults those of its ViT-B.

    Images (N, 3, H, W) -> one map (N, embed_dim, H / patch_size, W / patch_size). H and W must be multiples
    of `patch_size`; `data_preprocessor=dict(pad_size_divisor=32)` sees to that.

    Args:
        img_size: side of the images in training; the length of the global blocks' relative positions follows.
        window_size: side of a window in patches; maps are padded with zeros to a multiple of it.
        window_block_indexes: the blocks that attend within windows; all others attend globally.
        pretrain_img_size: side of the images whose absolute positions `pos_embed` holds.
        norm_eps: the ViTDet checkpoints of mmdetection were trained with 1e-5, timm's models with 1e-6.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        init_cfg: `dict(type='Pretrained', checkpoint=PATH)` starts from the weights of a detector or a timm
            classifier, `.safetensors` or `.pth`; positions are resized to this model's.
    """

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        window_size: int = 14,
        window_block_indexes: Sequence[int] = (0, 1, 3, 4, 6, 7, 9, 10),
        use_rel_pos: bool = True,
        pretrain_img_size: int = 224,
        norm_eps: float = 1e-5,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        unknown = sorted(index for index in window_block_indexes if not 0 <= index < depth)
        if unknown:
            raise RecipeError(f'ViT: window_block_indexes has {unknown}, but the blocks are 0 to {depth - 1}')
        self.with_cp = with_cp
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
        # The first row belongs to the class token, which detectors do not use but checkpoints carry.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (pretrain_img_size // patch_size) ** 2, embed_dim))
        self.blocks = nn.ModuleList()
        for index in range(depth):
            window = window_size if index in window_block_indexes else None
            self.blocks.append(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    # Stochastic depth grows linearly with depth.
                    drop_path=drop_path_rate * index / max(depth - 1, 1),
                    window_size=window,
                    rel_pos_size=(window or img_size // patch_size) if use_rel_pos else None,
                    norm_eps=norm_eps,
                )
            )

    def init_weights(self) -> None:
        path = pretrained_source(self.init_cfg)
        if path is not None:
            found = read_state_dict(path)
            check_depth(parameter_names(self), inside_backbone(found), path)
            state = fit_backbone_state(self, found, source=path)
            fresh = self.load_state_dict(state, strict=False).missing_keys
            print_log(f'ViT: {len(state)} tensors from {path}; fresh: {fresh or "none"}', logger='current')
            return
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        super().init_weights()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.patch_embed(x)
        x = x + absolute_positions(self.pos_embed, x.shape[1], x.shape[2])
        for block in self.blocks:
            if self.with_cp and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return (x.permute(0, 3, 1, 2).contiguous(),)


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each: (N, 3, H, W) -> (N, H / patch, W / patch, embed_dim)."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        side = self.proj.stride[0]
        if x.shape[-2] % side or x.shape[-1] % side:
            raise RecipeError(
                f'ViT: an image of {x.shape[-2]} x {x.shape[-1]} is no multiple of the patch size {side}; '
                'set data_preprocessor.pad_size_divisor to a multiple of it'
            )
        return self.proj(x).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Attention, in windows or global, and an MLP, each behind a LayerNorm: (N, H, W, C) -> (N, H, W, C)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
        window_size: int | None,
        rel_pos_size: int | None,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, rel_pos_size)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        attended = self.norm1(x)
        if self.window_size is None:
            attended = self.attn(attended)
        else:
            windows = self.attn(split_windows(attended, self.window_size))
            attended = join_windows(windows, self.window_size, x.shape[1], x.shape[2])
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention over a map, with relative positions or not: (N, H, W, C) -> (N, H, W, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, rel_pos_size: int | None) -> None:
        super().__init__()
        if dim % num_heads:
            raise RecipeError(f'ViT: width {dim} is no multiple of {num_heads} heads')
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.use_rel_pos = rel_pos_size is not None
        if rel_pos_size is not None:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * rel_pos_size - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * rel_pos_size - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        if self.use_rel_pos:
            bias = relative_bias(query, self.rel_pos_h, self.rel_pos_w, height, width)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, height, width, dim))


class Mlp(nn.Module):
    """Two linear layers with GELU between them: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

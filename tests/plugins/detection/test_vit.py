from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gplq.plugins.detection import ViT
from gplq.plugins.detection.vit import Attention


def small(**kwargs: object) -> ViT:
    settings = dict(
        img_size=16,
        patch_size=2,
        embed_dim=8,
        depth=2,
        num_heads=2,
        window_size=2,
        window_block_indexes=(0,),
        pretrain_img_size=8,
    )
    torch.manual_seed(0)
    vit = ViT(**{**settings, **kwargs}).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit


def influence(vit: ViT, x: Tensor) -> Tensor:
    """Say which patches the first patch's output depends on."""
    x = x.clone().requires_grad_()
    vit(x)[0][0, :, 0, 0].square().sum().backward()
    patches = x.grad[0].abs().sum(dim=0).unfold(0, 2, 2).unfold(1, 2, 2)
    return patches.sum(dim=(2, 3)) > 0


def test_windowed_block_sees_its_window_only() -> None:
    seen = influence(small(depth=1), torch.rand(1, 3, 12, 8))
    expected = torch.zeros(6, 4, dtype=torch.bool)
    expected[:2, :2] = True
    assert torch.equal(seen, expected)


def test_global_block_sees_everything() -> None:
    assert influence(small(depth=1, window_block_indexes=()), torch.rand(1, 3, 12, 8)).all()


def test_attention_is_softmax_of_scaled_scores_plus_relative_bias() -> None:
    torch.manual_seed(1)
    attention = Attention(dim=8, num_heads=2, qkv_bias=True, rel_pos_size=3)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 2, 3, 8)
    table_h = nn.functional.interpolate(attention.rel_pos_h.t()[None], size=3, mode='linear')[0].t()
    qkv = attention.qkv(x).reshape(6, 3, 2, 4)
    outputs = torch.zeros(6, 2, 4)
    for head in range(2):
        query, key, value = (qkv[:, part, head] for part in range(3))
        scores = torch.zeros(6, 6)
        for i in range(6):
            for j in range(6):
                vertical = table_h[i // 3 - j // 3 + 1]
                horizontal = attention.rel_pos_w[i % 3 - j % 3 + 2]
                scores[i, j] = query[i] @ key[j] / 4**0.5 + query[i] @ (vertical + horizontal)
        outputs[:, head] = scores.softmax(dim=-1) @ value
    expected = attention.proj(outputs.reshape(1, 2, 3, 8))
    assert torch.allclose(attention(x), expected, atol=1e-5)


@pytest.mark.parametrize('size', [(16, 16), (6, 10), (2, 22)])
def test_any_multiple_of_the_patch_gives_one_map(size: tuple[int, int]) -> None:
    maps = small()(torch.rand(2, 3, *size))
    assert [tuple(m.shape) for m in maps] == [(2, 8, size[0] // 2, size[1] // 2)]
    assert maps[0].isfinite().all()


def test_padding_of_windows_lies_at_the_bottom_and_right() -> None:
    # Padding shares a window with the last row and column only, so the rest is as without it.
    vit = small(depth=1)
    x = torch.rand(1, 3, 10, 10)
    vit.pos_embed.data.zero_()  # positions depend on the map's size
    whole, cut = vit(x)[0], vit(x[..., :8, :8])[0]
    assert torch.allclose(whole[..., :4, :4], cut, atol=1e-6)


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for with_cp in (False, True):
        vit = small(with_cp=with_cp).train()
        vit(torch.ones(1, 3, 8, 8))[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_drop_path_grows_with_depth_and_is_off_in_eval() -> None:
    vit = small(depth=3, drop_path_rate=0.2, window_block_indexes=())
    assert [getattr(block.drop_path, 'drop_prob', 0.0) for block in vit.blocks] == [0.0, 0.1, 0.2]
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(vit(x)[0], vit(x)[0])


def test_without_relative_positions_there_are_no_tables() -> None:
    assert not any('rel_pos' in name for name in small(use_rel_pos=False).state_dict())


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match=r'window_block_indexes has \[2\], but the blocks are 0 to 1'):
        small(window_block_indexes=(0, 2))
    with pytest.raises(ValueError, match='width 8 is no multiple of 3 heads'):
        small(num_heads=3)
    with pytest.raises(ValueError, match='7 x 8 is no multiple of the patch size 2'):
        small()(torch.rand(1, 3, 7, 8))

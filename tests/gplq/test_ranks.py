"""Two processes with images of their own come to one model, and to what one process with all images finds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, distributed, multiprocessing, nn

import gplq
from gplq.record import named_quantizers, weight_views


def make() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5)
    return model.eval(), torch.randn(16, 3, 16, 16)


def quantize(method: str, model: nn.Module, batches: list[Tensor], example: Tensor) -> None:
    gplq.prepare(model, getattr(gplq.Recipe, method)(4, 4), example)
    gplq.calibrate(model, batches)
    if method == 'ptq4vit':
        # More than there are samples, so that none is left to chance.
        search = gplq.ScaleSearch(metric='mse', candidates=20, rounds=1, images=16, vectors=10**6, maps=10**6)
        gplq.search_scales(model, batches, search=search)
    gplq.quantize_weights(model, batches, reconstruction=gplq.Reconstruction(iterations=20))


def state(model: nn.Module) -> dict[str, Tensor]:
    scales = {name: q.log_scale.detach() for name, q in named_quantizers(model)}
    return scales | {view.name: view.matrix() for _, view in weight_views(model)}


def work(rank: int, folder: str, method: str) -> None:
    torch.set_num_threads(1)
    os.environ['OMP_NUM_THREADS'] = '1'
    distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    model, images = make()
    quantize(method, model, list(images[rank::2].split(4)), images[:2])
    torch.save(state(model), f'{folder}/{rank}.pt')
    distributed.destroy_process_group()


@pytest.mark.parametrize('method', ['ptq4vit', 'reconstruct', 'qwt', 'erq'])
def test_ranks_agree(method: str, tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path), method), nprocs=2)
    ours, theirs = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if method != 'ptq4vit':
        return
    # Errors are sums, so that it does not matter who adds them.
    model, images = make()
    quantize(method, model, [images], images[:2])
    alone = state(model)
    equal = [torch.allclose(alone[name], ours[name], rtol=1e-4, atol=1e-6) for name in alone]
    assert sum(equal) >= 0.9 * len(equal)

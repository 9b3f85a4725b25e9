"""A classifier of two attention blocks, its data and its metric: all that a Runner needs, in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel, BaseModule, ImgDataPreprocessor
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

CLASSES = 4


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.drop_prob
        return x * keep / (1 - self.drop_prob)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads=2)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ToyBackbone(BaseModule):
    def __init__(self, width: int = 16, depth: int = 2, drop_path: float = 0.2) -> None:
        super().__init__()
        self.img_size = 16
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(Block(width, drop_path) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.patch_embed(x)
        b, c, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return (self.norm(x).transpose(1, 2).reshape(b, c, h, w),)


@MODELS.register_module()
class ToyClassifier(BaseModel):
    def __init__(
        self, width: int = 16, depth: int = 2, dropout: float = 0.0, norm: bool = True, drop_path: float = 0.2
    ) -> None:
        super().__init__(data_preprocessor=ImgDataPreprocessor())
        self.dropout = nn.Dropout(dropout)
        self.backbone = ToyBackbone(width, depth, drop_path)
        self.neck = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.head = nn.Linear(width, CLASSES)

    def logits(self, inputs: Tensor) -> Tensor:
        return self.head(self.dropout(self.neck(self.backbone(inputs)[0]).mean((2, 3))))

    def loss(self, inputs: Tensor, labels: list[Tensor]) -> dict[str, Tensor]:
        return {'loss_cls': F.cross_entropy(self.logits(inputs), torch.stack(labels))}

    def forward(self, inputs: Tensor, labels: list[Tensor], mode: str = 'tensor', data_samples: None = None) -> Any:
        if mode == 'loss':
            return self.loss(inputs, labels)
        logits = self.logits(inputs)
        if mode == 'tensor':
            return logits
        return [{'logits': row, 'label': label} for row, label in zip(logits, labels, strict=True)]


@DATASETS.register_module()
class ToyImages(Dataset):
    """Noise; as many channels are bright as the class says. `broken` makes one image NaN.

    With `augment` an image is mirrored, darkened and shifted by random numbers of all three kinds.
    """

    metainfo: dict[str, Any] = {}

    def __init__(self, length: int = 16, seed: int = 0, broken: int | None = None, augment: bool = False) -> None:
        self.augment = augment
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(length) % CLASSES
        self.images = torch.randn(length, 3, 16, 16, generator=generator)
        for image, label in zip(self.images, self.labels.tolist(), strict=True):
            image[:label] += 1.0
        if broken is not None:
            self.images[broken] = float('nan')

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index]
        if self.augment:
            image = image.flip(-1) if random.random() < 0.5 else image
            image = image * float(np.random.uniform(0.5, 1.0)) + 0.1 * torch.randn(3, 1, 1)
        return {'inputs': image, 'labels': self.labels[index]}


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """Accuracy, and the mean of all logits: equal only where two models compute the same."""

    default_prefix = 'toy'

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        for sample in data_samples:
            self.results.append((sample['logits'].cpu(), int(sample['label'])))

    def compute_metrics(self, results: list[tuple[Tensor, int]]) -> dict[str, float]:
        right = sum(int(logits.argmax()) == label for logits, label in results)
        logits = torch.stack([logits for logits, _ in results]).double()
        weights = torch.arange(1, logits.numel() + 1, dtype=torch.float64).reshape(logits.shape)
        return {'accuracy': right / len(results), 'fingerprint': float((logits * weights).sum())}


def toy_config(work_dir: str, checkpoint: str | None, name: str = 'toy', **hook: Any) -> dict[str, Any]:
    """A config of 8 iterations an epoch for 40 epochs, with the two lines; `hook` adds to the first."""
    few = dict(exponents=(0.0, 1.0), clips=(1.0, 0.8), balance=False, calibration_samples=8)
    quantization = dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4, iterations=4)
    quantization.update(hook)
    quantization['stage'] = {'pca_samples': 8, 'rank': 8, **quantization.get('stage', {})}
    quantization['recipe'] = {**few, **quantization.get('recipe', {})}
    loader = dict(batch_size=2, num_workers=0, dataset=dict(type='ToyImages', length=16))
    evaluation = dict(batch_size=4, num_workers=0, dataset=dict(type='ToyImages', length=8, seed=1))
    return dict(
        work_dir=work_dir,
        experiment_name=name,
        default_scope='mmengine',
        model=dict(type='ToyClassifier'),
        train_dataloader=dict(sampler=dict(type='DefaultSampler', shuffle=True), **loader),
        val_dataloader=dict(sampler=dict(type='DefaultSampler', shuffle=False), **evaluation),
        test_dataloader=dict(sampler=dict(type='DefaultSampler', shuffle=False), **evaluation),
        val_evaluator=dict(type='ToyMetric'),
        test_evaluator=dict(type='ToyMetric'),
        train_cfg=dict(by_epoch=True, max_epochs=40, val_interval=1),
        val_cfg=dict(),
        test_cfg=dict(),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.1)),
        param_scheduler=[dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=8)],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), gplq=quantization),
        log_level='INFO',
        load_from=checkpoint,
        randomness=dict(seed=0),
    )

"""Several stored crops of an image at once, with their soft labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, FUNCTIONS
from PIL import Image
from torchvision.transforms.v2 import functional as F

from gplq.errors import DataError
from gplq.plugins.fgvc.soft_labels import SoftLabels, soft_targets

__all__ = ['MultiCropDataset', 'collate_crops', 'cut', 'paths_of']


@DATASETS.register_module()
class MultiCropDataset:
    """Images with the crops that a teacher saw, some of them each time an image is asked for.

    Crops are (crops, 3, size, size), normalized as the teacher's were; the inner data set's pipeline ends with the
    image, as `LoadImage` leaves it. Take `collate_fn=dict(type='gplq.plugins.fgvc.collate_crops')` with it: a batch of
    32 images with 4 crops is a batch of 128.

    Args:
        dataset: the images' data set, or its config.
        soft_labels: what `tools/store_soft_labels.py` wrote for these very images.
        crops: how many of an image's crops are drawn.

    Raises:
        DataError: the soft labels are missing, damaged or of other images.
    """

    def __init__(self, dataset: Any, soft_labels: str, crops: int = 4) -> None:
        self.soft_labels = SoftLabels(soft_labels)
        if not 1 <= crops <= self.soft_labels.shape[1]:
            raise DataError(f'crops={crops}: {soft_labels} has {self.soft_labels.shape[1]} of each image')
        self.crops = crops
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.dataset.full_init()
        self.soft_labels.check(paths_of(self.dataset), len(self.metainfo['classes']))

    @property
    def metainfo(self) -> dict[str, Any]:
        """Classes, as the inner data set has them."""
        about: dict[str, Any] = self.dataset.metainfo
        return about

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """What the inner data set says of an image."""
        about: dict[str, Any] = self.dataset.get_data_info(idx)
        return about

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        results = self.dataset[idx]
        seen = self.soft_labels.seen
        # In random order too: with one crop an image, every crop has its turn.
        found = self.soft_labels.crops(idx, torch.randperm(self.soft_labels.shape[1])[: self.crops].tolist())
        images = [
            cut(results['img'], box, bool(flip), seen.size)
            for box, flip in zip(found.boxes.tolist(), found.flips, strict=True)
        ]
        return {
            'inputs': torch.stack([F.normalize(image, list(seen.mean), list(seen.std)) for image in images]),
            'soft_labels': soft_targets(found, self.soft_labels.num_classes),
            'labels': results['gt_label'],
            'img_path': results['img_path'],
        }


def paths_of(dataset: Any) -> list[str]:
    """Where the images of a data set lie, in its order."""
    return [str(dataset.get_data_info(number)['img_path']) for number in range(len(dataset))]


def cut(picture: Image.Image, box: Sequence[int], flip: bool, size: int) -> torch.Tensor:
    """One crop of an image as a tensor (3, size, size) between 0 and 1, as the teacher saw it."""
    left, top, width, height = box
    cropped = F.resized_crop(picture, top, left, height, width, [size, size], F.InterpolationMode.BICUBIC)
    return F.to_dtype(F.to_image(F.horizontal_flip(cropped) if flip else cropped), torch.float32, scale=True)


@FUNCTIONS.register_module()
def collate_crops(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch whose crops are its images; labels and paths are repeated. Samples without soft labels stay one each."""
    single = []
    for sample in samples:
        if 'soft_labels' not in sample:
            single.append(sample)
            continue
        pairs = zip(sample['inputs'], sample['soft_labels'], strict=True)
        single += [{**sample, 'inputs': crop, 'soft_labels': soft} for crop, soft in pairs]
    batch: dict[str, Any] = pseudo_collate(single)
    return batch

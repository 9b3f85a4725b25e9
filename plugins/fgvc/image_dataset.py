"""What the data sets of images with one class each have in common."""

from __future__ import annotations

from typing import Any, Literal

from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.utils import track_iter_progress

from gplq.errors import DataError

from .transforms import read_rgb

__all__ = ['ImageDataset']


class ImageDataset(BaseDataset):
    """A list of images, each `dict(img_path, gt_label)`, read by the pipeline.

    Args:
        corrupt: an image that cannot be decoded ends the run when it is read (`'raise'`), or all are decoded once at
            the start and those that cannot be are named, counted and left out (`'skip'`).

    Raises:
        DataError: if nothing is left.
    """

    def __init__(self, *args: Any, corrupt: Literal['raise', 'skip'] = 'raise', **kwargs: Any) -> None:
        if corrupt not in ('raise', 'skip'):
            raise DataError(f"{type(self).__name__}: corrupt={corrupt!r} must be 'raise' or 'skip'")
        self.corrupt = corrupt
        super().__init__(*args, **kwargs)

    def filter_data(self) -> list[dict[str, Any]]:
        """Leave out what cannot be decoded, where that is asked for."""
        samples: list[dict[str, Any]] = self.data_list
        if self.corrupt == 'skip':
            bad = [sample['img_path'] for sample in track_iter_progress(samples) if not _decodes(sample['img_path'])]
            if bad:
                told = ', '.join(bad[:5]) + (', …' if len(bad) > 5 else '')
                print_log(f'{type(self).__name__}: {len(bad)} of {len(samples)} images left out: {told}', 'current')
            samples = [sample for sample in samples if sample['img_path'] not in set(bad)]
        labels = [sample['gt_label'] for sample in samples]
        classes = self.metainfo.get('classes')
        wrong = [label for label in labels if label < 0 or classes is not None and label >= len(classes)]
        if wrong:
            raise DataError(f'{type(self).__name__}: label {wrong[0]} is none of the {len(classes or ())} classes')
        if not samples:
            raise DataError(f'{type(self).__name__}: no image is left of {self.data_root or "its list"}')
        return samples

    def get_cat_ids(self, idx: int) -> list[int]:
        """Classes of an image, by which mmengine's ClassBalancedDataset weighs it."""
        return [int(self.get_data_info(idx)['gt_label'])]


def _decodes(path: str) -> bool:
    try:
        read_rgb(path)
    except DataError:
        return False
    return True

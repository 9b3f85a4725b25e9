"""Features of a frozen backbone, computed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.utils import track_iter_progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gplq.errors import DataError
from gplq.files import write_atomically
from gplq.fingerprint import fingerprint
from gplq.plugins.hooks.model import model_of, preprocess

__all__ = ['FeatureCacheHook']


class Features(Dataset):
    """Samples as the data set gives them, with features (C,) in place of images."""

    def __init__(self, images: Any, features: Tensor) -> None:
        self.images = images
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        about = self.images.get_data_info(index)
        return {'inputs': self.features[index], 'labels': about['gt_label'], 'img_path': about['img_path']}

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_') or name == 'images':
            raise AttributeError(name)
        return getattr(self.images, name)


class FeatureCacheHook(Hook):
    """Runs the frozen backbone over the images of training and validation once; the head trains on what it gave.

    A linear probe of 100 epochs then takes the backbone's time for one. The features are kept in a file each, found
    again by a hash of backbone, images and pipeline.

    Args:
        folder: where the files are kept.
    """

    # After the checkpoint is loaded and before the first batch is drawn.
    priority = 'LOW'

    def __init__(self, folder: str = 'work_dirs/features') -> None:
        self.folder = Path(folder)

    def before_train(self, runner: Runner) -> None:
        """Put loaders of features in place of those of images.

        Raises:
            DataError: if the backbone is trained, or the training's pipeline draws random numbers.
        """
        model = model_of(runner)
        if not getattr(model, 'frozen', False):
            raise DataError('FeatureCacheHook: the backbone is trained, so its features change: set frozen=True')
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                loop.dataloader = self._cached(runner, loop.dataloader)

    def _cached(self, runner: Runner, loader: DataLoader) -> DataLoader:
        images: Any = loader.dataset
        first, again = images[0]['inputs'], images[0]['inputs']
        if not torch.equal(first, again):
            raise DataError(
                'FeatureCacheHook: the pipeline gives another image at every reading, which a cache cannot: use that '
                'of evaluation for training as well'
            )
        features = self._features(runner, images, first)
        runner.logger.info(f'features of {len(features)} images: {self.folder}')
        return DataLoader(
            Features(images, features),
            batch_sampler=loader.batch_sampler,
            collate_fn=loader.collate_fn,
        )

    def _features(self, runner: Runner, images: Any, first: Tensor) -> Tensor:
        model = model_of(runner)
        paths = [images.get_data_info(index)['img_path'] for index in range(len(images))]
        steps = [f'{type(step).__name__} {getattr(step, "transform", "")}' for step in images.pipeline.transforms]
        key = fingerprint({**model.backbone.state_dict(), 'first image': first}, json.dumps([paths, steps]))
        path = self.folder / f'{key}.safetensors'
        if path.is_file():
            try:
                with safe_open(path, framework='pt') as file:
                    return file.get_tensor('features')
            except SafetensorError:
                runner.logger.warning(f'{path} is damaged and made again')
        model.eval()
        found = []
        with torch.no_grad():
            for index in track_iter_progress(range(len(images))):
                batch = preprocess(model, {'inputs': [images[index]['inputs']]})
                found.append(model.backbone(batch['inputs']).cpu())
        features = torch.cat(found).contiguous()
        write_atomically(path, lambda temporary: save_file({'features': features}, temporary))
        return features

"""Features of a frozen backbone, computed once."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import ImgDataPreprocessor
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.utils import track_iter_progress
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gplq.errors import DataError, WriteError
from gplq.files import check_writable
from gplq.fingerprint import fingerprint
from gplq.hashed_tensors import load_hashed, save_hashed
from gplq.plugins.hooks.model import model_of, preprocess
from gplq.plugins.results import versions
from gplq.record import is_prepared
from gplq.serialization import describe
from gplq.typecheck import check_types

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
    again by a hash of backbone, annotations, images' sizes and times, pipeline and preprocessing.

    Args:
        folder: where the files are kept.
    """

    # After the checkpoint is loaded and before the first batch is drawn.
    priority = 'LOW'

    def __init__(self, folder: str = 'work_dirs/features') -> None:
        check_types({'folder': folder}, {'folder': str}, 'FeatureCacheHook: ')
        self.folder = Path(folder)
        self._preprocessor: nn.Module | None = None
        self._loaders: list[tuple[Any, DataLoader]] = []

    def before_train(self, runner: Runner) -> None:
        """Put loaders of features in place of those of images.

        Raises:
            DataError: if the backbone is trained, images are mixed, a pipeline draws random numbers, or training does
                not go by epochs.
        """
        model = model_of(runner)
        if not getattr(model, 'frozen', False):
            raise DataError('FeatureCacheHook: the backbone is trained, so its features change: set frozen=True')
        if getattr(model, 'mixup', None) is not None:
            raise DataError('FeatureCacheHook: mixed images have features of their own: set mixup=None')
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            # Others have begun to read images by now.
            raise DataError(
                f'FeatureCacheHook: {type(runner.train_loop).__name__} draws its batches before features are there: '
                "set train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=…)"
            )
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                self._loaders.append((loop, loop.dataloader))
                loop.dataloader = self._cached(runner, loop.dataloader)
        # Features are not normalized as images are.
        self._preprocessor, model.data_preprocessor = model.data_preprocessor, ImgDataPreprocessor()
        model.data_preprocessor.to(next(model.parameters()).device)

    def after_train(self, runner: Runner) -> None:
        """Take images again."""
        if self._preprocessor is not None:
            model_of(runner).data_preprocessor = self._preprocessor
        while self._loaders:
            loop, loader = self._loaders.pop()
            loop.dataloader = loader

    def _cached(self, runner: Runner, loader: DataLoader) -> DataLoader:
        images: Any = loader.dataset
        if _draws(images):
            raise DataError(
                'FeatureCacheHook: the pipeline draws random numbers, so an image has more than one reading: use that '
                'of evaluation for training as well'
            )
        features = self._features(runner, images, loader)
        runner.logger.info(f'features of {len(features)} images: {self.folder}')
        return DataLoader(
            Features(images, features),
            batch_sampler=loader.batch_sampler,
            collate_fn=loader.collate_fn,
        )

    def _features(self, runner: Runner, images: Any, loader: DataLoader) -> Tensor:
        model = model_of(runner)
        key = _key(model, images)
        path = self.folder / f'{key}.safetensors'
        kept = load_hashed(path)
        if kept is not None:
            return kept['features']
        if is_main_process():
            # Before the backbone's work.
            try:
                check_writable(path)
            except WriteError as error:
                raise WriteError(f'FeatureCacheHook: folder={str(self.folder)!r}: {error}') from error
        batch_size = getattr(loader.batch_sampler, 'batch_size', None) or 64
        batches = DataLoader(
            images, batch_size=batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn
        )
        features = _run(model, batches)
        if is_main_process():
            save_hashed(path, {'features': features})
        return features


def _draws(images: Any) -> bool:
    """Whether reading a few images moves a random state, or gives something else the second time."""

    def states() -> list[Any]:
        _, numbers, *position = np.random.get_state()
        return [torch.get_rng_state().tolist(), numbers.tolist(), position, random.getstate()]  # type: ignore[attr-defined]

    before = states()
    once, again = _first(images), _first(images)
    return states() != before or any(not torch.equal(once[name], again[name]) for name in once)


def _first(images: Any) -> dict[str, Tensor]:
    """The first few images as the pipeline leaves them."""
    return {f'image {index}': images[index]['inputs'] for index in range(min(4, len(images)))}


def _key(model: Any, images: Any) -> str:
    about = [images.get_data_info(index) for index in range(len(images))]
    files = [(entry.st_size, entry.st_mtime_ns) for entry in (os.stat(one['img_path']) for one in about)]
    steps = [f'{type(step).__name__} {vars(step)}' for pipeline in _pipelines(images) for step in pipeline.transforms]
    told = [str(model.backbone), model.model_name, repr(model.model_args), str(vars(model.data_preprocessor))]
    plan = describe(model) if is_prepared(model) else {}
    text = json.dumps([about, files, steps, told, plan, versions()], default=str)
    # Addresses of functions differ from run to run.
    # Some transforms do not tell all of their settings, so images have their say, too.
    return fingerprint({**model.backbone.state_dict(), **_first(images)}, re.sub(' at 0x[0-9a-f]+', '', text))


def _pipelines(images: Any) -> list[Any]:
    """The pipelines of a data set, or of all within a wrapper such as ConcatDataset or RepeatDataset."""
    inner = getattr(images, 'datasets', None) or [getattr(images, 'dataset', None)]
    if inner[0] is None:
        return [images.pipeline]
    return [pipeline for one in inner for pipeline in _pipelines(one)]


def _run(model: Any, batches: DataLoader) -> Tensor:
    modes = model.training
    model.eval()
    with torch.no_grad():
        found = [
            model.backbone(preprocess(model, {'inputs': batch['inputs']})['inputs']).cpu()
            for batch in track_iter_progress((batches, len(batches)))
        ]
    model.train(modes)
    return torch.cat(found).contiguous()

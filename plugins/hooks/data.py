"""Calibration data: training images as evaluation sees them, through a loader of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.dist import get_rank, get_world_size
from mmengine.registry import DATASETS, FUNCTIONS
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Subset

from gplq.errors import CalibrationError
from gplq.plugins.hooks.replay_data import Draw, ReplayDataset
from gplq.plugins.hooks.settings import HookSettings
from gplq.plugins.type_name import type_name

__all__ = ['calibration_loader']


def calibration_loader(runner: Runner, settings: HookSettings, samples: int) -> DataLoader:
    """A fixed choice of training images, through the validation pipeline where there is one.

    The training loader itself is left alone: reading it would move its random state, and its augmentation would
    make calibration random.

    Raises:
        CalibrationError: if the config has no training data, or it is empty or missing.
    """
    # What the Runner was given, also where it was made without a config.
    given = runner._train_dataloader
    if given is None:
        raise CalibrationError(
            'there is no train_dataloader to take calibration images from: name the training data in the config, or '
            'measure a checkpoint that is quantized already'
        )
    config = given if isinstance(given, dict) else {'batch_size': given.batch_size, 'collate_fn': given.collate_fn}
    try:
        dataset = _dataset(given, runner._val_dataloader or runner._test_dataloader)
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
    except FileNotFoundError as error:
        raise CalibrationError(
            f'the training data to calibrate on is missing ({error}); say where it is with --cfg-options data_root=PATH'
        ) from None
    if len(dataset) == 0:
        raise CalibrationError('the training data set is empty: there is nothing to calibrate on')
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(settings.seed))
    # Where only the training's random pipeline is there, every reading of a sample is still the same.
    fixed = ReplayDataset(dataset)
    fixed.seed(settings.seed)
    chosen = order[:samples].tolist()
    # Every rank takes its share; where there are fewer images than ranks, some take one that another has too.
    share = chosen[get_rank() :: get_world_size()] or chosen[:1]
    return DataLoader(
        Subset(fixed, [Draw(0, number) for number in share]),  # type: ignore[arg-type]
        batch_size=settings.calibration_batch_size or int(config.get('batch_size', 1)),
        collate_fn=_collate(config.get('collate_fn')),
        num_workers=0,
    )


def _dataset(training: Any, evaluation: Any) -> Any:
    """The training images; a loader that was built already brings its own pipeline."""
    if not isinstance(training, dict):
        return training.dataset
    config = copy.deepcopy(training['dataset'])
    if not isinstance(config, dict):
        return config
    pipeline = _first_pipeline(evaluation['dataset']) if isinstance(evaluation, dict) else None
    return DATASETS.build(_plain(config, pipeline))


def _annotated(pipeline: list[Any]) -> list[Any]:
    """Annotations read before the image is resized, so that they follow it; evaluation compares in the original."""
    reads = [step for step in pipeline if type_name(step['type']).endswith('LoadAnnotations')]
    rest = [step for step in pipeline if step not in reads]
    return [*rest[:1], *reads, *rest[1:]]


def _collate(config: Any) -> Callable[[Any], Any]:
    """The function that makes batches, as mmengine's Runner builds it."""
    if config is None or callable(config):
        return config or pseudo_collate
    options = dict(config)
    function = options.pop('type')
    return partial(FUNCTIONS.get(function) if isinstance(function, str) else function, **options)


def _plain(config: ConfigDict, pipeline: list[Any] | None) -> ConfigDict:
    """The data sets inside wrappers such as RepeatDataset, those of a ConcatDataset side by side."""
    if 'datasets' in config:
        config['datasets'] = [_plain(one, pipeline) for one in config['datasets']]
        return config
    if 'dataset' in config:
        return _plain(config['dataset'], pipeline)
    if pipeline is not None and 'pipeline' in config:
        config['pipeline'] = _annotated(copy.deepcopy(pipeline))
    return config


def _first_pipeline(config: ConfigDict) -> list[Any] | None:
    """The pipeline of a data set, or of the first of those inside it."""
    if not isinstance(config, dict):
        return None
    while 'dataset' in config or 'datasets' in config:
        config = config['dataset'] if 'dataset' in config else config['datasets'][0]
    pipeline: list[Any] | None = config.get('pipeline')
    return pipeline

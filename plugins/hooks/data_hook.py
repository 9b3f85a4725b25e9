"""Data that a run can make nothing of, found before anything is trained."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from gplq.errors import DataError
from gplq.plugins.hooks.model import model_of

__all__ = ['DataHook', 'check_batches']


def check_batches(loader: Any) -> None:
    """Refuse training data that gives no batch.

    Raises:
        DataError: there are too few samples on this rank.
    """
    if len(loader) == 0:
        samples, batch = len(loader.dataset), loader.batch_size
        raise DataError(
            f'the training data gives no batch: {samples} samples on this rank are less than a batch of {batch}, and '
            'train_dataloader.drop_last=True drops them; lower batch_size or set drop_last=False'
        )


class DataHook(Hook):
    """Refuses training without a batch, and more classes in the data than a classifier's head has outputs."""

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        check_batches(runner.train_loop.dataloader)
        for name, loop in (('train', runner.train_loop), ('val', runner.val_loop)):
            if loop is not None:
                _check_classes(model_of(runner), loop.dataloader.dataset, name)

    def before_test(self, runner: Runner) -> None:
        _check_classes(model_of(runner), runner.test_loop.dataloader.dataset, 'test')


def _check_classes(model: Any, dataset: Any, name: str) -> None:
    outputs = getattr(model, 'num_classes', None)
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if isinstance(outputs, int) and classes is not None and len(classes) > outputs:
        raise DataError(
            f'{name}_dataloader has {len(classes)} classes and {type(model).__name__} num_classes={outputs}: set '
            f'model.num_classes={len(classes)}'
        )

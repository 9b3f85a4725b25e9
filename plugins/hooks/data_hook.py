"""Data that a run can make nothing of, found before anything is trained."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from gplq.errors import DataError
from gplq.plugins.hooks.model import is_classifier, model_of
from gplq.plugins.hooks.settings import HookSettings

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
    """Refuses training without a batch, and classes that training, validation and a classifier's head number apart."""

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        check_batches(runner.train_loop.dataloader)
        model, train = model_of(runner), runner.train_loop.dataloader.dataset
        # Features are learned, and quantizers calibrated, from any images, in a single folder as well.
        parts = [part for hook in runner.hooks for part in getattr(hook, 'parts', (hook,))]
        settings = [part.settings for part in parts if isinstance(getattr(part, 'settings', None), HookSettings)]
        labels = not any(one.label_free or not one.trains for one in settings)
        if labels:
            _check_outputs(model, train, 'train')
        if runner.val_loop is not None:
            val = runner.val_loop.dataloader.dataset
            _check_outputs(model, val, 'val')
            # Detectors may be validated on other data than they are trained on.
            if labels and is_classifier(model):
                _check_same(_classes(train), _classes(val))

    def before_val(self, runner: Runner) -> None:
        # A validation without training.
        _check_outputs(model_of(runner), runner.val_loop.dataloader.dataset, 'val')

    def before_test(self, runner: Runner) -> None:
        _check_outputs(model_of(runner), runner.test_loop.dataloader.dataset, 'test')


def _classes(dataset: Any) -> tuple[str, ...] | None:
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    return None if classes is None else tuple(classes)


def _check_same(train: tuple[str, ...] | None, val: tuple[str, ...] | None) -> None:
    if train is None or val is None or train == val:
        return
    number, (ours, theirs) = next(
        (number, pair) for number, pair in enumerate(zip_longest(train, val)) if pair[0] != pair[1]
    )
    told = [repr(name) if name is not None else 'missing' for name in (ours, theirs)]
    raise DataError(
        f'train_dataloader and val_dataloader number their classes differently: class {number} is {told[0]} in the one '
        f'and {told[1]} in the other, of {len(train)} and {len(val)}; name all classes in both, in the same order, '
        'also those without images'
    )


def _check_outputs(model: Any, dataset: Any, name: str) -> None:
    # Detectors have theirs elsewhere, and some find classes that they were not trained on.
    outputs, classes = getattr(model, 'num_classes', None), _classes(dataset)
    if not isinstance(outputs, int) or classes is None or len(classes) == outputs:
        return
    found = f'{name}_dataloader has {len(classes)} classes and {type(model).__name__} num_classes={outputs}'
    if len(classes) > outputs:
        raise DataError(f'{found}: set model.num_classes={len(classes)}')
    # Data that lacks some may number the others anew.
    raise DataError(
        f'{found}: their numbers may mean other classes; name all {outputs} in the data, also those without images, or '
        f'train a head of its own with model.num_classes={len(classes)}'
    )

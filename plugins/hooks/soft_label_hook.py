"""A teacher's soft labels in place of the data set's, computed as batches come."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from gplq.errors import RecipeError, TargetError
from gplq.plugins.hooks.model import is_classifier, model_of, preprocess
from gplq.plugins.hooks.teacher_hook import TeacherHook

__all__ = ['SoftLabelHook']


@HOOKS.register_module()
class SoftLabelHook(TeacherHook):
    """Gives each image of a batch the chances of the classes that a teacher sees in the very same crop.

    The loss is then the cross-entropy of soft labels alone, as in variation-aware quantization, whose labels are stored
    beforehand (`tools/store_soft_labels.py`). Computed as they are needed they cost the teacher's forward pass in every
    step, and take no storage and any augmentation. It is for `TimmClassifier` and mmpretrain's `ImageClassifier`; the
    latter's loss must take soft targets, as its `LabelSmoothLoss` does.

    Example:
        >>> custom_hooks = [
        ...     dict(
        ...         type='gplq.plugins.SoftLabelHook',
        ...         config='configs/swin-mini_objects100.py',
        ...         checkpoint='work_dirs/swin-mini_objects100/fp32.pth',
        ...     )
        ... ]

    Args:
        config: the teacher's config; it takes the images as the student's preprocessing leaves them.
        checkpoint: its weights; read without executing anything in the file.
        temperature: what its logits are divided by.

    Raises:
        RecipeError: the temperature is not above 0.
    """

    def __init__(self, config: str, checkpoint: str, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise RecipeError(f'SoftLabelHook: temperature={temperature} must be above 0')
        super().__init__(config, checkpoint)
        self.temperature = temperature

    def check(self, model: nn.Module, teacher: nn.Module) -> None:
        for whose, which in (('the teacher', teacher), ('the model', model)):
            if not is_classifier(which):
                raise TargetError(f'SoftLabelHook: {whose} ({type(which).__name__}) is no classifier with a head')

    @torch.no_grad()
    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        model = model_of(runner)
        inputs = preprocess(model, data_batch)['inputs']
        if inputs.ndim != 4:
            raise TargetError(
                f'SoftLabelHook: the batch holds {tuple(inputs.shape)}, no images for the teacher to see; leave out '
                "FeatureCacheHook, which puts the model's own features in their place"
            )
        logits: Tensor = self.teacher(inputs, mode='tensor')
        if not bool(logits.isfinite().all()):
            raise TargetError(f'SoftLabelHook: the teacher gives NaN or infinite logits; check {self.checkpoint}')
        classes = getattr(model.head, 'out_features', getattr(model.head, 'num_classes', None))
        if classes not in (None, logits.shape[-1]):
            raise TargetError(f'SoftLabelHook: the teacher has {logits.shape[-1]} classes, the model {classes}')
        soft = (logits.float() / self.temperature).softmax(-1)
        if 'data_samples' in data_batch:
            for sample, row in zip(data_batch['data_samples'], soft, strict=True):
                sample.set_gt_score(row)
        else:
            data_batch['soft_labels'] = list(soft)

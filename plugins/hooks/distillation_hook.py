"""Another model's features as a second aim of training."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from gplq.errors import RecipeError, TargetError
from gplq.feature_distance import feature_distance
from gplq.mimicking import FeatureTap
from gplq.plugins.hooks.loss_term import LossTerm
from gplq.plugins.hooks.model import model_of
from gplq.plugins.hooks.teacher_hook import TeacherHook

__all__ = ['FeatureDistillationHook']


@HOOKS.register_module()
class FeatureDistillationHook(TeacherHook):
    """Adds the distance from a teacher's features to the losses of a model in training.

    A plain ViT learns slowly from a few hundred images, a convolutional network does not; its features tell the ViT
    where to look (DeiT's hard distillation has the same reason, Touvron et al. 2021). The features are what
    `extract_feat` gives, in mmdet the neck's maps: they have to be of the same shapes in both, the models behind them
    do not.

    Example:
        >>> custom_hooks = [
        ...     dict(
        ...         type='gplq.plugins.FeatureDistillationHook',
        ...         config='configs/mask_rcnn_r50_nuclei.py',
        ...         checkpoint='work_dirs/mask_rcnn_r50_nuclei/epoch_40.pth',
        ...     )
        ... ]

    Args:
        config: the teacher's config.
        checkpoint: its weights; read without executing anything in the file.
        weight: factor of the distance (:func:`gplq.feature_distance.feature_distance`).
    """

    def __init__(self, config: str, checkpoint: str, weight: float = 4.0) -> None:
        if not weight > 0:
            raise RecipeError(f'FeatureDistillationHook: weight={weight} must be above 0, or leave the hook out')
        super().__init__(config, checkpoint)
        self.weight = weight
        self._attached = ExitStack()

    def check(self, model: nn.Module, teacher: nn.Module) -> None:
        if not hasattr(teacher, 'extract_feat'):
            raise TargetError(f'FeatureDistillationHook: {type(teacher).__name__} has no extract_feat to learn from')

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        model, teacher = model_of(runner), self.teacher
        source = 'neck' if getattr(model, 'with_neck', False) else 'backbone'
        tap = self._attached.enter_context(FeatureTap(model, source, 'output').attached())

        def distance(_: nn.Module, images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                target = teacher.extract_feat(images)  # type: ignore[operator]
            return self.weight * feature_distance(tap.take(), list(target))

        handle = model.register_forward_hook(LossTerm('loss_distillation', distance), with_kwargs=True)
        self._attached.callback(handle.remove)

    def after_train(self, runner: Runner) -> None:
        self._attached.close()
        super().after_train(runner)

"""What another detector's heads say of the same places and objects, as a second aim of training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from gplq.errors import RecipeError, TargetError
from gplq.feature_distance import feature_distance
from gplq.mimicking import FeatureTap
from gplq.plugins.hooks.loss_term import LossTerm
from gplq.plugins.hooks.model import model_of
from gplq.plugins.hooks.teacher_hook import TeacherHook

__all__ = ['HeadDistillationHook']

DENSE = ('rpn_head', 'bbox_head')
OF_OBJECTS = (('bbox_roi_extractor', 'bbox_head'), ('mask_roi_extractor', 'mask_head'))


@HOOKS.register_module()
class HeadDistillationHook(TeacherHook):
    """Adds the distance from a teacher's head outputs to the losses of a detector in training.

    Soft labels, by which variation-aware quantization teaches classifiers, do not apply to detectors: an image has no
    one class. This part is ours. Dense heads (`rpn_head`, or `bbox_head` of one-stage detectors) are compared at every
    place; heads of a second stage (`roi_head`, cascades too) at the objects that the student's own sampling has chosen,
    whose features the teacher cuts from its own maps. Scores, boxes and masks count alike: each output's distance is
    a share of how much the teacher's varies (:func:`gplq.feature_distance.feature_distance` of what differs from the
    mean of a channel). `FeatureDistillationHook` beside it compares the maps that the heads see.

    Example:
        >>> custom_hooks = [
        ...     dict(
        ...         type='gplq.plugins.HeadDistillationHook',
        ...         config='configs/mask_rcnn_vit-tiny_nuclei.py',
        ...         checkpoint='work_dirs/mask_rcnn_vit-tiny_nuclei/epoch_40.pth',
        ...     )
        ... ]

    Args:
        config: the teacher's config; its heads are of the student's kind and sizes.
        checkpoint: its weights; read without executing anything in the file.
        weight: factor of the distance.

    Raises:
        RecipeError: the weight is not above 0.
    """

    def __init__(self, config: str, checkpoint: str, weight: float = 1.0) -> None:
        if not weight > 0:
            raise RecipeError(f'HeadDistillationHook: weight={weight} must be above 0, or leave the hook out')
        super().__init__(config, checkpoint)
        self.weight = weight
        self._attached = ExitStack()

    def check(self, model: nn.Module, teacher: nn.Module) -> None:
        names = [[head.name for head in _heads(which)] for which in (model, teacher)]
        if names[0] != names[1] or not names[0]:
            raise TargetError(
                f'HeadDistillationHook: the model has the heads {names[0]}, the teacher {names[1]}; both need the same '
                'ones, and at least one that sees feature maps'
            )

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        model, teacher = model_of(runner), self.teacher
        pairs = [
            _Pair(head, of_teacher, *(self._tap(model, name) for name in (head.name, head.extractor)))
            for head, of_teacher in zip(_heads(model), _heads(teacher), strict=True)
        ]

        def distance(_: nn.Module, images: Tensor) -> Tensor:
            with torch.no_grad():
                maps = teacher.extract_feat(images)  # type: ignore[operator]
            return self.weight * torch.stack([pair.distance(maps) for pair in pairs]).mean()

        handle = model.register_forward_hook(LossTerm('loss_heads', distance), with_kwargs=True)
        self._attached.callback(handle.remove)

    def _tap(self, model: nn.Module, name: str) -> FeatureTap | None:
        return self._attached.enter_context(FeatureTap(model, name, 'output').attached()) if name else None

    def after_train(self, runner: Runner) -> None:
        self._attached.close()
        super().after_train(runner)


class _Head(NamedTuple):
    """A head, and what cuts its objects from the maps; dense heads have none."""

    name: str
    module: nn.Module
    extractor: str = ''
    cut: nn.Module | None = None


class _Pair(NamedTuple):
    """The student's head and the teacher's, with what is seen of the student's."""

    student: _Head
    teacher: _Head
    output: FeatureTap | None
    cut: FeatureTap | None

    def distance(self, maps: Sequence[Tensor]) -> Tensor:
        """Between the outputs of the student's latest forward pass and the teacher's from its own maps."""
        assert self.output is not None
        with torch.no_grad():
            if self.cut is None or self.teacher.cut is None:
                theirs = self.teacher.module(self._seen(self.output, maps))
            else:
                (_, *where), more = self.cut.arguments
                theirs = self.teacher.module(self.teacher.cut(self._seen(self.cut, maps), *where, **more))
                # What the student cut is not compared; its graph is let go.
                self.cut.take()
        ours = self.output.take()
        theirs = list(_flat(theirs))
        means = [output.float().mean(dim=[a for a in range(output.dim()) if a != 1], keepdim=True) for output in theirs]
        try:
            return feature_distance(
                *([x - mean for x, mean in zip(side, means, strict=True)] for side in (ours, theirs))
            )
        except (RuntimeError, ValueError):
            shapes = [[tuple(x.shape) for x in side] for side in (ours, theirs)]
            raise TargetError(
                f'{self.student.name}: the student gives outputs of {shapes[0]}, the teacher of {shapes[1]}: make them '
                'alike'
            ) from None

    def _seen(self, tap: FeatureTap, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """The teacher's maps in place of those that the student's module was given: some modules take the first few.

        Raises:
            TargetError: the module sees something else, such as a decoder's queries.
        """
        given = tap.arguments[0][0] if tap.arguments[0] else None
        shapes = [tuple(x.shape) for x in given] if isinstance(given, (list, tuple)) else []
        if not shapes or shapes != [tuple(x.shape) for x in maps[: len(shapes)]]:
            raise TargetError(
                f'{self.student.name} ({type(self.student.module).__name__}) is not called with the feature maps of '
                f'{[tuple(x.shape) for x in maps]}, which HeadDistillationHook needs: use FeatureDistillationHook alone'
            )
        return maps[: len(shapes)]


def _heads(model: nn.Module) -> list[_Head]:
    """Heads of a detector that can be run on other maps, in the order of the forward pass."""
    heads = [
        _Head(name, model.get_submodule(name)) for name in DENSE if isinstance(getattr(model, name, None), nn.Module)
    ]
    second = getattr(model, 'roi_head', None)
    if second is None:
        return heads
    for extractor, head in OF_OBJECTS:
        cuts, modules = (list(_stages(second, name)) for name in (extractor, head))
        # A mask head without an extractor shares the boxes', whose objects are not all its own.
        heads += [
            _Head(f'roi_head.{name}', module, f'roi_head.{cut}', by)
            for (name, module), (cut, by) in zip(modules, cuts, strict=False)
        ]
    return heads


def _stages(second: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The module of this name, or those of a cascade's list."""
    module = getattr(second, name, None)
    if isinstance(module, nn.ModuleList):
        yield from ((f'{name}.{number}', stage) for number, stage in enumerate(module))
    elif isinstance(module, nn.Module):
        yield name, module


def _flat(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (list, tuple)):
        for output in outputs:
            yield from _flat(output)

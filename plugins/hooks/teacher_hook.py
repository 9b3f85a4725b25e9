"""Another trained model that a model in training learns from."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn

from gplq.errors import RecipeError
from gplq.plugins.hooks.checkpoints import load_weights
from gplq.plugins.hooks.model import model_of, trains

__all__ = ['TeacherHook']


class TeacherHook(Hook):
    """Has a teacher beside the model from before training until after it: for evaluation, without gradients.

    It is read before anything is trained, so that a missing file or an unfit teacher costs nothing, and not at all
    where nothing is trained.

    Args:
        config: the teacher's config.
        checkpoint: its weights; read without executing anything in the file.
    """

    def __init__(self, config: str, checkpoint: str) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self._teacher: nn.Module | None = None

    @property
    def teacher(self) -> nn.Module:
        """The teacher, on the model's device from the start of training on."""
        assert self._teacher is not None
        return self._teacher

    def check(self, model: nn.Module, teacher: nn.Module) -> None:
        """Raise a :class:`TargetError` if the model cannot learn from this teacher."""

    def before_run(self, runner: Runner) -> None:
        if not trains(runner):
            return
        teacher = self._read()
        self.check(model_of(runner), teacher)
        self._teacher = teacher

    def _read(self) -> nn.Module:
        """Build the config's model with the checkpoint's weights.

        Raises:
            RecipeError: the config does not exist.
            CheckpointError: the checkpoint is missing, damaged or another model's.
        """
        if not Path(self.config).is_file():
            raise RecipeError(f'{type(self).__name__}: config {self.config} does not exist')
        teacher: nn.Module = MODELS.build(Config.fromfile(self.config).model)
        load_weights(teacher, self.checkpoint, self.config)
        # Apart: some backbones' train() returns nothing.
        teacher.eval()
        return teacher.requires_grad_(False)

    def before_train(self, runner: Runner) -> None:
        self.teacher.to(next(model_of(runner).parameters()).device)

    def after_train(self, runner: Runner) -> None:
        self._teacher = None

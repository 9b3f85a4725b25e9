"""GPLQ's weight stage inside a Runner."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from gplq.errors import RecipeError
from gplq.plugins.atomic_backend import BACKEND_ARGS
from gplq.plugins.hooks.activation_qat_hook import ActivationQATHook
from gplq.plugins.hooks.company import refuse_beside
from gplq.plugins.hooks.composed import ComposedHook
from gplq.plugins.hooks.model import model_of, synchronize
from gplq.plugins.hooks.progress import logged_progress
from gplq.plugins.hooks.randomness import seeded
from gplq.plugins.hooks.report import evaluate
from gplq.plugins.hooks.stopwatch import Stopwatch
from gplq.serialization import save
from gplq.weight_stage import quantize_weights

__all__ = ['WeightPTQHook']

JOURNAL = 'gplq_weight_stage'


@HOOKS.register_module()
class WeightPTQHook(ComposedHook):
    """Rounds the weights once training is over, validates, saves a checkpoint and the packed artifact.

    On its own it takes a checkpoint of the activation stage, or, said in the log, quantizes an FP32 model without
    any training. Arguments are those of :meth:`HookSettings.from_config`.
    """

    # After ActivationQATHook (40), whose work it finishes, and before EMAHook (50), which copies the model.
    priority = 45

    def __init__(self, *, activations: ActivationQATHook | None = None, **config: Any) -> None:
        self._activations = activations or ActivationQATHook(**{'iterations': 0, **config})
        # On its own it does what calibrates as well.
        self.parts = (self._activations,) if activations is None else ()
        self._given = set(config)

    def before_run(self, runner: Runner) -> None:
        refuse_beside(runner, self, WeightPTQHook)
        others = [hook for hook in runner.hooks if isinstance(hook, ActivationQATHook)]
        if self.parts and others:
            self._join(others[0])
        super().before_run(runner)

    def _join(self, activations: ActivationQATHook) -> None:
        """Take over from a hook of the config that does the activation stage."""
        ours, theirs = self._activations.settings, activations.settings
        remedy = 'give both the same arguments, or use GPLQHook, which is both'
        if ours.recipe != theirs.recipe:
            raise RecipeError(
                f'WeightPTQHook ({ours.recipe.name}) and ActivationQATHook ({theirs.recipe.name}) are set up '
                f'differently: {remedy}'
            )
        for name in self._given & {field.name for field in fields(theirs)}:
            if getattr(ours, name) != getattr(theirs, name):
                raise RecipeError(
                    f'{name} is {getattr(ours, name)!r} for WeightPTQHook and {getattr(theirs, name)!r} for '
                    f'ActivationQATHook: {remedy}'
                )
        self._activations, self.parts = activations, ()

    def after_train(self, runner: Runner) -> None:
        super().after_train(runner)
        recipe = self._activations.settings.recipe
        if recipe.weight_bits == 32:
            return
        clock = Stopwatch()
        clock.start()
        self._quantize(runner)
        clock.stop()
        self._finish(runner, clock.minutes, evaluate(runner))

    def _quantize(self, runner: Runner) -> None:
        model, settings = model_of(runner), self._activations.settings
        with seeded(settings.seed):
            if settings.recipe.weight_scheme == 'searched':
                self._activations.search(runner, model)
            quantize_weights(
                model,
                self._activations.loader(runner, settings.recipe.calibration_samples),
                forward=self._activations.forward(model),
                progress=logged_progress,
                journal=Path(runner.work_dir, JOURNAL),
                reconstruction=settings.reconstruction,
            )
        synchronize(model)

    def _finish(self, runner: Runner, minutes: float, metrics: dict[str, float]) -> None:
        """Keep checkpoint and artifact, and report."""
        model, recipe = model_of(runner), self._activations.settings.recipe
        step = f'W{recipe.weight_bits}A{recipe.activation_bits}'
        name = f'gplq_{recipe.name}'
        artifact, checkpoint = (Path(runner.work_dir) / f'{name}.{end}' for end in ('safetensors', 'pth'))
        runner.save_checkpoint(
            runner.work_dir,
            checkpoint.name,
            save_optimizer=False,
            save_param_scheduler=False,
            meta={'epoch': runner.epoch},
            backend_args=dict(BACKEND_ARGS),
        )
        if is_main_process():
            save(model, artifact)
            shutil.rmtree(Path(runner.work_dir, JOURNAL), ignore_errors=True)
        self._activations.report.add(runner, step, metrics, minutes, checkpoint=str(checkpoint), artifact=str(artifact))

"""GPLQ's activation stage inside a Runner."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from gplq.calibrate import calibrate
from gplq.errors import CheckpointError, StageError
from gplq.files import remove_unfinished
from gplq.plugins.atomic_backend import BACKEND_ARGS, save_atomically
from gplq.plugins.checkpoint_file import quantization_of
from gplq.plugins.downloads import read_downloads_safely
from gplq.plugins.hooks.average import adopt_average, copy_anew, refuse_earlier
from gplq.plugins.hooks.checkpoints import check_keys, check_source, complete
from gplq.plugins.hooks.company import refuse_beside
from gplq.plugins.hooks.curve import Curve
from gplq.plugins.hooks.data import calibration_loader
from gplq.plugins.hooks.guard import StepGuard
from gplq.plugins.hooks.loss_term import LossTerm
from gplq.plugins.hooks.model import (
    PartForward,
    blank_forward,
    check_compensation,
    is_classifier,
    model_of,
    part_of,
    rewrap,
    synchronize,
    task_loss,
    trains,
    whole_forward,
)
from gplq.plugins.hooks.progress import logged_progress
from gplq.plugins.hooks.randomness import seeded
from gplq.plugins.hooks.replay import Replay
from gplq.plugins.hooks.report import Report, evaluate, numbers
from gplq.plugins.hooks.resume import (
    ResumePointHook,
    check_same_run,
    check_same_stage,
    describe_stage,
    find_resume_point,
    mark_run,
    save_resume_point,
)
from gplq.plugins.hooks.schedule import keep_schedule, table, take_over
from gplq.plugins.hooks.settings import HookSettings
from gplq.plugins.hooks.stopwatch import Stopwatch
from gplq.plugins.hooks.teacher import (
    LabelFreeLoss,
    make_mimicking,
    resume_mimicking,
    teacher_hash,
)
from gplq.plugins.safe_load import allow_mmengine_objects
from gplq.prepare import prepare
from gplq.record import Stage, is_prepared, record_of
from gplq.scale_search import search_scales
from gplq.serialization import adopt, describe, restore, trains_weights
from gplq.weight_training import ConfidenceAnnealing, Oscillations, start_weight_training, weight_regularization

__all__ = ['ActivationQATHook']


@HOOKS.register_module()
class ActivationQATHook(Hook):
    """Inserts quantizers, owns the schedule, calibrates, trains weights and scales together.

    Its arguments are those of :meth:`HookSettings.from_config`. It comes before every hook that copies the model
    (EMAHook), since parameters inserted later would be missing in the copy.
    """

    priority = 'ABOVE_NORMAL'

    def __init__(self, **config: Any) -> None:
        self.settings = HookSettings.from_config(**config)
        self.report = Report(self.settings)
        self._attached = ExitStack()
        self._last_validation: tuple[int, dict[str, float]] = (-1, {})
        self._clock = Stopwatch()
        self._curve = Curve()
        self._oscillations = Oscillations()
        self._annealing: ConfidenceAnnealing | None = None
        self._done = False
        self._replay: Replay | None = None
        self._resumed: dict[str, Any] = {}
        self._teacher: str | None = None
        self._run = ''
        # Whether weights are to be rounded from now on, in a model whose activations are trained already.
        self._from_stage = False

    # When a run begins

    def before_run(self, runner: Runner) -> None:
        refuse_beside(runner, self, ActivationQATHook)
        refuse_earlier(runner, self)
        allow_mmengine_objects()
        read_downloads_safely()
        training = trains(runner)
        if self._done or runner._has_loaded and not training:
            return
        if runner._resume and not runner._load_from:
            runner._load_from = find_resume_point(runner.work_dir)
        check_source(runner, required=training)
        if not training:
            return
        model = model_of(runner)
        part_of(model, self.settings)
        check_compensation(model, self.settings)
        self.prepare(runner, model)
        # Backbones freeze stages whenever they enter training mode: before the optimizer and the wrapper look.
        model.train()
        if self.settings.label_free:
            # What the part itself freezes stays frozen.
            inside = {id(parameter) for parameter in part_of(model, self.settings).parameters()}
            for parameter in model.parameters():
                if id(parameter) not in inside:
                    parameter.requires_grad_(False)
        kept = self.settings.keep_schedule and self.settings.trains
        changes = keep_schedule(runner, self.settings) if kept else take_over(runner, self.settings)
        if hasattr(model, 'init_weights'):
            # Every weight comes from the checkpoint: initializing first would only take time, or download weights.
            model.init_weights = _initialized_by_checkpoint
            changes.append(('init_weights', 'run', 'skipped, the checkpoint brings every weight'))
        rewrap(runner)
        save_atomically(runner)
        self._replay = Replay(runner)
        if self.settings.trains:
            runner.register_hook(ResumePointHook(self.settings.resume_interval))
        runner.logger.info('GPLQ changed the schedule (keep_schedule=True leaves it alone):\n' + table(changes))

    def prepare(self, runner: Runner, model: nn.Module) -> None:
        """Insert the quantizers."""
        recipe = self.settings.recipe
        if self.settings.inside_part:
            plan = prepare(model, recipe, forward=blank_forward(model, self.settings))
        else:
            batch = next(iter(calibration_loader(runner, self.settings, 1)))
            plan = prepare(model, recipe, forward=lambda m: whole_forward(m, batch))
        runner.logger.info(
            f'GPLQ {recipe.name}: {len(plan.maps)} layers and {len(plan.products)} attention products get quantizers'
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        model = model_of(runner)
        description = quantization_of(checkpoint)
        if description is None:
            self._check_fp32(runner, model, checkpoint)
            return
        if is_prepared(model):
            adopt(model, description)
        else:
            restore(model, description)
            copy_anew(runner)
        stage = record_of(model).stage
        check_keys(model, checkpoint, _source(runner), stage)
        complete(model, checkpoint, stage)
        if not trains(runner):
            return
        if runner._resume and stage is not Stage.QUANTIZED:
            self._resumed = check_same_stage(checkpoint['meta'], self.settings)
            check_same_run(runner.work_dir, self._resumed.get('run'), _source(runner))
        if stage is Stage.QUANTIZED:
            raise CheckpointError(
                f'the weights in {_source(runner)} are quantized already: test it, or start from the FP32 checkpoint'
            )
        self._from_stage = self.settings.recipe.train_weights and not trains_weights(description)
        if self._from_stage and self.settings.stage.mimicking_weight > 0:
            raise CheckpointError(
                f'{_source(runner)} is of the activation stage and does not hold the FP32 teacher of mimicking='
                f'{self.settings.stage.mimicking_weight:g}: set mimicking=0, or start from the FP32 checkpoint'
            )
        if self.settings.trains and not runner._resume and not self._from_stage:
            raise CheckpointError(
                f'{_source(runner)} has activation quantizers already ({stage.value}): go on with it by --resume, '
                'quantize its weights by WeightPTQHook alone, without iterations, or start from the FP32 checkpoint'
            )

    def _check_fp32(self, runner: Runner, model: nn.Module, checkpoint: dict[str, Any]) -> None:
        if not trains(runner):
            runner.logger.info('GPLQ: the checkpoint holds no quantized model; it is run in FP32')
        elif runner._resume:
            raise CheckpointError('the checkpoint to resume was not written by a run with this hook')
        foreign = check_keys(model, checkpoint, _source(runner))
        if foreign:
            runner.logger.warning(f'{_source(runner)}: {len(foreign)} tensors are not used, such as {foreign[:3]}')
        complete(model, checkpoint)

    # When training begins

    def before_train(self, runner: Runner) -> None:
        model = model_of(runner)
        model.__dict__.pop('init_weights', None)
        self._clock = Stopwatch(self._resumed.get('minutes', 0.0))
        self._clock.start()
        self._run = mark_run(runner.work_dir, self._resumed.get('run'))
        if is_main_process():
            remove_unfinished(runner.work_dir)
        replay = self._replay
        assert replay is not None
        if not runner._has_loaded:
            raise CheckpointError(f'there is no checkpoint to resume in {runner.work_dir}: start without --resume')
        if runner._resume:
            if self.settings.recipe.quantizes and record_of(model).stage is not Stage.CALIBRATED:
                raise StageError('the resumed checkpoint is not one of the activation stage')
            self.report.resume(runner)
            self._curve.resume(runner)
            replay.seed = self._resumed['data_seed']
            self._attach(runner, model, resumed=True)
        else:
            # The same numbers with quantizers and without, which the FP32 control relies on.
            with seeded(self.settings.seed):
                self._start(runner, model)
        if self.settings.trains and self.settings.recipe.quantizes:
            record_of(model).trained = True
        # Numbers are drawn in the order of a run that has not been interrupted.
        replay.start()

    def _start(self, runner: Runner, model: nn.Module) -> None:
        if record_of(model).stage is Stage.CALIBRATED:
            runner.logger.info('GPLQ: the checkpoint brings calibrated activations')
            if self._from_stage:
                start_weight_training(model)
            self._attach(runner, model, resumed=False)
            return
        if self.settings.validate_fp32:
            with self._clock.standing():
                self.report.add(runner, 'FP32', evaluate(runner), minutes=0.0)
        # The teacher is the FP32 model: it is copied before calibration evens out weights or switches scales on.
        self._attach(runner, model, resumed=False)
        if self.settings.recipe.quantizes:
            self.calibrate(runner, model)
        if not self.settings.trains:
            runner.logger.warning('GPLQ: iterations=0, no activation stage: this is plain post-training quantization')

    def calibrate(self, runner: Runner, model: nn.Module) -> None:
        """Set the activation quantizers, alike on every rank."""
        calibrate(
            model,
            self.loader(runner, self.settings.recipe.calibration_samples),
            forward=self.forward(model),
            progress=logged_progress,
        )
        synchronize(model)

    def search(self, runner: Runner, model: nn.Module) -> None:
        """Choose the scales of weights and activations anew by what they do to outputs, alike on every rank."""
        search_scales(
            model,
            self.loader(runner, self.settings.search.images),
            search=self.settings.search,
            # Classifiers give logits; the divergence of a detector's many outputs has no such form.
            loss=None if is_classifier(model) else task_loss,
            forward=whole_forward,
            progress=logged_progress,
        )

    def loader(self, runner: Runner, samples: int) -> DataLoader:
        """Calibration images; the same ones at every call."""
        loader = calibration_loader(runner, self.settings, samples)
        self.report.saw(loader, samples)
        return loader

    def forward(self, model: nn.Module) -> Any:
        """What calibration runs: the part, or the whole model where targets reach beyond it."""
        return PartForward(self.settings.part) if self.settings.inside_part else whole_forward

    def _attach(self, runner: Runner, model: nn.Module, *, resumed: bool) -> None:
        """Add the feature loss to the model's losses and watch that they stay finite."""
        if self.settings.trains:
            self._attached.enter_context(StepGuard(runner).attached(model, runner.optim_wrapper.optimizer))
            if self.settings.stage.regularization > 0:
                regularization = partial(self._regularization, runner)
                self._add_loss(model, LossTerm('loss_regularization', regularization))
            if self.settings.stage.annealing > 0:
                self._annealing = ConfidenceAnnealing(model)
        if not self.settings.trains or self.settings.stage.mimicking_weight == 0:
            return
        if resumed:
            self._teacher = self._resumed['teacher']
            mimicking = resume_mimicking(runner, self.settings, self._teacher)
        else:
            images = calibration_loader(runner, self.settings, self.settings.stage.pca_samples)
            mimicking = make_mimicking(runner, self.settings, images)
            self._teacher = teacher_hash(runner)
        self._attached.enter_context(mimicking.attached())
        if self.settings.label_free:
            model.loss = LabelFreeLoss(part_of(model, self.settings), mimicking)  # type: ignore[assignment]
            self._attached.callback(model.__dict__.pop, 'loss')
        else:
            self._add_loss(model, LossTerm('loss_mimicking', lambda *_: mimicking()))

    def _add_loss(self, model: nn.Module, term: LossTerm) -> None:
        # Prepended, so that the guard sees this loss as well.
        self._attached.callback(model.register_forward_hook(term, with_kwargs=True, prepend=True).remove)

    def _regularization(self, runner: Runner, model: nn.Module, _: Any) -> torch.Tensor:
        stage = self.settings.stage
        share = min(1.0, runner.iter / runner.max_iters)
        return weight_regularization(model, share, stage.regularization, stage.regularization_start)

    # While it trains

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self._replay is not None:
            self._replay.seed_step(runner.iter)
        share = 1 - self.settings.stage.annealing
        if self._annealing is not None and runner.iter >= share * runner.max_iters:
            self._annealing.before_step()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if self._annealing is not None:
            self._annealing.after_step()
        if self.settings.recipe.train_weights:
            self._oscillations.update(model_of(runner))
            runner.message_hub.update_scalar('train/oscillating', self._oscillations.share())

    def before_val_epoch(self, runner: Runner) -> None:
        self._clock.stop()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._last_validation = (runner.iter, dict(metrics or {}))
        if self.settings.trains and trains(runner) and not self._done:
            found = numbers(metrics)
            if self.settings.recipe.train_weights:
                found['oscillating'] = 100 * self._oscillations.share()
            self._curve.add(runner, found, self._clock.minutes)
        self._clock.start()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        model = model_of(runner)
        if is_prepared(model):
            checkpoint['meta']['gplq'] = describe(model)
        if self._replay is not None:
            checkpoint['meta']['gplq_stage'] = describe_stage(
                self.settings,
                data_seed=self._replay.seed,
                teacher=self._teacher,
                run=self._run,
                minutes=self._clock.minutes,
            )

    # When it ends

    def after_train(self, runner: Runner) -> None:
        self._attached.close()
        self._done = True
        self._clock.stop()
        if self.settings.trains and self.settings.resume_interval:
            save_resume_point(runner, epoch=runner.epoch, iteration=runner.iter)
        adopt_average(runner, trained=self.settings.trains)
        recipe = self.settings.recipe
        if recipe.quantizes and recipe.activation_bits == 32:
            return
        step = f'W32A{recipe.activation_bits}' if recipe.quantizes else 'FP32 control'
        if recipe.train_weights:
            step = f'W{recipe.weight_bits}A{recipe.activation_bits} trained'
        when, metrics = self._last_validation
        if when != runner.iter or not self.settings.trains:
            metrics = evaluate(runner)
        self.report.add(runner, step, numbers(metrics), self._clock.minutes, checkpoint=_save(runner, step))


def _save(runner: Runner, step: str) -> str:
    name = f'gplq_{step.lower().replace(" ", "_")}.pth'
    runner.save_checkpoint(
        runner.work_dir,
        name,
        save_optimizer=False,
        save_param_scheduler=False,
        meta={'epoch': runner.epoch},
        backend_args=dict(BACKEND_ARGS),
    )
    return str(Path(runner.work_dir) / name)


def _initialized_by_checkpoint() -> None:
    """Stands in for the model's `init_weights` until the checkpoint is loaded."""


def _source(runner: Runner) -> str:
    return str(runner._load_from or 'the checkpoint')

"""GPLQ's first stage: train FP32 weights together with the activation scales for one epoch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gplq.batches import Forward, default_forward, first_samples, to_device
from gplq.errors import RecipeError, StageError, TrainingError
from gplq.mimicking import FeatureTap, Mimicking, Reduction, fit_mimicking_loss
from gplq.progress import Progress, no_progress
from gplq.quantizer import Quantizer
from gplq.record import Stage, record_of, scale_parameters
from gplq.running_statistics import RunningStatistics
from gplq.typecheck import check_types
from gplq.weight_training import ConfidenceAnnealing, forget_proposals, weight_regularization
from gplq.weights import WeightQuantizer

__all__ = [
    'ActivationStage',
    'check_finite',
    'check_gradients',
    'feature_point',
    'learning_rates',
    'parameter_groups',
    'stage_iterations',
    'train_activations',
]


@dataclass(frozen=True)
class ActivationStage:
    """Settings of the first stage.

    Attributes:
        lr: of weights; None depends on the stage's length, see :func:`learning_rates`.
        scale_lr: of the scales' logarithms and the offsets, about the relative change a step; None as for ``lr``.
        weight_decay: of weights; scales have none.
        mimicking_weight: factor of the feature loss, 0 to leave it out.
        explained_variance: share that decides the rank of the PCA, used where ``rank`` is None.
        rank_multiple: of which the rank is then the nearest multiple, at least one.
        rank: number of principal directions.
        reduction: of the feature loss, see :class:`gplq.MimickingLoss`; the default has the same weight for features
            of any size: a detector's maps are not normalized, and their sum would drown the task's loss.
        pca_samples: images for the PCA.
        regularization: largest factor of the bin regularization of weights that are rounded in training
            (:func:`gplq.bin_regularization.bin_regularization`), 0 to leave it out.
        regularization_start: share of the stage before it begins.
        annealing: share at the stage's end in which only weights near a boundary between two codes go on learning
            (:class:`gplq.weight_training.ConfidenceAnnealing`), 0 for none.
    """

    lr: float | None = None
    scale_lr: float | None = None
    weight_decay: float = 0.0
    mimicking_weight: float = 1.0
    explained_variance: float = 0.6
    rank_multiple: int = 32
    rank: int | None = None
    reduction: Reduction = 'relative'
    pca_samples: int = 512
    regularization: float = 0.0
    regularization_start: float = 0.25
    annealing: float = 0.0

    def __post_init__(self) -> None:
        check_types(vars(self), get_type_hints(ActivationStage))
        for name in ('lr', 'scale_lr', 'weight_decay', 'mimicking_weight', 'regularization'):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise RecipeError(f'{name}={value} must be finite and not negative')
        for name in ('rank', 'rank_multiple'):
            if (rank := getattr(self, name)) is not None and rank < 1:
                raise RecipeError(f'{name}={rank} must be at least 1')
        if not 0 < self.explained_variance <= 1:
            raise RecipeError(f'explained_variance={self.explained_variance} must be in (0, 1]')
        if self.pca_samples < 1:
            raise RecipeError(f'pca_samples={self.pca_samples} must be at least 1')
        for name in ('regularization_start', 'annealing'):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f'{name}={getattr(self, name)} must be in [0, 1]')


def learning_rates(stage: ActivationStage, iterations: int | None) -> tuple[float, float]:
    """Rates of weights and of scales: those of ``stage``, or what its length asks for.

    A step of AdamW has the size of its rate, so that a short stage at the rate of a long one moves nothing. The
    paper's rate of weights (5e-6, GPLQ sec. 4) is for an epoch of 10,000 iterations, and its accuracy levels off at
    1,000 (appendix). A stage of fewer than 1,000 moves faster in proportion, at most ten times as fast.

    Args:
        stage: its rates, where given, stand as they are.
        iterations: length of the stage; None if unknown, taken as long.
    """
    faster = 1.0 if iterations is None else min(max(1000 / max(iterations, 1), 1.0), 10.0)
    lr = 5e-6 * faster if stage.lr is None else stage.lr
    return lr, 5e-4 * faster if stage.scale_lr is None else stage.scale_lr


def parameter_groups(model: nn.Module, stage: ActivationStage, iterations: int | None) -> list[dict[str, Any]]:
    """Optimizer groups: weights, then scales and offsets with a learning rate of their own and no decay.

    Args:
        model: calibrated.
        stage: learning rates and decay.
        iterations: length of the stage, see :func:`learning_rates`.
    """
    lr, scale_lr = learning_rates(stage, iterations)
    quantizers = {id(p) for p in scale_parameters(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            'params': [p for p in trained if id(p) not in quantizers],
            'lr': lr,
            'weight_decay': stage.weight_decay,
        },
        {
            'params': [p for p in trained if id(p) in quantizers],
            'lr': scale_lr,
            'weight_decay': 0.0,
        },
    ]
    return [group for group in groups if group['params']]


def stage_iterations(epoch: int, full_training: int, minimum: int = 1000) -> int:
    """Length of the stage: one epoch or ``minimum``, whichever is more, but at most a tenth of the FP32 training.

    Args:
        epoch: iterations of an epoch.
        full_training: iterations of the FP32 training, 0 if unknown.
        minimum: the paper's accuracy levels off at 1,000 iterations (GPLQ appendix).
    """
    length = max(epoch, minimum)
    return min(length, max(1, full_training // 10)) if full_training else length


def check_finite(loss: float, iteration: int) -> None:
    """Stop a run that has broken down.

    Raises:
        TrainingError: if ``loss`` is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f'the loss of iteration {iteration} is {loss}: lower lr or scale_lr; the weights are those before it'
        )


def check_gradients(parameters: Iterable[Tensor], iteration: int) -> None:
    """Stop before a step that would spoil the weights: a finite loss can have gradients that are not.

    Raises:
        TrainingError: if a gradient is NaN or infinite.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
    if not math.isfinite(float(norm)):
        raise TrainingError(
            f'a gradient of iteration {iteration} is not finite: lower lr or scale_lr; the weights are those before it'
        )


def feature_point(model: nn.Module) -> tuple[str, Literal['input', 'output']]:
    """Where mimicked features are read: the input of the last classifier layer, else the model's output."""
    for plan in record_of(model).plan.maps:
        if plan.input is not None and plan.input.site == 'classifier_input':
            return plan.name, 'input'
    return '', 'output'


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        raise RecipeError(f'a batch with the keys {sorted(batch)} does not say which are labels: pass loss=')
    inputs, labels = batch[:2]
    return F.cross_entropy(model(inputs), labels)


def train_activations(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    epochs: int = 1,
    iterations: int | None = None,
    stage: ActivationStage | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = _cross_entropy,
    forward: Forward = default_forward,
    progress: Progress = no_progress,
) -> None:
    """Train weights and scales on ``task loss + weight * L_PCA`` with AdamW at constant rates (GPLQ sec. 3.2.1).

    Args:
        model: calibrated.
        loader: batches ``(inputs, labels)``, or whatever ``loss`` and ``forward`` take; a teacher's PCA reads it
            once, the training ``epochs`` times.
        teacher: the frozen FP32 model; None leaves mimicking out.
        epochs: passes over ``loader``.
        iterations: stop after this many steps, going through ``loader`` as often as needed.
        stage: learning rates and the feature loss.
        loss: task loss of ``(model, batch)``; None trains on mimicking alone, labels are not read.
        forward: runs one batch where there is no task loss, and for the PCA.
        progress: wraps an iterable to show how far it is.

    Raises:
        TrainingError: if a loss or gradient is not finite; weights and running statistics are those before that
            step. Also if the loader is empty or can be read less often than needed, or weights are in half precision.
        StageError: if the teacher is quantized, or is the model itself.
        RecipeError: if there is neither a task loss nor a teacher, or nothing to do.
    """
    record = record_of(model, Stage.CALIBRATED)
    stage = stage or ActivationStage()
    if loss is None and (teacher is None or stage.mimicking_weight == 0):
        raise RecipeError('without labels (loss=None) a teacher is needed: pass a copy of the FP32 model')
    for name, length in (('epochs', epochs), ('iterations', iterations)):
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise RecipeError(f'{name}={length!r} must be a whole number of at least 1')
    mimics = teacher is not None and stage.mimicking_weight > 0
    passes = mimics + (epochs if iterations is None else 1)
    if isinstance(loader, Iterator) and passes > 1:
        raise TrainingError(
            f'the training loader is a {type(loader).__name__}, which can be read once; it is read {passes} times, '
            "a teacher's PCA included: pass a DataLoader or a list"
        )
    _check_precision(model)
    forget_proposals(model)
    device = next(model.parameters()).device
    length = _steps(loader, epochs) if iterations is None else iterations
    if (stage.regularization > 0 or stage.annealing > 0) and length is None:
        raise RecipeError('regularization and annealing go by the share of the stage that is over: pass iterations')
    annealing = ConfidenceAnnealing(model)
    groups = parameter_groups(model, stage, length)
    if not groups:
        raise TrainingError('every weight and scale is frozen (requires_grad=False): there is nothing to train')
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    with ExitStack() as stack:
        mimicking = None
        if teacher is not None and mimics:
            _check_teacher(model, teacher)
            mimicking = stack.enter_context(_mimicking(model, teacher, loader, stage, forward).attached())
        stack.enter_context(_training(model))
        if iterations is None:
            batches = _batches(loader, range(epochs))
        else:
            batches = itertools.islice(_batches(loader, itertools.count()), iterations)
        for number, batch in enumerate(progress(batches, 'activation stage')):
            batch = to_device(batch, device)
            statistics = RunningStatistics(model)
            try:
                total = _step_loss(model, batch, loss, forward, mimicking)
                share = min(1.0, number / (length or 1))
                if stage.regularization > 0:
                    start = stage.regularization_start
                    total = total + weight_regularization(model, share, stage.regularization, start)
                check_finite(float(total.detach()), number)
                optimizer.zero_grad(set_to_none=True)
                total.backward()  # type: ignore[no-untyped-call]
                check_gradients(model.parameters(), number)
            except TrainingError:
                statistics.restore()
                raise
            if stage.annealing > 0 and share >= 1 - stage.annealing:
                annealing.before_step()
            optimizer.step()
            record.trained = True
            annealing.after_step()


def _steps(loader: Iterable[Any], epochs: int) -> int | None:
    """Iterations of ``epochs`` passes, None for a stream: a DataLoader over one has a length in name alone."""
    try:
        return epochs * len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        return None


def _check_precision(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise TrainingError(
                f'{name} is {parameter.dtype}, in which steps this small vanish: call model.float() and train under '
                'torch.autocast'
            )


def _check_teacher(model: nn.Module, teacher: nn.Module) -> None:
    remedy = 'pass a copy.deepcopy of the FP32 model'
    for name, module in teacher.named_modules():
        if isinstance(module, (Quantizer, WeightQuantizer)) and module.enabled:
            raise StageError(f'the teacher is quantized ({name}): {remedy}, made before gplq.calibrate')
    own = {id(parameter) for parameter in model.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if shared:
        raise StageError(f'teacher and model share {shared[0]}, which would be frozen in both: {remedy}')
    name, side = feature_point(model)
    if name not in dict(teacher.named_modules()):
        raise StageError(f'the teacher ({type(teacher).__name__}) has no {name}, whose {side} is compared: {remedy}')


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode; afterwards each module's own is put back."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _batches(loader: Iterable[Any], passes: Iterable[int]) -> Iterator[Any]:
    for number in passes:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            reason = 'it is empty' if number == 0 else 'it can be read once, pass a DataLoader or a list'
            raise TrainingError(f'pass {number + 1} over the training loader gave no batch: {reason}')


def _step_loss(
    model: nn.Module,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    forward: Forward,
    mimicking: Mimicking | None,
) -> Tensor:
    if loss is not None:
        total = loss(model, batch)
        if not isinstance(total, Tensor) or total.numel() != 1:
            shape = tuple(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise TrainingError(f'loss must return one number as a tensor, it returned {shape}: sum its parts')
        return total if mimicking is None else total + mimicking()
    assert mimicking is not None
    forward(model, batch)
    return mimicking()


def _mimicking(
    model: nn.Module, teacher: nn.Module, loader: Iterable[Any], stage: ActivationStage, forward: Forward
) -> Mimicking:
    name, side = feature_point(model)
    loss = fit_mimicking_loss(
        teacher,
        FeatureTap(teacher, name, side),
        first_samples(loader, stage.pca_samples),
        forward,
        explained_variance=stage.explained_variance,
        multiple=stage.rank_multiple,
        rank=stage.rank,
        reduction=stage.reduction,
    )
    return Mimicking(model, teacher, loss, stage.mimicking_weight, name, side)

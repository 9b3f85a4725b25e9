"""The model inside a Runner: reach it, run the part that is quantized, wrap it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from mmengine.dist import broadcast
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from gplq.batches import to_device
from gplq.errors import GPLQError, TargetError
from gplq.native_size import blank_images, native_size
from gplq.plugins.hooks.settings import HookSettings

__all__ = [
    'PartForward',
    'blank_forward',
    'check_compensation',
    'is_classifier',
    'model_of',
    'part_of',
    'preprocess',
    'rewrap',
    'synchronize',
    'task_loss',
    'trains',
    'whole_forward',
]


def model_of(runner: Runner) -> nn.Module:
    """The user's model, without the wrapper of distributed training."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def trains(runner: Runner) -> bool:
    """Whether this is `runner.train()`: a loop still described by a dict was not built."""
    return runner._train_loop is not None and not isinstance(runner._train_loop, dict)


def rewrap(runner: Runner) -> None:
    """Wrap the model anew, so that parameters inserted into it are synchronized as well."""
    if is_model_wrapper(runner.model):
        runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), runner.model.module)


def synchronize(model: nn.Module) -> None:
    """Give every process the first one's values; each has calibrated on the same images, but on its own device."""
    for tensor in model.state_dict().values():
        broadcast(tensor)


def part_of(model: nn.Module, settings: HookSettings) -> nn.Module:
    """The part that is quantized by default, usually the backbone.

    Raises:
        TargetError: if the model has no such part.
    """
    try:
        return model.get_submodule(settings.part)
    except AttributeError:
        children = [name for name, _ in model.named_children()]
        raise TargetError(
            f'part={settings.part!r}: {type(model).__name__} has {children}; name one of these, or a part of one by '
            'its dotted name'
        ) from None


def is_classifier(model: nn.Module) -> bool:
    """Whether one `head` sees every image and gives logits; heads of detectors are called otherwise."""
    return hasattr(model, 'head')


def check_compensation(model: nn.Module, settings: HookSettings) -> None:
    """Refuse a compensation of layers behind a choice that the model makes.

    Two runs are compared, of the model before and after rounding. A detector's heads work on proposals or queries
    which the two choose differently, so that there is nothing to compare.

    Raises:
        TargetError: naming the compensation.
    """
    kind = settings.recipe.compensation
    if kind == 'none' or is_classifier(model):
        return
    ahead = (settings.part, _sibling(settings.part, 'neck'))
    if not all(_lies_in(pattern, ahead) for pattern in settings.recipe.targets):
        raise TargetError(
            f'compensation={kind!r} compares outputs before and after rounding, which the heads of '
            f"{type(model).__name__} compute for other objects: name targets in {' or '.join(ahead)}, or set 'none'"
        )


def _sibling(part: str, name: str) -> str:
    """The dotted name beside a part's."""
    parent = part.rpartition('.')[0]
    return f'{parent}.{name}' if parent else name


def _lies_in(pattern: str, parts: Sequence[str]) -> bool:
    return any(pattern == part or pattern.startswith(f'{part}.') for part in parts)


class PartForward:
    """Runs the model's preprocessing and then one part on a batch of its data loader."""

    def __init__(self, part: str) -> None:
        self.part = part

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return model.get_submodule(self.part)(preprocess(model, batch)['inputs'])


def whole_forward(model: nn.Module, batch: Any) -> Any:
    """Runs the whole model on a batch, every head included.

    A second stage sees objects only where the first has found some, except in training, which adds the ground truth
    to its proposals. Detectors of one stage predict: some compute their loss only in training mode. Classifiers give
    their logits, by which the last layer is known.
    """
    mode = 'loss' if hasattr(model, 'roi_head') else 'tensor' if is_classifier(model) else 'predict'
    return model(**preprocess(model, batch), mode=mode)


def task_loss(model: nn.Module, batch: Any) -> Tensor:
    """What the model's own losses add up to.

    Raises:
        TargetError: if it computes none outside of training.
    """
    try:
        losses = model(**preprocess(model, batch), mode='loss')
        total, _ = model.parse_losses(losses)  # type: ignore[operator]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise TargetError(
            f'{type(model).__name__} computes no loss in inference mode ({type(error).__name__}: {error}), which '
            "search=dict(metric='hessian') needs: set metric='mse'"
        ) from error
    return cast(Tensor, total)


def preprocess(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A batch of a data loader as the model takes it: on its device, normalized, padded."""
    device = next(model.parameters()).device
    # Batch augmentations of training are left out: they draw random numbers.
    data: dict[str, Any] = to_device(model.data_preprocessor(batch, False), device)  # type: ignore[operator]
    return data


def blank_forward(model: nn.Module, settings: HookSettings) -> Callable[[nn.Module], Any]:
    """A run of the part on blank images, in the size that it was made for.

    The run raises:
        TargetError: if the part does not take images of that size.
    """
    part = part_of(model, settings)
    blank = blank_images(part, 1, settings.example_size or native_size(part) or (224, 224))

    def forward(model: nn.Module) -> Any:
        try:
            return part_of(model, settings)(blank)
        except GPLQError:
            raise
        except Exception as error:  # a part that takes something else can fail in any way
            raise TargetError(
                f'part={settings.part!r} ({type(part).__name__}) does not run on images of {tuple(blank.shape)} '
                f'({type(error).__name__}: {error}): name the part that takes images, or set example_size'
            ) from error

    return forward

"""What a config says about quantization, as dataclasses of the core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from gplq.activation_stage import ActivationStage
from gplq.errors import RecipeError
from gplq.recipe import Recipe

__all__ = ['HookSettings']

METHODS = {'gplq': Recipe.gplq, 'paper': Recipe.paper, 'rtn': Recipe.rtn}
# Where a method's activation stage differs from the default.
STAGES: dict[str, dict[str, Any]] = {'paper': {'reduction': 'sum'}}


@dataclass(frozen=True)
class HookSettings:
    """Settings of a run that the core does not know: scope, data, length.

    Attributes:
        recipe: how the model is quantized.
        stage: learning rates and feature loss of the activation stage.
        part: attribute of the model to which patterns are relative and whose outputs are mimicked.
        iterations: of the activation stage; None chooses, 0 leaves it out: plain post-training quantization.
        minimum_iterations: the choice is one epoch or this, whichever is more, at most a tenth of FP32 training.
        keep_schedule: leave length, optimizer and schedule as the config has them.
        label_free: train on mimicking alone; heads are frozen and never run.
        validate_fp32: measure the FP32 model first.
        example_size: height and width of the blank image that finds the products; None asks the model.
        seed: chooses the calibration images.
        calibration_batch_size: None takes the training loader's.
        resume_interval: iterations from one resume point to the next; 0 leaves checkpoints to the config.
    """

    recipe: Recipe
    stage: ActivationStage
    part: str = 'backbone'
    iterations: int | None = None
    minimum_iterations: int = 1000
    keep_schedule: bool = False
    label_free: bool = False
    validate_fp32: bool = True
    example_size: tuple[int, int] | None = None
    seed: int = 0
    calibration_batch_size: int | None = None
    resume_interval: int = 200

    def __post_init__(self) -> None:
        if self.iterations is not None and self.iterations < 0:
            raise RecipeError(f'iterations={self.iterations} must not be negative')
        if self.resume_interval < 0:
            raise RecipeError(f'resume_interval={self.resume_interval} must not be negative; 0 writes no resume points')
        if self.label_free and self.stage.mimicking_weight == 0:
            raise RecipeError('label_free=True trains on mimicking alone: set mimicking above 0')

    @classmethod
    def from_config(
        cls,
        weight_bits: int = 4,
        activation_bits: int = 4,
        method: str = 'gplq',
        targets: str | Sequence[str] | None = None,
        skip: str | Sequence[str] = (),
        mimicking: float | bool | None = None,
        recipe: dict[str, Any] | None = None,
        stage: dict[str, Any] | None = None,
        part: str = 'backbone',
        example_size: int | Sequence[int] | None = None,
        **run: Any,
    ) -> HookSettings:
        """Translate a hook's arguments; lists become tuples, unknown names become errors.

        Raises:
            RecipeError: for a name or value that is not supported.
        """
        if method not in METHODS:
            raise RecipeError(f'method={method!r} is not one of {sorted(METHODS)}')
        known = {field.name for field in fields(cls)} - {'recipe', 'stage'}
        for given, names, what in (
            (run, known, 'the hook'),
            (recipe or {}, {f.name for f in fields(Recipe)}, 'recipe'),
            (stage or {}, {f.name for f in fields(ActivationStage)}, 'stage'),
        ):
            unknown = sorted(set(given) - names)
            if unknown:
                raise RecipeError(f'{what} has no setting {unknown}; known are {sorted(names)}')
        patterns = [part] if targets is None else _listed(targets)
        options = {**STAGES.get(method, {}), **(stage or {})}
        if mimicking is not None:
            options['mimicking_weight'] = float(mimicking)
        if isinstance(example_size, int):
            example_size = (example_size, example_size)
        return cls(
            recipe=METHODS[method](
                weight_bits,
                activation_bits,
                **{'targets': patterns, 'skip': _listed(skip), **(recipe or {})},
            ),
            stage=ActivationStage(**options),
            part=part,
            example_size=None if example_size is None else tuple(example_size),  # type: ignore[arg-type]
            **run,
        )

    @property
    def trains(self) -> bool:
        """Whether there is an activation stage."""
        return self.iterations != 0


def _listed(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)

"""What a config says about quantization, as dataclasses of the core."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypedDict, get_type_hints

from gplq.activation_stage import ActivationStage
from gplq.errors import RecipeError
from gplq.recipe import Recipe
from gplq.reconstruct import Reconstruction
from gplq.scale_search import ScaleSearch
from gplq.typecheck import check_types

__all__ = ['HookSettings']

METHODS: dict[str, Callable[..., Recipe]] = {
    'gplq': Recipe.gplq,
    'paper': Recipe.paper,
    'rtn': Recipe.rtn,
    'rtn_min_max': partial(Recipe.rtn, ranges='min_max'),
    'rtn_percentile': partial(Recipe.rtn, ranges='percentile'),
    'ptq4vit': Recipe.ptq4vit,
    'repq_vit': Recipe.repq_vit,
    'gptq': Recipe.gptq,
    'qwt': Recipe.qwt,
    'erq': Recipe.erq,
    'reconstruct': Recipe.reconstruct,
    'lsq': Recipe.lsq,
    'vvtq': Recipe.vvtq,
}
# Where a method's activation stage differs from the default.
STAGES: dict[str, dict[str, Any]] = {
    'paper': {'reduction': 'sum', 'lr': 5e-6, 'scale_lr': 1e-3},
    # The labels teach, or a teacher's soft ones: features are not mimicked.
    'vvtq': {'regularization': 0.01, 'mimicking_weight': 0.0},
}
Patterns = str | tuple[str, ...]
LEAST = {'iterations': 0, 'minimum_iterations': 0, 'seed': 0, 'calibration_batch_size': 1, 'resume_interval': 0}


class Arguments(TypedDict, total=False):
    """What a hook takes in another form than :class:`HookSettings` keeps it; None is the default of each.

    The first four are fields of the recipe and ``mimicking`` is ``stage``'s ``mimicking_weight``, where True is 1;
    ``recipe`` may be bits such as ``'w4a4'``.
    """

    weight_bits: int | None
    activation_bits: int | None
    targets: Patterns | None
    skip: Patterns | None
    mimicking: bool | float | None
    method: (
        Literal[
            'gplq',
            'paper',
            'rtn',
            'rtn_min_max',
            'rtn_percentile',
            'ptq4vit',
            'repq_vit',
            'gptq',
            'qwt',
            'erq',
            'reconstruct',
            'lsq',
            'vvtq',
        ]
        | None
    )
    recipe: str | dict[str, Any] | None
    stage: dict[str, Any] | None
    search: dict[str, Any] | None
    reconstruction: dict[str, Any] | None
    example_size: int | tuple[int, int] | None


@dataclass(frozen=True)
class HookSettings:
    """Settings of a run that the core does not know: scope, data, length.

    Attributes:
        recipe: how the model is quantized.
        stage: learning rates and feature loss of the activation stage.
        search: how `method='ptq4vit'` chooses scales.
        reconstruction: how `method='reconstruct'` learns which way weights are rounded.
        part: attribute of the model that is quantized where no targets are named, and whose outputs are mimicked.
        iterations: of the activation stage; None chooses, 0 leaves it out: plain post-training quantization.
        minimum_iterations: the choice is one epoch or this, whichever is more, at most a tenth of FP32 training.
        keep_schedule: leave length, optimizer and schedule as the config has them, if anything is trained.
        label_free: train on mimicking alone; heads are frozen and never run.
        validate_fp32: measure the FP32 model first.
        example_size: height and width of the blank image that finds the products; None asks the model.
        seed: chooses the calibration images.
        calibration_batch_size: None takes the training loader's.
        resume_interval: iterations from one resume point to the next; 0 leaves checkpoints to the config.
    """

    recipe: Recipe
    stage: ActivationStage
    search: ScaleSearch = ScaleSearch()
    reconstruction: Reconstruction = Reconstruction()
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
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f'{name}={value} must be at least {least}')
        if self.example_size is not None and min(self.example_size) < 1:
            raise RecipeError(f'example_size={self.example_size} must be at least 1')
        if self.keep_schedule and self.iterations:
            raise RecipeError(
                f'keep_schedule=True leaves the length to the config, iterations={self.iterations} sets it: '
                'leave one out'
            )
        if self.label_free and self.stage.mimicking_weight == 0:
            raise RecipeError('label_free=True trains on mimicking alone: set mimicking above 0')
        if self.label_free and not self.inside_part:
            raise RecipeError(
                f'label_free=True never runs what lies outside of {self.part!r}, so that targets='
                f'{self.recipe.targets} would stay half quantized: name targets inside it'
            )

    @classmethod
    def from_config(cls, **config: Any) -> HookSettings:
        """Translate a hook's arguments: those of :class:`Arguments` and the other fields of this class.

        Raises:
            RecipeError: for a name, type or value that is not supported.
        """
        given = _checked(config, {**get_type_hints(cls), **get_type_hints(Arguments)}, 'the hook')
        given = {name: value for name, value in given.items() if value is not None}
        method = given.pop('method', 'gplq')
        recipe, stage = given.pop('recipe', {}), given.pop('stage', {})
        search = _checked(given.pop('search', {}), get_type_hints(ScaleSearch), 'search')
        learned = _checked(given.pop('reconstruction', {}), get_type_hints(Reconstruction), 'reconstruction')
        if isinstance(recipe, str):
            bits = Recipe.from_string(recipe)
            recipe = {'weight_bits': bits.weight_bits, 'activation_bits': bits.activation_bits}
        if 'mimicking' in given:
            given['mimicking_weight'] = float(given.pop('mimicking'))
        recipe = _with(recipe, 'recipe', given, ('weight_bits', 'activation_bits', 'targets', 'skip'))
        stage = _with(stage, 'stage', given, ('mimicking_weight',))
        recipe = _checked(recipe, {**get_type_hints(Recipe), 'targets': Patterns, 'skip': Patterns}, 'recipe')
        stage = _checked(stage, get_type_hints(ActivationStage), 'stage')
        size = given.get('example_size')
        if isinstance(size, int):
            given['example_size'] = (size, size)
        return cls(
            recipe=METHODS[method](**{'targets': given.get('part', cls.part), **recipe}),
            stage=ActivationStage(**{**STAGES.get(method, {}), **stage}),
            search=ScaleSearch(**search),
            reconstruction=Reconstruction(**learned),
            **given,
        )

    @property
    def inside_part(self) -> bool:
        """Whether nothing outside of the part is quantized."""
        part = self.part
        return all(pattern == part or pattern.startswith(f'{part}.') for pattern in self.recipe.targets)

    @property
    def trains(self) -> bool:
        """Whether there is an activation stage."""
        return self.iterations != 0


def _with(inner: dict[str, Any], place: str, outer: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Settings of the recipe or stage, with those that the hook takes for them moved in."""
    moved = {name: outer.pop(name) for name in names if name in outer}
    for name, value in moved.items():
        if name in inner and inner[name] != value:
            raise RecipeError(f'{name}={value!r} contradicts {place}={{{name!r}: {inner[name]!r}}}: leave one out')
    return {**inner, **moved}


def _checked(given: dict[str, Any], types: dict[str, Any], what: str) -> dict[str, Any]:
    """Settings of a config, lists as tuples, refused where there is no such setting or it is of another type."""
    unknown = sorted(set(given) - set(types))
    if unknown:
        close = [near for name in unknown for near in difflib.get_close_matches(name, types, n=1)]
        meant = f'; did you mean {close}' if close else ''
        raise RecipeError(f'{what} has no setting {unknown}{meant}; known are {sorted(types)}')
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    check_types(values, types, '' if what == 'the hook' else f'{what}.')
    return values

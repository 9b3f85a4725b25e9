"""Everything that decides how a model is quantized, in one frozen dataclass that travels with the weights."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_type_hints

from gplq.errors import RecipeError
from gplq.observers.factory import OBSERVERS
from gplq.spec import FLOAT_BITS, check_bits
from gplq.typecheck import check_types

__all__ = [
    'RECIPE_VERSION',
    'WEIGHT_STAGE_FIELDS',
    'WEIGHT_TRAINING_FIELDS',
    'Compensation',
    'Recipe',
    'WeightScheme',
    'as_recipe',
]

RECIPE_VERSION = 1
# What the weight stage decides: one activation stage serves it under any of these, although the search for input
# scales looked at the weights as they were to be rounded then.
WEIGHT_STAGE_FIELDS = frozenset(
    {'weight_bits', 'weight_scheme', 'rounding', 'compensation', 'compensation_bits', 'calibration_samples'}
)
# Training of rounded weights can set out from a trained activation stage, too.
WEIGHT_TRAINING_FIELDS = frozenset({'train_weights', 'trained_steps'})

Rounding = Literal['descent', 'feedback', 'nearest', 'reconstruct']
WeightScheme = Literal['percentile', 'percentile_asymmetric', 'mse', 'min_max', 'searched']
Compensation = Literal['none', 'qwt', 'ridge', 'erq', 'affine']
TrainedSteps = Literal['lsq', 'norm', 'statistics']
AttentionMap = Literal['row', 'uniform', 'twin_uniform', 'log_sqrt2']
ChannelRanges = Literal['min_max', 'percentiles']
GeluOutput = Literal['signed', 'unsigned_offset', 'twin_uniform']


@dataclass(frozen=True)
class Recipe:
    """Settings of all stages.

    Bits are 2 to 8, or 32 for floating point. Name patterns are those of :mod:`fnmatch`, matched against module
    names as ``model.named_modules()`` gives them.

    Attributes:
        weight_bits: of every targeted weight but the first and last layer's.
        activation_bits: of every targeted site but the first and last layer's.
        first_last_bits: weights and inputs of the patch embedding and of the last classifier layer.
        targets: names to quantize; each must match a module that can be quantized.
        skip: names to leave in floating point; each must match a module.
        linear_input: ``'channel'`` (one scale an input channel, folded into the weights), ``'tensor'``, or
            ``'post_norm'``: a channel where the input is a LayerNorm's very output, else a tensor.
        input_offset: codes of linear inputs without sign, with an offset, which ends up in the layer's bias; else their
            range is the same on both sides of zero, or starts there.
        channel_ranges: of the channels of linear inputs: all that was seen, or of three ranges between percentiles that
            of least squared error, a channel its own (RepQ-ViT).
        exponents: candidates for alpha in ``scale_c ~ range_c ** alpha``; ``(1.0,)`` is the plain per-channel
            scale, ``(0.0,)`` one scale for all channels in a vector. Searched a layer when there are several.
        clips: candidates for the share of the range that is represented, searched with the exponents.
        balance: adds scales that even out the folded weight columns to the search.
        fold: quantize weights with the input scales folded in. Without it per-channel scales cannot leave the
            integer product, and :mod:`gplq.integer` refuses the layer: an ablation, not a deployment.
        fold_layernorm: let the LayerNorm before a layer divide by its input scales, where nothing else reads it.
        linear_observer: of inputs with one scale (convolutions, or linear_input='tensor').
        product_observer: of queries, keys, values and attention maps.
        gelu_output: GELU outputs as the other inputs (``'signed'`` where they have no offset), unsigned with an offset,
            or ``'twin_uniform'`` with one scale in all.
        attention_map: ``'row'``: each row in units of its largest value (:mod:`gplq.row_quantizer`; one scale for all
            rows in an einsum, whose axes only its equation knows), ``'uniform'``: one scale for all rows, or see
            :mod:`gplq.twin_uniform` and :mod:`gplq.log_sqrt2`.
        equalize: even out query and key channels in the weights where nothing else reads them.
        train_weights: round weights while the activation stage trains, with learned scales (LSQ): quantization-aware
            training of both, whose weights the weight stage takes as they are.
        trained_steps: how these weights' steps are found: ``'lsq'`` learns them, ``'norm'`` too with VVTQ's
            module-dependent factor of the gradient, ``'statistics'`` follows the mean size of each row (OFQ).
        weight_scheme: how weight scales are chosen, always one an output channel; ``'searched'`` takes those of
            :func:`gplq.search_scales`.
        rounding: ``'nearest'``, or ``'feedback'``: columns make up for the rounding of those before them (GPTQ), and
            scales and biases are fitted to the inputs seen; ``'descent'``: then codes are chosen anew, a column at a
            time, by what they do to inputs around their mean, which the bias sees to. Layers of more than 4,096 columns
            are rounded to nearest. ``'reconstruct'``: learned block by block (:class:`gplq.Reconstruction`).
        compensation: what is fitted after the weights are rounded.
        compensation_bits: of the matrix that ``'qwt'`` adds to each block.
        calibration_samples: how many samples calibration and weight stage read at most.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    first_last_bits: int = 8
    targets: tuple[str, ...] = ('*',)
    skip: tuple[str, ...] = ()
    linear_input: Literal['channel', 'tensor', 'post_norm'] = 'channel'
    input_offset: bool = True
    channel_ranges: ChannelRanges = 'min_max'
    exponents: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    clips: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    balance: bool = True
    fold: bool = True
    fold_layernorm: bool = True
    linear_observer: str = 'mse'
    product_observer: str = 'mse'
    gelu_output: GeluOutput = 'signed'
    attention_map: AttentionMap = 'row'
    equalize: bool = True
    train_weights: bool = False
    trained_steps: TrainedSteps = 'lsq'
    weight_scheme: WeightScheme = 'mse'
    rounding: Rounding = 'descent'
    compensation: Compensation = 'none'
    compensation_bits: int = 8
    calibration_samples: int = 512

    def __post_init__(self) -> None:
        check_types(vars(self), get_type_hints(Recipe))
        for name in ('weight_bits', 'activation_bits', 'first_last_bits'):
            check_bits(getattr(self, name), name, allow_float=True)
        check_bits(self.compensation_bits, 'compensation_bits')
        for name in ('linear_observer', 'product_observer'):
            if getattr(self, name) not in OBSERVERS:
                raise RecipeError(f'{name}={getattr(self, name)!r} is not one of {sorted(OBSERVERS)}')
        if not self.targets:
            raise RecipeError('targets is empty: nothing would be quantized')
        if not self.exponents or not all(0 <= alpha <= 1 for alpha in self.exponents):
            raise RecipeError(f'exponents={self.exponents} must be values in [0, 1]')
        if not self.clips or not all(0 < clip <= 1 for clip in self.clips):
            raise RecipeError(f'clips={self.clips} must be values in (0, 1]')
        if self.calibration_samples < 1:
            raise RecipeError(f'calibration_samples={self.calibration_samples} must be at least 1')
        if self.train_weights and (self.compensation != 'none' or self.weight_scheme == 'percentile_asymmetric'):
            raise RecipeError(
                "train_weights=True settles the weights: set compensation='none' and a symmetric weight_scheme"
            )
        if self.train_weights and self.rounding == 'reconstruct':
            raise RecipeError("train_weights=True learns the weights' rounding already: set rounding='nearest'")
        if self.trained_steps != 'lsq' and not self.train_weights:
            raise RecipeError(f'trained_steps={self.trained_steps!r} is for train_weights=True, which is not set')
        if not self.fold and self.compensation != 'none':
            raise RecipeError("fold=False is an ablation of the plain weight stage: set compensation='none'")

    @property
    def quantizes(self) -> bool:
        """False for w32a32, where every verb leaves the model as it is."""
        return self.weight_bits != FLOAT_BITS or self.activation_bits != FLOAT_BITS

    @property
    def scales_are_ranges(self) -> bool:
        """Whether a linear input's scales are its channels' ranges, without a search."""
        return self.exponents == (1.0,) and self.clips == (1.0,) and not self.balance

    @property
    def uses_statistics(self) -> bool:
        """Whether the weight stage looks at the inputs of the weights."""
        return self.rounding in ('descent', 'feedback') and not self.train_weights

    @property
    def reads_batches(self) -> bool:
        """Whether the weight stage runs the model."""
        return self.uses_statistics or self.rounding == 'reconstruct' or self.compensation != 'none'

    @property
    def name(self) -> str:
        """Short form such as ``'w4a4'``."""
        return f'w{self.weight_bits}a{self.activation_bits}'

    @classmethod
    def gplq(cls, weight_bits: int = 4, activation_bits: int = 4, **settings: Any) -> Recipe:
        """The recommended settings at these bits."""
        return cls(weight_bits=weight_bits, activation_bits=activation_bits, **_tuples(settings))

    @classmethod
    def paper(cls, weight_bits: int = 4, activation_bits: int = 4, **settings: Any) -> Recipe:
        """The choices of the GPLQ paper (secs. 3.2, 4), with folding so that it can be executed."""
        chosen: dict[str, Any] = {
            'exponents': (1.0,),
            'clips': (1.0,),
            'balance': False,
            'input_offset': False,
            'equalize': False,
            'product_observer': 'percentile',
            'attention_map': 'uniform',
            'weight_scheme': 'percentile',
            'rounding': 'nearest',
            'compensation': 'qwt',
        }
        return cls.gplq(weight_bits, activation_bits, **{**chosen, **settings})

    @classmethod
    def rtn(
        cls,
        weight_bits: int = 4,
        activation_bits: int = 4,
        *,
        ranges: Literal['mse', 'min_max', 'percentile'] = 'mse',
        **settings: Any,
    ) -> Recipe:
        """Round-to-nearest, calibrated: activations a tensor and weights a channel.

        Args:
            weight_bits: 2 to 8, or 32.
            activation_bits: likewise.
            ranges: of both, that of least squared error, from the smallest to the largest value, or between
                percentiles.
            settings: any other of the recipe.
        """
        chosen: dict[str, Any] = {
            'linear_observer': ranges,
            'product_observer': ranges,
            'weight_scheme': ranges,
            'linear_input': 'tensor',
            'input_offset': False,
            'attention_map': 'uniform',
            'equalize': False,
            'rounding': 'nearest',
        }
        return cls.gplq(weight_bits, activation_bits, **{**chosen, **settings})

    @classmethod
    def ptq4vit(cls, weight_bits: int = 8, activation_bits: int = 8, **settings: Any) -> Recipe:
        """PTQ4ViT, for :func:`gplq.search_scales`: one scale a tensor, twin uniform attention maps and GELU outputs."""
        chosen: dict[str, Any] = {
            'linear_input': 'tensor',
            'input_offset': False,
            'equalize': False,
            'gelu_output': 'twin_uniform',
            'attention_map': 'twin_uniform',
            'weight_scheme': 'searched',
            'rounding': 'nearest',
        }
        return cls.gplq(weight_bits, activation_bits, **{**chosen, **settings})

    @classmethod
    def repq_vit(cls, weight_bits: int = 4, activation_bits: int = 4, **settings: Any) -> Recipe:
        """RepQ-ViT: scale and offset a channel behind LayerNorms, maps by powers of the root of two."""
        chosen: dict[str, Any] = {
            'linear_input': 'post_norm',
            'input_offset': True,
            'channel_ranges': 'percentiles',
            'exponents': (1.0,),
            'clips': (1.0,),
            'balance': False,
            'equalize': False,
            'attention_map': 'log_sqrt2',
            'weight_scheme': 'percentile_asymmetric',
            'rounding': 'nearest',
        }
        return cls.gplq(weight_bits, activation_bits, **{**chosen, **settings})

    @classmethod
    def qwt(cls, weight_bits: int = 4, activation_bits: int = 4, **settings: Any) -> Recipe:
        """QwT's compensation on RepQ-ViT, as its paper has it."""
        return cls.repq_vit(weight_bits, activation_bits, **{'compensation': 'qwt', **settings})

    @classmethod
    def erq(cls, weight_bits: int = 4, activation_bits: int = 4, **settings: Any) -> Recipe:
        """ERQ on RepQ-ViT's quantizers: each weight refitted to quantized inputs, then rounded with feedback."""
        return cls.repq_vit(weight_bits, activation_bits, **{'compensation': 'erq', 'rounding': 'feedback', **settings})

    @classmethod
    def lsq(cls, weight_bits: int = 4, activation_bits: int = 4, **settings: Any) -> Recipe:
        """Plain quantization-aware training of weights and activations together (LSQ)."""
        chosen: dict[str, Any] = {'train_weights': True, 'equalize': False, 'rounding': 'nearest'}
        return cls.gplq(weight_bits, activation_bits, **{**chosen, **settings})

    @classmethod
    def vvtq(cls, weight_bits: int = 4, activation_bits: int = 4, **settings: Any) -> Recipe:
        """Variation-aware quantization-aware training: LSQ with a factor a module, offsets behind GELUs."""
        chosen: dict[str, Any] = {
            'trained_steps': 'norm',
            'linear_input': 'tensor',
            'input_offset': False,
            'attention_map': 'uniform',
            'gelu_output': 'unsigned_offset',
        }
        return cls.lsq(weight_bits, activation_bits, **{**chosen, **settings})

    @classmethod
    def reconstruct(cls, weight_bits: int = 4, activation_bits: int = 4, **settings: Any) -> Recipe:
        """GPLQ's quantizers with weights learned block by block (BRECQ, QDrop, APHQ-ViT), and no other training."""
        return cls.gplq(weight_bits, activation_bits, **{'rounding': 'reconstruct', **settings})

    @classmethod
    def gptq(cls, weight_bits: int = 4, activation_bits: int = 4, **settings: Any) -> Recipe:
        """Round-to-nearest activations, weights by GPTQ on the quantized inputs."""
        return cls.rtn(weight_bits, activation_bits, **{'rounding': 'feedback', **settings})

    @classmethod
    def from_string(cls, text: str) -> Recipe:
        """``'w4a4'`` and the like.

        Raises:
            RecipeError: if the text has another form or bits that are not supported.
        """
        match = re.fullmatch(r'w(\d{1,2})a(\d{1,2})', text.strip().lower())
        if match is None:
            raise RecipeError(f"recipe {text!r} is not of the form 'w4a4' (weight bits, activation bits)")
        return cls.gplq(int(match[1]), int(match[2]))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`.

        Raises:
            RecipeError: for an unknown field, a value of the wrong type or a version from the future.
        """
        if not isinstance(values, dict):
            raise RecipeError(f'a recipe must be a mapping, got {type(values).__name__}')
        values = dict(values)
        version = values.pop('version', RECIPE_VERSION)
        if version != RECIPE_VERSION:
            raise RecipeError(f'recipe version {version!r} is not {RECIPE_VERSION}: use the gplq that wrote it')
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise RecipeError(f'recipe fields {unknown} are unknown; known are {sorted(known)}')
        return cls(**_tuples(values))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Inverse of :meth:`to_json`; raises RecipeError for text that is not JSON."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f'the recipe is not JSON: {error}') from None
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields and the version of the format."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {'version': RECIPE_VERSION, **values}

    def to_json(self) -> str:
        """One line of JSON, keys sorted."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def replace(self, **settings: Any) -> Recipe:
        """A copy with other settings."""
        return replace(self, **_tuples(settings))


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Lists, as JSON and configs have them, become tuples; one string becomes one pattern."""
    converted = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    for name in ('targets', 'skip'):
        if isinstance(converted.get(name), str):
            converted[name] = (converted[name],)
    return converted


def as_recipe(recipe: Recipe | str) -> Recipe:
    """A recipe from itself or from its short string."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        return Recipe.from_string(recipe)
    raise RecipeError(f"a recipe is a gplq.Recipe or a string like 'w4a4', got {type(recipe).__name__}")

"""The methods of a benchmark and the variants of ours, by the settings of the hook in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ['FLOATING', 'METHODS', 'ROW', 'VARIANTS', 'variants_of']

METHODS: dict[str, dict[str, Any]] = {
    'fp32': {'weight_bits': 32, 'activation_bits': 32, 'iterations': 0},
    'fp32_control': {'method': 'gplq', 'weight_bits': 32, 'activation_bits': 32},
    'gplq': {'method': 'gplq'},
    'lsq': {'method': 'lsq'},
    'vvtq': {'method': 'vvtq'},
    **{
        name: {'method': name, 'iterations': 0}
        for name in ('rtn', 'rtn_min_max', 'rtn_percentile', 'ptq4vit', 'repq_vit', 'gptq', 'qwt', 'erq', 'reconstruct')
    },
}

# Methods without bits, and what their step is called.
FLOATING = {'fp32': 'FP32', 'fp32_control': 'FP32 control'}
# What every table has.
ROW = ('fp32', 'fp32_control', 'gplq', 'rtn')

_UNIFORM = {'recipe.gelu_output': 'signed', 'recipe.attention_map': 'uniform'}
# PTQ4ViT's ablations: what weighs an output's error, with and without twin uniform quantization.
_SEARCHES: dict[str, dict[str, Any]] = {
    **{metric: {'search.metric': metric} for metric in ('mse', 'cosine')},
    'uniform': _UNIFORM,
    **{f'uniform, {metric}': {**_UNIFORM, 'search.metric': metric} for metric in ('mse', 'cosine')},
    **{objective: {'search.objective': objective} for objective in ('quantized_kl', 'perturbation')},
}

# What differs from the hook's own settings, in the order of tables: of GPLQ, and behind these of PTQ4ViT.
VARIANTS: dict[str, dict[str, Any]] = {
    '': {},
    'folded': {'recipe.exponents': [1.0], 'recipe.balance': False},
    'unfolded': {'recipe.exponents': [1.0], 'recipe.balance': False, 'recipe.fold': False},
    'per tensor': {'recipe.linear_input': 'tensor'},
    'symmetric': {'recipe.input_offset': False},
    'one scale a map': {'recipe.attention_map': 'uniform'},
    'no mimicking': {'mimicking': 0},
    **{f'mimicking {weight:g}': {'mimicking': weight} for weight in (0.1, 10.0)},
    # To the direction: the nearest multiple of 32 is the same for all three in narrow models.
    **{
        f'PCA {share} %': {'stage.explained_variance': share / 100, 'stage.rank_multiple': 1, 'stage.rank': None}
        for share in (30, 60, 90)
    },
    **{f'{count} iterations': {'iterations': count} for count in (1, 10, 100, 1000)},
    '1 epoch': {'minimum_iterations': 0, 'iterations': None},
    'scales only': {'stage.lr': 0.0},
    'nearest': {'recipe.rounding': 'nearest'},
    'searched': {'recipe.weight_scheme': 'searched', 'recipe.rounding': 'nearest'},
    'repq_vit': {'recipe.weight_scheme': 'percentile_asymmetric', 'recipe.rounding': 'nearest'},
    'feedback': {'recipe.rounding': 'feedback'},
    'reconstruct': {'recipe.rounding': 'reconstruct'},
    **{kind: {'recipe.compensation': kind} for kind in ('qwt', 'ridge', 'affine', 'erq')},
    "paper's weights": {
        'recipe.weight_scheme': 'percentile',
        'recipe.rounding': 'nearest',
        'recipe.compensation': 'qwt',
    },
    **_SEARCHES,
}


def variants_of(method: str, variants: Sequence[str]) -> list[str]:
    """Those of the variants that are the method's own, or ``''``, its settings as they are, if none is."""
    own = {'gplq': VARIANTS.keys() - _SEARCHES.keys(), 'ptq4vit': {'', *_SEARCHES}}.get(method, {''})
    return [name for name in variants if name in own] or ['']

"""Weights from a file into a timm model, or into the feature model that timm makes of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import timm
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from gplq.errors import RecipeError
from gplq.plugins.checkpoint_file import check_depth, parameter_names, tensors_beyond
from gplq.plugins.pretrained import fit_backbone_state, inside_backbone

__all__ = ['check_model_name', 'check_timm_depth', 'fit_timm_state', 'made_by_timm']

_PREFIX = re.compile(r'^(model\.)+')


def check_model_name(name: str, owner: str) -> None:
    """Refuse a name that timm has no model of.

    Raises:
        RecipeError: naming ``owner``, timm's version and models of similar names.
    """
    # A name with a colon is looked up elsewhere; what follows a dot is a choice of weights.
    if ':' not in name and not timm.is_model(name.split('.')[0]):
        near = timm.list_models(f'*{name.split("_")[0]}*')[:5]
        raise RecipeError(f'{owner}: timm {timm.__version__} has no model {name!r}; it has {near}')


def made_by_timm(owner: str, name: str, **options: Any) -> nn.Module:
    """A timm model.

    Raises:
        RecipeError: it does not take its options.
    """
    try:
        return timm.create_model(name, **options)
    except Exception as error:  # each of timm's models has checks of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f'{owner}: timm cannot make {name} with {options}: {reason:.200}') from error


def fit_timm_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Pick the tensors of ``model`` from a timm classifier's, a feature model's or a detector's state.

    Positions and Swin's tables of biases are resized to those of ``model``.

    Raises:
        CheckpointError: a tensor is missing or has another shape, as if ``source`` held another architecture.
    """
    own = model.state_dict()
    names = {_plain(name): name for name in own}
    renamed = {names.get(_plain(name), name): value for name, value in inside_backbone(state).items()}
    resized = {
        name: _with_positions_of(model, own, name, _with_windows_of(own, name, value))
        for name, value in renamed.items()
    }
    return fit_backbone_state(model, resized, source)


def check_timm_depth(
    model: nn.Module, name: str, options: Mapping[str, Any], state: Mapping[str, Tensor], source: str
) -> None:
    """Refuse a deeper timm model's tensors.

    ``model`` itself may be a part: one that gives feature maps leaves its last blocks out, one without a classifier a
    layer before it. What goes beyond it is compared with the whole model of that name and these options.

    Raises:
        CheckpointError: as :func:`gplq.plugins.checkpoint_file.check_depth` does.
    """
    found = {_plain(tensor) for tensor in inside_backbone(state)}
    if tensors_beyond({_plain(tensor) for tensor in parameter_names(model)}, found):
        whole = made_by_timm(name, name, **{key: options[key] for key in options if key != 'feature_cls'})
        check_depth({_plain(tensor) for tensor in parameter_names(whole)}, found, source)


def _plain(name: str) -> str:
    """Name a tensor alike in a classifier and in timm's feature models: `layers_0` and `model.layers.0`."""
    return _PREFIX.sub('', name).replace('_', '.')


def _with_positions_of(model: Any, own: Mapping[str, Tensor], name: str, value: Tensor) -> Tensor:
    """Resize positions (1, tokens, C) of a square as timm does, so that a file and `pretrained=True` give one model."""
    if name.rpartition('.')[2] != 'pos_embed' or name not in own or value.ndim != 3 or own[name].ndim != 3:
        return value
    # A feature model holds the one that it was made of.
    grid = getattr(getattr(getattr(model, 'model', model), 'patch_embed', None), 'grid_size', None)
    if grid is None or value.shape[1] == own[name].shape[1]:
        return value
    # The class token and the like.
    prefix = own[name].shape[1] - math.prod(grid)
    tokens = value.shape[1] - prefix
    if prefix < 0 or tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        return value
    return resample_abs_pos_embed(value, new_size=list(grid), num_prefix_tokens=prefix)


def _with_windows_of(own: Mapping[str, Tensor], name: str, value: Tensor) -> Tensor:
    """Resize Swin's table of ((2 h - 1) (2 w - 1), heads) biases to the windows of this model, which are square."""
    if not name.endswith('relative_position_bias_table') or name not in own or value.shape == own[name].shape:
        return value
    side = (math.isqrt(len(own[name])) + 1) // 2
    return resize_rel_pos_bias_table(value, (side, side), tuple(own[name].shape))

"""The hook in a config, and its settings in a run of a method."""

from __future__ import annotations

import pytest
from mmengine.config import Config

from gplq.errors import RecipeError
from gplq.plugins.hook_of_config import hook_of, settings_of_run
from gplq.plugins.results import ResultError

NAME = 'gplq.plugins.GPLQHook'


def config(**hook: object) -> Config:
    return Config({'default_hooks': {'gplq': {'type': NAME, **hook}}})


def test_arguments_are_those_of_the_hook_alone() -> None:
    cfg = config(priority='NORMAL', weight_bits=3, recipe={'clips': [1.0]})
    assert hook_of(cfg, 'a.py') == {'weight_bits': 3, 'recipe': {'clips': [1.0]}}
    assert cfg.default_hooks.gplq.type == NAME


@pytest.mark.parametrize(
    'cfg',
    [{}, {'default_hooks': None}, {'default_hooks': {'gplq': 5}}, {'default_hooks': {'gplq': {'type': 'EMAHook'}}}],
)
def test_config_without_the_hook_is_named(cfg: dict[str, object]) -> None:
    with pytest.raises(ResultError, match=r'config a\.py has no default_hooks'):
        hook_of(Config(cfg), 'a.py')


def test_method_variant_and_options_come_together() -> None:
    cfg = config(priority='NORMAL', weight_bits=3, recipe={'clips': [1.0]})
    settings = settings_of_run(
        cfg, 'a.py', 'gplq', 'no mimicking', {'default_hooks.gplq.recipe.fold': 'False', 'x': 'text'}
    )
    assert (settings.recipe.weight_bits, settings.recipe.clips, settings.recipe.fold) == (3, (1.0,), False)
    assert settings.stage.mimicking_weight == 0
    assert settings_of_run(cfg, 'a.py', 'rtn').recipe.rounding == 'nearest'
    assert hook_of(cfg, 'a.py') == {'weight_bits': 3, 'recipe': {'clips': [1.0]}}


def test_unknown_setting_is_named() -> None:
    with pytest.raises(RecipeError, match='mimicry'):
        settings_of_run(config(mimicry=2.0), 'a.py', 'gplq')


@pytest.mark.parametrize(
    ('hook', 'options'),
    [({'recipe': 'w4a4'}, {}), ({}, {'default_hooks.gplq.recipe': 'w4a4'}), ({}, {'default_hooks.gplq': '5'})],
)
def test_settings_inside_of_what_is_no_dict(hook: dict[str, object], options: dict[str, str]) -> None:
    with pytest.raises(ResultError, match='write such a setting as dict'):
        settings_of_run(config(**hook), 'a.py', 'gplq', 'folded', options)

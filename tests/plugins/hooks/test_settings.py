"""A hook's arguments become the core's dataclasses."""

from __future__ import annotations

from typing import Any

import pytest

from gplq.errors import RecipeError
from gplq.plugins.hooks.settings import HookSettings


def test_the_papers_feature_loss_is_the_sum_it_prints_unless_told_otherwise() -> None:
    assert HookSettings.from_config().stage.reduction == 'relative'
    assert HookSettings.from_config(method='paper').stage.reduction == 'sum'
    assert HookSettings.from_config(method='paper', stage={'reduction': 'mean'}).stage.reduction == 'mean'


def test_lists_of_a_config_become_tuples_and_one_pattern_a_list() -> None:
    settings = HookSettings.from_config(activation_bits=3, targets='backbone', skip=['backbone.a'], example_size=32)
    assert settings.recipe.targets == ('backbone',)
    assert settings.recipe.skip == ('backbone.a',)
    assert (settings.recipe.weight_bits, settings.recipe.activation_bits) == (4, 3)
    assert settings.example_size == (32, 32)


def test_mimicking_is_a_switch_or_a_weight() -> None:
    assert HookSettings.from_config(mimicking=False).stage.mimicking_weight == 0
    assert HookSettings.from_config(mimicking=True).stage.mimicking_weight == 1
    assert HookSettings.from_config(mimicking=0.1).stage.mimicking_weight == 0.1


def test_bits_as_a_string_as_numbers_and_in_the_recipe() -> None:
    for given in (dict(recipe='w3a5'), dict(weight_bits=3, activation_bits=5), dict(recipe=dict(weight_bits=3))):
        recipe = HookSettings.from_config(**{'activation_bits': 5, **given}).recipe
        assert (recipe.weight_bits, recipe.activation_bits) == (3, 5)
    # The method still decides about the rest.
    assert HookSettings.from_config(recipe='w3a5', method='rtn').recipe.linear_input == 'tensor'


def test_none_leaves_a_setting_at_its_default() -> None:
    arguments = ('weight_bits', 'activation_bits', 'targets', 'skip', 'mimicking', 'method', 'recipe', 'stage')
    run = ('iterations', 'example_size', 'calibration_batch_size')
    assert HookSettings.from_config(**dict.fromkeys((*arguments, *run))) == HookSettings.from_config()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(iterations='4'), "iterations must be an integer or None, got '4'"),
        (dict(iterations=2.5), 'iterations must be an integer or None, got 2.5'),
        (dict(iterations=True), 'iterations must be an integer or None, got True'),
        (dict(minimum_iterations=-1), 'minimum_iterations=-1 must be at least 0'),
        (dict(mimicking='yes'), "mimicking must be True or False or a number or None, got 'yes'"),
        (dict(mimicking=-1), 'mimicking_weight=-1.0'),
        (dict(mimicking=float('nan')), 'mimicking_weight=nan must be finite'),
        (dict(stage='fast'), "stage must be a dict or None, got 'fast'"),
        (dict(stage=dict(lr='fast')), "stage.lr must be a number or None, got 'fast'"),
        (dict(stage=dict(rank='x')), "stage.rank must be an integer or None, got 'x'"),
        (dict(stage=dict(rank=0)), 'rank=0 must be at least 1'),
        (dict(stage=dict(rank_multiple=0)), 'rank_multiple=0 must be at least 1'),
        (dict(stage=dict(explained_variance=0)), 'explained_variance=0 must be in'),
        (dict(stage=dict(reduction='max')), r"stage.reduction must be one of \[.*'sum'.*\], got 'max'"),
        (dict(recipe=4), 'recipe must be a string or a dict or None, got 4'),
        (dict(recipe='4 bits'), "recipe '4 bits' is not of the form 'w4a4'"),
        (dict(recipe=dict(calibration_samples='all')), "recipe.calibration_samples must be an integer, got 'all'"),
        (dict(recipe=dict(clips=0.5)), r'recipe.clips must be a list \(a number each\), got 0.5'),
        (dict(recipe=dict(weight_bits=3), weight_bits=4), 'weight_bits=4 contradicts recipe=.*3.*: leave one out'),
        (dict(recipe='w3a3', activation_bits=4), 'activation_bits=4 contradicts recipe=.*3.*: leave one out'),
        (dict(stage=dict(mimicking_weight=2.0), mimicking=1), 'mimicking_weight=1.0 contradicts stage=.*2.0'),
        (dict(skip=5), r'skip must be a string or a list \(a string each\) or None, got 5'),
        (dict(targets=[1]), r'targets must be a string or a list \(a string each\) or None, got \(1,\)'),
        (dict(part=None), 'part must be a string, got None'),
        (dict(example_size=(16,)), r'example_size must be an integer or a list of 2 \(an integer each\) .*\(16,\)'),
        (dict(example_size=[0, 8]), r'example_size=\(0, 8\) must be at least 1'),
        (dict(seed='a'), "seed must be an integer, got 'a'"),
        (dict(seed=-1), 'seed=-1 must be at least 0'),
        (dict(calibration_batch_size=-1), 'calibration_batch_size=-1 must be at least 1'),
        (dict(label_free='no'), "label_free must be True or False, got 'no'"),
        (dict(label_free=True, targets=['backbone', 'neck']), "label_free=True never runs .* outside of 'backbone'"),
        (dict(keep_schedule=1), 'keep_schedule must be True or False, got 1'),
        (dict(keep_schedule=True, iterations=3), 'keep_schedule=True .* iterations=3 .*: leave one out'),
        (dict(method='GPLQ'), r"method must be one of \['gplq', 'paper', 'rtn', .*\] or None, got 'GPLQ'"),
    ],
)
def test_settings_of_a_wrong_type_or_size_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        HookSettings.from_config(**arguments)


def test_an_unknown_setting_is_told_all_that_there_are() -> None:
    with pytest.raises(RecipeError, match=r"the hook has no setting \['bits'\]") as told:
        HookSettings.from_config(bits=4)
    names = (
        'weight_bits',
        'activation_bits',
        'targets',
        'skip',
        'method',
        'mimicking',
        'recipe',
        'stage',
        'iterations',
    )
    assert all(f"'{name}'" in str(told.value) for name in names)

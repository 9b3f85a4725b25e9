"""A hook's arguments become the core's dataclasses."""

from __future__ import annotations

from gplq.plugins.hooks.settings import HookSettings


def test_the_papers_feature_loss_is_the_sum_it_prints_unless_told_otherwise() -> None:
    assert HookSettings.from_config().stage.reduction == 'relative'
    assert HookSettings.from_config(method='paper').stage.reduction == 'sum'
    assert HookSettings.from_config(method='paper', stage={'reduction': 'mean'}).stage.reduction == 'mean'


def test_lists_of_a_config_become_tuples_and_one_pattern_a_list() -> None:
    settings = HookSettings.from_config(4, 3, targets='backbone', skip=['backbone.a'], example_size=32)
    assert settings.recipe.targets == ('backbone',)
    assert settings.recipe.skip == ('backbone.a',)
    assert (settings.recipe.weight_bits, settings.recipe.activation_bits) == (4, 3)
    assert settings.example_size == (32, 32)


def test_mimicking_is_a_switch_or_a_weight() -> None:
    assert HookSettings.from_config(mimicking=False).stage.mimicking_weight == 0
    assert HookSettings.from_config(mimicking=True).stage.mimicking_weight == 1
    assert HookSettings.from_config(mimicking=0.1).stage.mimicking_weight == 0.1

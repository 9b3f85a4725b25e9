"""PTQ4ViT in a Runner: the same model whether it is tested or trained for no iteration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

import gplq
from gplq.errors import RecipeError
from gplq.plugins import PTQ4ViTHook
from gplq.record import Stage, record_of

SEARCH = dict(candidates=10, rounds=1, images=8)
HOOK = dict(type='gplq.plugins.PTQ4ViTHook', iterations=0, minimum_iterations=0, search=SEARCH)


@pytest.mark.parametrize('how', ['test', 'val'])
def test_it_quantizes_before_it_measures(
    how: str, make_config: Callable[..., Config], train: Callable[..., Runner], steps_of: Callable, tmp_path: Path
) -> None:
    trained = train('train', **HOOK, weight_bits=6, activation_bits=6)
    steps = steps_of(trained)
    assert [step['step'] for step in steps] == ['FP32', 'W32A6', 'W6A6']

    runner = Runner.from_cfg(make_config('measured', **HOOK, weight_bits=6, activation_bits=6))
    metrics = getattr(runner, how)()
    assert record_of(runner.model).stage is Stage.QUANTIZED
    assert metrics == pytest.approx(steps[-1]['metrics'])
    (step,) = steps_of(runner)
    assert (step['step'], step['metrics']) == ('W6A6', pytest.approx(metrics))
    assert step['minutes'] > 0
    # What it leaves behind is measured as it is, and is not quantized again.
    again = make_config('again', **HOOK, weight_bits=6, activation_bits=6)
    again.load_from = step['checkpoint']
    assert getattr(Runner.from_cfg(again), how)() == pytest.approx(metrics)
    model = gplq.load(Runner.from_cfg(make_config('fresh')).model, step['artifact'])
    state = torch.load(step['checkpoint'], weights_only=True)['state_dict']
    assert all(torch.allclose(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_defaults_are_eight_bits_and_the_papers_quantizers() -> None:
    recipe = PTQ4ViTHook()._activations.settings.recipe
    assert (recipe.name, recipe.attention_map, recipe.gelu_output) == ('w8a8', 'twin_uniform', 'twin_uniform')
    assert PTQ4ViTHook(recipe='w6a6')._activations.settings.recipe.name == 'w6a6'
    assert PTQ4ViTHook(weight_bits=4)._activations.settings.recipe.name == 'w4a8'
    with pytest.raises(RecipeError, match='weight_bits=32 leaves out the weights'):
        PTQ4ViTHook(weight_bits=32)
    assert PTQ4ViTHook(weight_bits=32, activation_bits=32)._activations.settings.recipe.name == 'w32a32'


def test_settings_of_the_search() -> None:
    settings = PTQ4ViTHook(search=dict(metric='mse', rounds=1))._activations.settings
    assert settings.search == gplq.ScaleSearch(metric='mse', rounds=1)
    with pytest.raises(RecipeError, match=r"search has no setting \['turns'\]"):
        PTQ4ViTHook(search=dict(turns=1))
    with pytest.raises(RecipeError, match='search.metric must be one of'):
        PTQ4ViTHook(search=dict(metric='median'))

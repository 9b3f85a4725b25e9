"""Recipes: strings, JSON, and every setting that must be refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import gplq
from gplq.errors import RecipeError
from gplq.recipe import as_recipe
from gplq.spec import QuantizerSpec


@pytest.mark.parametrize(
    ('text', 'weight_bits', 'activation_bits'),
    [('w4a4', 4, 4), ('W2A8', 2, 8), (' w32a4 ', 32, 4), ('w8a32', 8, 32)],
)
def test_string(text: str, weight_bits: int, activation_bits: int) -> None:
    recipe = gplq.Recipe.from_string(text)
    assert (recipe.weight_bits, recipe.activation_bits) == (weight_bits, activation_bits)
    assert recipe == gplq.Recipe.gplq(weight_bits, activation_bits)


@pytest.mark.parametrize('text', ['', '4', 'a4w4', 'w4', 'w4a', 'w4a4 extra', 'w-4a4', 'w4.0a4'])
def test_string_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match='w4a4'):
        gplq.Recipe.from_string(text)


@pytest.mark.parametrize('text', ['w1a4', 'w4a9', 'w0a0', 'w16a16', 'w4a1'])
def test_bits_outside_two_to_eight_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match='2 to 8'):
        gplq.Recipe.from_string(text)


@pytest.mark.parametrize('bits', [True, 4.0, '4', None])
def test_bits_that_are_no_integer_are_refused(bits: Any) -> None:
    with pytest.raises(RecipeError, match='integer'):
        gplq.Recipe(weight_bits=bits)


@pytest.mark.parametrize(
    ('setting', 'value'),
    [
        ('first_last_bits', 1),
        ('compensation_bits', 32),
        ('targets', ()),
        ('targets', ['*']),
        ('targets', (1,)),
        ('skip', 'head'),
        ('linear_input', 'row'),
        ('exponents', ()),
        ('exponents', (1.5,)),
        ('exponents', (float('nan'),)),
        ('clips', (0.0,)),
        ('clips', ()),
        ('linear_observer', 'hessian'),
        ('product_observer', ''),
        ('gelu_output', 'relu'),
        ('weight_scheme', 'gptq'),
        ('compensation', 'lora'),
        ('calibration_samples', 0),
        ('calibration_samples', 'all'),
        ('clips', 0.5),
        ('fold', 1),
    ],
)
def test_settings_outside_their_range_are_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=setting):
        gplq.Recipe(**{setting: value})


def test_unfolded_scales_go_with_no_compensation() -> None:
    with pytest.raises(RecipeError, match='fold=False'):
        gplq.Recipe(fold=False, compensation='qwt')
    assert not gplq.Recipe(fold=False, compensation='none').fold


@pytest.mark.parametrize('recipe', [gplq.Recipe(), gplq.Recipe.paper(3, 3), gplq.Recipe.rtn(2, 8, skip=['head'])])
def test_json_round_trip(recipe: gplq.Recipe) -> None:
    assert gplq.Recipe.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json())['version'] == 1


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        ('{', 'not JSON'),
        ('[]', 'mapping'),
        ('{"version": 2}', 'version'),
        ('{"wheight_bits": 4}', 'wheight_bits'),
        ('{"weight_bits": "4"}', 'weight_bits'),
        ('{"weight_bits": 99}', '2 to 8'),
        ('{"balance": 1}', 'balance'),
        ('{"clips": 1.0}', 'clips'),
        ('{"targets": [{"a": 1}]}', 'targets'),
    ],
)
def test_damaged_json_is_refused(text: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        gplq.Recipe.from_json(text)


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(RecipeError):
        gplq.Recipe.from_json('[' * 100_000)


def test_lists_and_single_patterns_become_tuples() -> None:
    recipe = gplq.Recipe.gplq(4, 4, targets='blocks', skip=['head'], clips=[1.0])
    assert (recipe.targets, recipe.skip, recipe.clips) == (('blocks',), ('head',), (1.0,))
    assert recipe.replace(skip='norm').skip == ('norm',)


def test_recipes_are_frozen_and_hashable() -> None:
    recipe = gplq.Recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.weight_bits = 8  # type: ignore[misc]
    assert hash(recipe) == hash(gplq.Recipe())


def test_as_recipe() -> None:
    assert as_recipe('w3a3').name == 'w3a3'
    recipe = gplq.Recipe()
    assert as_recipe(recipe) is recipe
    with pytest.raises(RecipeError, match='int'):
        as_recipe(4)  # type: ignore[arg-type]


def test_float_recipe_quantizes_nothing() -> None:
    assert not gplq.Recipe.from_string('w32a32').quantizes
    assert gplq.Recipe.from_string('w32a8').quantizes


@pytest.mark.parametrize(
    ('spec', 'bounds'),
    [
        (QuantizerSpec(4), (-8, 7)),
        (QuantizerSpec(4, signed=False), (0, 15)),
        (QuantizerSpec(2, signed=None), (-2, 1)),
        (QuantizerSpec(8, signed=False, offset=True), (0, 255)),
    ],
)
def test_bounds_of_a_spec(spec: QuantizerSpec, bounds: tuple[int, int]) -> None:
    assert (spec.qmin, spec.qmax) == bounds


@pytest.mark.parametrize('wrong', [{'bits': 1}, {'bits': 4, 'granularity': 'row'}, {'bits': 4, 'scheme': 'log'}])
def test_spec_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        QuantizerSpec(**wrong)

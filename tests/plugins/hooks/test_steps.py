"""A run from end to end: the steps it reports, the files it leaves, what they give back."""

from __future__ import annotations

import importlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import LOOPS
from mmengine.runner import Runner, ValLoop

import gplq
from gplq.errors import CheckpointError
from gplq.record import Stage, is_prepared, named_quantizers, record_of, weight_views

Train = Callable[..., Runner]
Steps = Callable[[Runner], list[dict[str, Any]]]


def measured(runner: Runner) -> dict[str, float]:
    """Metrics of a test through mmengine's own loop."""
    return {name: float(value) for name, value in runner.test().items()}


def test_each_step_is_a_line_of_the_log_and_a_record(
    train: Train, steps_of: Steps, log_of: Callable[[Runner], str]
) -> None:
    runner = train()
    steps = steps_of(runner)
    assert [step['step'] for step in steps] == ['FP32', 'W32A4', 'W4A4']
    lines = re.findall(r'GPLQ (\S+): accuracy ([\d.]+)  ([\d.]+) MiB backbone  ([\d.]+) MiB model', log_of(runner))
    assert [line[0] for line in lines] == ['FP32', 'W32A4', 'W4A4']
    assert [float(line[1]) for line in lines] == [round(s['metrics']['toy/accuracy'], 4) for s in steps]
    assert steps[0]['metrics']['toy/accuracy'] >= 0.75, 'the toy is worth quantizing'
    assert steps[0]['effective_bits'] == steps[1]['effective_bits'] == 32
    assert 4 < steps[2]['effective_bits'] < 8, 'the patch embedding has 8 bits, the rest 4'
    assert steps[2]['backbone_bytes'] < steps[1]['backbone_bytes'] / 2
    assert len({step['metrics']['toy/fingerprint'] for step in steps}) == 3
    for step in steps[1:]:
        assert Path(step['checkpoint']).is_file()
    assert Path(steps[2]['artifact']).is_file()


def test_minutes_hold_calibration_and_training_but_no_validation(
    make_config: Callable[..., Config], steps_of: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour = 3600.0
    now = [0.0]

    def costly(where: str, name: str, hours: float) -> None:
        module = importlib.import_module(f'gplq.plugins.hooks.{where}')
        work = getattr(module, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            now[0] += hours * hour
            return work(*args, **kwargs)

        monkeypatch.setattr(module, name, slow)

    monkeypatch.setattr('gplq.plugins.hooks.stopwatch.time', SimpleNamespace(monotonic=lambda: now[0]))
    costly('activation_qat_hook', 'evaluate', 100)
    costly('activation_qat_hook', 'calibrate', 1)
    costly('activation_qat_hook', 'make_mimicking', 2)
    costly('weight_ptq_hook', 'evaluate', 100)
    costly('weight_ptq_hook', 'quantize_weights', 3)

    class Passing(Hook):
        def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
            now[0] += 0.5 * hour

        def after_val_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
            now[0] += 100 * hour

    runner = Runner.from_cfg(make_config('run', iterations=4))
    runner.register_hook(Passing())
    runner.train()
    steps = steps_of(runner)
    assert [round(step['minutes'] / 60, 6) for step in steps] == [0.0, 1 + 2 + 4 * 0.5, 3.0]


def test_fp32_step_is_the_checkpoint(
    train: Train, steps_of: Steps, make_config: Callable[..., Config], checkpoint: Path
) -> None:
    runner = train(iterations=1)
    config = make_config('plain')
    config.default_hooks.pop('gplq')
    plain = Runner.from_cfg(config)
    assert measured(plain) == pytest.approx(steps_of(runner)[0]['metrics'])


@pytest.mark.parametrize(('step', 'stage'), [(1, Stage.CALIBRATED), (2, Stage.QUANTIZED)])
def test_a_test_rebuilds_the_model_from_the_checkpoint_alone(
    step: int, stage: Stage, train: Train, steps_of: Steps, make_config: Callable[..., Config]
) -> None:
    reported = steps_of(train())[step]
    # The hook's own arguments play no part: 8 bits are set up here.
    config = make_config('test', weight_bits=8, activation_bits=8)
    config.load_from = reported['checkpoint']
    runner = Runner.from_cfg(config)
    assert measured(runner) == reported['metrics']
    assert record_of(runner.model).stage is stage
    assert record_of(runner.model).plan.recipe.name == 'w4a4'


def test_the_artifact_equals_the_checkpoint(train: Train, steps_of: Steps, toy: ModuleType) -> None:
    runner = train()
    torch.manual_seed(5)
    model = toy.ToyClassifier().eval()
    gplq.load(model, steps_of(runner)[2]['artifact'])
    images = toy.ToyImages(length=8, seed=1).images
    runner.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.logits(images), runner.model.logits(images), rtol=1e-5, atol=1e-5)


def test_weights_have_few_values_after_the_weight_stage(train: Train) -> None:
    model = train().model
    for plan, view in weight_views(model):
        codes = view.map.weight.codes(view.matrix(), view.map.column_scale.expand(view.matrix().shape[1]))
        values = view.map.weight.restore(codes, view.map.column_scale.expand(view.matrix().shape[1]))
        assert codes.unique().numel() <= 2**plan.weight_bits
        torch.testing.assert_close(values, view.matrix(), rtol=1e-4, atol=1e-6)


def test_the_checkpoint_names_its_recipe(train: Train, steps_of: Steps) -> None:
    saved = torch.load(steps_of(train())[2]['checkpoint'], weights_only=True)
    plan = json.loads(saved['meta']['gplq']['plan'])
    assert (plan['recipe']['weight_bits'], plan['recipe']['activation_bits']) == (4, 4)
    assert saved['meta']['gplq']['stage'] == 'quantized'


def test_test_follows_training_in_the_same_runner(train: Train, steps_of: Steps) -> None:
    runner = train()
    assert measured(runner) == steps_of(runner)[2]['metrics']


def test_without_iterations_it_is_plain_post_training_quantization(
    train: Train, steps_of: Steps, log_of: Callable[[Runner], str], checkpoint: Path
) -> None:
    runner = train(iterations=0)
    assert [step['step'] for step in steps_of(runner)] == ['FP32', 'W32A4', 'W4A4']
    assert 'this is plain post-training quantization' in log_of(runner)
    head = torch.load(checkpoint, weights_only=True)['state_dict']['head.weight']
    assert torch.equal(runner.model.head.weight, head)


def test_32_bits_are_the_control(train: Train, steps_of: Steps, checkpoint: Path) -> None:
    control = train('control', weight_bits=32, activation_bits=32)
    steps = steps_of(control)
    assert [step['step'] for step in steps] == ['FP32', 'FP32 control']
    assert not list(named_quantizers(control.model)) and not list(weight_views(control.model))
    # Nothing is quantized, so the student is its teacher at first and the loss of the features starts at zero.
    assert set(control.model.state_dict()) == set(torch.load(checkpoint, weights_only=True)['state_dict'])
    assert steps[1]['metrics'] != steps[0]['metrics']
    assert is_prepared(control.model)


def test_activations_alone_and_weights_alone(train: Train, steps_of: Steps) -> None:
    assert [s['step'] for s in steps_of(train('a', weight_bits=32))] == ['FP32', 'W32A4']
    assert [s['step'] for s in steps_of(train('w', activation_bits=32))] == ['FP32', 'W4A32']


def test_weights_and_activations_are_trained_together_on_demand(train: Train, steps_of: Steps) -> None:
    runner = train('lsq', method='lsq', stage=dict(lr=1e-3))
    trained, settled = steps_of(runner)[1:]
    assert (trained['step'], settled['step']) == ('W4A4 trained', 'W4A4')
    # The weight stage rounds as training did.
    assert settled['metrics'] == pytest.approx(trained['metrics'], rel=1e-4)


def test_the_parts_do_what_the_whole_does(train: Train, steps_of: Steps) -> None:
    whole = steps_of(train('whole'))

    def both(config: Config) -> None:
        options = dict(config.default_hooks.pop('gplq'), _delete_=None)
        options.pop('_delete_')
        # The order in the config must not matter.
        config.default_hooks.weights = dict(options, type='gplq.plugins.WeightPTQHook')
        config.default_hooks.activations = dict(options, type='gplq.plugins.ActivationQATHook')

    together = train('together', change=both)
    assert [s['metrics'] for s in steps_of(together)] == [s['metrics'] for s in whole]

    def only(kind: str, load_from: str | None = None) -> Callable[[Config], None]:
        def change(config: Config) -> None:
            config.default_hooks.gplq.type = f'gplq.plugins.{kind}'
            config.load_from = load_from or config.load_from
            if load_from:
                config.default_hooks.gplq.iterations = 0

        return change

    first = train('first', change=only('ActivationQATHook'))
    assert [s['step'] for s in steps_of(first)] == ['FP32', 'W32A4']
    second = train('second', change=only('WeightPTQHook', steps_of(first)[1]['checkpoint']))
    assert [s['step'] for s in steps_of(second)] == ['W32A4', 'W4A4']
    assert steps_of(second)[1]['metrics'] == whole[2]['metrics']


@pytest.mark.parametrize('first_bits', [4, 32])
def test_one_first_stage_serves_many_second_ones(first_bits: int, train: Train, steps_of: Steps) -> None:
    def first(config: Config) -> None:
        config.default_hooks.gplq.type = 'gplq.plugins.ActivationQATHook'

    start = steps_of(train('first', change=first, weight_bits=first_bits))[1]

    def second(config: Config) -> None:
        config.default_hooks.gplq.type = 'gplq.plugins.WeightPTQHook'
        config.load_from = start['checkpoint']

    for number, options in enumerate(
        (
            dict(weight_bits=3),
            dict(recipe=dict(rounding='nearest', compensation='ridge')),
            dict(recipe=dict(weight_scheme='percentile_asymmetric', calibration_samples=16)),
        )
    ):
        steps = steps_of(train(str(number), change=second, iterations=0, validate_fp32=False, **options))
        assert steps[0]['metrics'] == start['metrics']
        assert steps[1]['step'] == f'W{options.get("weight_bits", 4)}A4'
        assert steps[1]['metrics'] != start['metrics']


def test_weight_hook_alone_quantizes_an_fp32_model(
    train: Train, steps_of: Steps, log_of: Callable[[Runner], str]
) -> None:
    def only_weights(config: Config) -> None:
        config.default_hooks.gplq.type = 'gplq.plugins.WeightPTQHook'
        config.default_hooks.gplq.pop('iterations')

    runner = train(change=only_weights)
    assert [step['step'] for step in steps_of(runner)] == ['FP32', 'W32A4', 'W4A4']
    assert 'plain post-training quantization' in log_of(runner)


def test_control_and_quantized_training_draw_the_same_numbers(make_config: Callable[..., Config]) -> None:
    class Draw(Hook):
        def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
            if runner.iter == 0:
                # Without moving them: the first number that each generator would give.
                states = torch.get_rng_state(), np.random.get_state(), random.getstate()
                self.drawn = float(torch.rand(())), float(np.random.rand()), random.random()
                torch.set_rng_state(states[0])
                np.random.set_state(states[1])
                random.setstate(states[2])
                self.images = torch.stack(data_batch['inputs'])

    seen = []
    for bits, options in ((32, {}), (4, {}), (4, dict(validate_fp32=False, mimicking=False))):
        runner = Runner.from_cfg(make_config(str(len(seen)), weight_bits=bits, activation_bits=bits, **options))
        seen.append(Draw())
        runner.register_hook(seen[-1])
        runner.train()
    assert seen[0].drawn == seen[1].drawn == seen[2].drawn
    assert torch.equal(seen[0].images, seen[1].images) and torch.equal(seen[0].images, seen[2].images)


def test_variation_aware_training_is_a_hook_of_its_own(train: Train, steps_of: Steps) -> None:
    def change(config: Config) -> None:
        config.default_hooks.gplq.type = 'gplq.plugins.VariationAwareQATHook'

    runner = train('vvtq', change=change, weight_bits=2, activation_bits=3, stage=dict(lr=1e-3, annealing=0.5))
    assert [step['step'] for step in steps_of(runner)] == ['FP32', 'W2A3 trained', 'W2A3']
    recipe = record_of(runner.model).plan.recipe
    assert (recipe.train_weights, recipe.trained_steps, recipe.gelu_output) == (True, 'norm', 'unsigned_offset')


def test_weights_in_training_are_regularized_and_their_oscillations_logged(
    train: Callable[..., Runner], log_of: Callable[[Runner], str]
) -> None:
    stage = dict(lr=1e-3, regularization=1.0, regularization_start=0.5)
    log = log_of(train('vvtq', method='lsq', iterations=6, stage=stage))
    found = [float(value) for value in re.findall(r'loss_regularization: ([\d.]+)', log)]
    assert found[0] == 0 and found[-1] > 0
    assert 'oscillating: 0.' in log
    plain = log_of(train('plain', iterations=6))
    assert 'oscillating' not in plain and 'loss_regularization' not in plain


def test_weights_can_be_trained_from_the_activation_stage_on(
    train: Train, steps_of: Steps, log_of: Callable[[Runner], str]
) -> None:
    """Quantization-aware training that sets out from GPLQ's first stage."""
    first = train('stage', weight_bits=32, activation_bits=3)
    stage = steps_of(first)[-1]['checkpoint']
    before = torch.load(stage, weights_only=True)['state_dict']

    def start(config: Config) -> None:
        config.load_from = stage

    rounded = dict(train_weights=True, rounding='nearest')
    settings = dict(weight_bits=3, activation_bits=3, change=start, recipe=rounded)
    runner = train('qat', mimicking=0, iterations=3, stage=dict(lr=1e-4, scale_lr=1e-6), **settings)
    assert [step['step'] for step in steps_of(runner)] == ['W3A3 trained', 'W3A3']
    after = torch.load(steps_of(runner)[0]['checkpoint'], weights_only=True)['state_dict']
    scales = [name for name in before if name.endswith('log_scale')]
    assert scales and all(torch.allclose(after[name], before[name], atol=1e-3) for name in scales)
    assert any(name.endswith('weight.log_scale') for name in after.keys() - before.keys())
    assert 'loss_mimicking' not in log_of(runner)
    # What it leaves is gone on with as it is: its steps are not chosen anew.
    trained = steps_of(runner)[0]['checkpoint']
    again = train('again', iterations=0, mimicking=0, **{**settings, 'change': lambda c: c.update(load_from=trained)})
    assert steps_of(again)[-1]['metrics'] == pytest.approx(steps_of(runner)[-1]['metrics'])
    with pytest.raises(CheckpointError, match='does not hold the FP32 teacher of mimicking=1: set mimicking=0'):
        train('teacher', iterations=3, **settings)


@LOOPS.register_module()
class PrefixedValLoop(ValLoop):
    """Tells its hooks what it found under names of its own and gives nothing back, as mmdet's loop of two models."""

    def run(self) -> None:
        given, self.runner._hooks = self.runner._hooks, []
        found = super().run()
        self.runner._hooks = given
        self.runner.call_hook('after_val_epoch', metrics={f'student/{name}': value for name, value in found.items()})


def test_every_step_is_measured_by_the_validation_loop_of_the_config(train: Train, steps_of: Steps) -> None:
    plain = train('plain')
    prefixed = train('prefixed', change=lambda config: config.val_cfg.update(type='PrefixedValLoop'))
    for one, other in zip(steps_of(plain), steps_of(prefixed), strict=True):
        assert other['metrics'] == {f'student/{name}': value for name, value in one['metrics'].items()}

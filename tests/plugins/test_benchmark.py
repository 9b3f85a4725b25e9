"""Which runs a benchmark makes, and which rows a finished one gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from gplq.errors import RecipeError
from gplq.plugins.benchmark import Run, bits_of, rows_of
from gplq.plugins.methods import METHODS, ROW
from gplq.plugins.results import ResultError

STEP = dict(effective_bits=3.1, model_bytes=100, peak_memory_mb=7.0, scope='backbone')


def test_fp32_runs_once_its_control_once_a_seed_and_variants_are_ours(make_runs: Callable[..., list[Run]]) -> None:
    runs = make_runs()
    count = {method: sum(run.method == method for run in runs) for method in ROW}
    assert count == {'fp32': 1, 'fp32_control': 2, 'rtn': 2 * 2, 'gplq': 2 * 2 * 2}
    assert [run.text for run in make_runs(['fp32'], seeds=(2, 1))] == [run.text for run in make_runs(['fp32'])]
    assert len({run.work_dir for run in runs}) == len({run.text for run in runs}) == len(runs)


def test_a_variant_belongs_to_its_method_and_a_method_without_one_runs_as_it_is(
    make_runs: Callable[..., list[Run]],
) -> None:
    runs = make_runs(['rtn', 'gplq', 'ptq4vit'], [6], [0], ['folded', 'uniform, mse'])
    assert [(run.method, run.variant) for run in runs] == [
        ('rtn', ''),
        ('gplq', 'folded'),
        ('ptq4vit', 'uniform, mse'),
    ]
    assert runs[-1].work_dir.name == 'ptq4vit_w6_uniform_mse_s0'
    assert 'default_hooks.gplq.search.metric=mse' in runs[-1].command
    assert [run.variant for run in make_runs(['gplq', 'ptq4vit'], [6], [0], ['cosine'])] == ['', 'cosine']


def test_command_carries_bits_seed_split_variant_and_the_users_options_last(
    make_runs: Callable[..., list[Run]],
) -> None:
    (run,) = make_runs(['gplq'], [3], [1], ['folded'], {'default_hooks.gplq.stage.lr': '5e-5', 'max_epochs': '2'})
    options = dict(part.split('=', 1) for part in run.command[run.command.index('--cfg-options') + 1 :])
    assert run.command[:3] == ['python', 'tools/train.py', 'configs/a.py']
    assert options['default_hooks.gplq.weight_bits'] == options['default_hooks.gplq.activation_bits'] == '3'
    assert options['default_hooks.gplq.recipe.exponents'] == '[1.0]'
    assert options['val_dataloader.dataset.ann_file'] == 'dev.json'
    assert options['randomness.seed'] == '1'
    assert options['default_hooks.gplq.seed'] == '1'
    assert options['default_hooks.gplq.stage.lr'] == '5e-5'
    assert options['max_epochs'] == '2'
    assert 'val_evaluator.ann_file=/cells/dev.json' in run.arguments('/cells')
    assert 'val_evaluator.ann_file=${GPLQ_DATA_ROOT}/dev.json' in run.text


def test_rows_sum_the_minutes_of_the_steps_up_to_theirs(make_runs: Callable[..., list[Run]]) -> None:
    (run,) = make_runs(['gplq'], [3], [1], ['folded'])
    steps = [
        dict(
            step=step,
            metrics={'coco/bbox_mAP': value},
            minutes=minutes,
            effective_bits=bits,
            model_bytes=100,
            peak_memory_mb=7.0,
            scope='backbone',
        )
        for step, value, minutes, bits in (('FP32', 0.5, 0.0, 32.0), ('W32A3', 0.4, 2.0, 32.0), ('W3A3', 0.3, 0.5, 3.1))
    ]
    run.work_dir.mkdir(parents=True)
    (run.work_dir / 'gplq.json').write_text(json.dumps(steps))
    rows = rows_of(run, ['bbox_mAP'], 'vit')
    assert [(r.weight_bits, r.activation_bits, r.value, r.minutes) for r in rows] == [(32, 3, 0.4, 2), (3, 3, 0.3, 2.5)]
    assert {(r.variant, r.seed, r.split, r.peak_memory_mb) for r in rows} == {('folded', 1, 'dev', 7.0)}


def test_a_classifier_takes_its_split_by_name(make_runs: Callable[..., list[Run]]) -> None:
    (run,) = make_runs(['gplq'], [3], [1], [''], task='classification')
    options = dict(part.split('=', 1) for part in run.command[run.command.index('--cfg-options') + 1 :])
    assert options['val_dataloader.dataset.split'] == 'dev'
    assert options['val_evaluator.outfile'] == f'{run.work_dir}/predictions.json'
    assert not any('ann_file' in key for key in options)
    run.work_dir.mkdir(parents=True)
    shared = dict(
        metrics={'top1': 27.0}, minutes=1.0, effective_bits=3.1, model_bytes=100, peak_memory_mb=7.0, scope='backbone'
    )
    steps = [dict(step='W32A3', **shared), dict(step='W3A3', **shared)]
    (run.work_dir / 'gplq.json').write_text(json.dumps(steps))
    assert [row.value for row in rows_of(run, ['top1'], 'vit')] == [27.0, 27.0]
    with pytest.raises(ResultError, match="--metrics top5: the evaluator gives \\['top1'\\]"):
        rows_of(run, ['top5'], 'vit')


def test_an_unfinished_run_gives_no_rows(make_runs: Callable[..., list[Run]]) -> None:
    (run,) = make_runs(['gplq'], [3], [1], [''])
    with pytest.raises(ResultError, match='holds no gplq.json'):
        rows_of(run, ['bbox_mAP'], 'vit')
    run.work_dir.mkdir(parents=True)
    (run.work_dir / 'gplq.json').write_text('[]')
    with pytest.raises(ResultError, match='no step W32A3'):
        rows_of(run, ['bbox_mAP'], 'vit')
    (run.work_dir / 'gplq.json').write_text('[')
    with pytest.raises(ResultError, match='gplq.json is no JSON'):
        rows_of(run, ['bbox_mAP'], 'vit')


def test_calibration_counts_as_time_of_round_to_nearest(make_runs: Callable[..., list[Run]]) -> None:
    (run,) = make_runs(['rtn'], [3], [0], [''])
    shared = dict(
        metrics={'coco/bbox_mAP': 0.3}, effective_bits=3.1, model_bytes=100, peak_memory_mb=7.0, scope='backbone'
    )
    run.work_dir.mkdir(parents=True)
    steps = [dict(step='W32A3', minutes=2.0, **shared), dict(step='W3A3', minutes=0.5, **shared)]
    (run.work_dir / 'gplq.json').write_text(json.dumps(steps))
    assert [row.minutes for row in rows_of(run, ['bbox_mAP'], 'vit')] == [2.5]


def test_options_are_part_of_the_variant_and_of_the_folder(make_runs: Callable[..., list[Run]]) -> None:
    (plain,) = make_runs(['gplq'], [3], [0], ['folded'])
    (run,) = make_runs(['gplq'], [3], [0], ['folded'], {'default_hooks.gplq.stage.lr': '5e-5'})
    assert (plain.label, run.label) == ('folded', 'folded, stage.lr=5e-5')
    assert plain.work_dir != run.work_dir


def test_only_gplq_has_a_step_between(make_runs: Callable[..., list[Run]]) -> None:
    steps = {run.method: [step for step, *_ in run.bits_of_rows] for run in make_runs(tuple(METHODS), [3], [0], [''])}
    assert steps.pop('fp32') == ['FP32']
    assert steps.pop('fp32_control') == ['FP32 control']
    assert steps.pop('gplq') == ['W32A3', 'W3A3']
    assert {'lsq', 'ptq4vit', 'erq'} < set(steps)
    assert all(found == ['W3A3'] for found in steps.values())


@pytest.mark.parametrize(('task', 'expected'), [('detection', 'detector'), ('classification', 'backbone')])
def test_scope_is_what_the_hook_says_it_quantized(
    task: str, expected: str, make_runs: Callable[..., list[Run]]
) -> None:
    (run,) = make_runs(['rtn'], [3], [0], [''], task=task)
    step = dict(STEP, metrics={'top1': 1.0}, minutes=1.0)
    run.work_dir.mkdir(parents=True)
    (run.work_dir / 'gplq.json').write_text(json.dumps([dict(step, step='W3A3', scope='detector')]))
    assert [row.scope for row in rows_of(run, ['top1'], 'vit')] == [expected]


def test_a_run_is_done_when_each_step_has_every_metric(make_runs: Callable[..., list[Run]]) -> None:
    (run,) = make_runs(['gplq'], [3], [0], [''])
    step = dict(STEP, metrics={'top1': 1.0, 'top5': 2.0}, minutes=1.0)
    run.work_dir.mkdir(parents=True)
    steps = [dict(step, step=name) for name in ('W32A3', 'W3A3')]
    (run.work_dir / 'gplq.json').write_text(json.dumps(steps))
    rows = rows_of(run, ['top1', 'top5'], 'vit', settings := 64 * 'a')
    sha256 = rows[0].checkpoint_sha256
    assert run.is_done(['top1', 'top5'], sha256, settings, rows)
    assert run.is_done(['top1'], sha256, settings, rows)
    assert not run.is_done(['top1'], 64 * '0', settings, rows)
    assert not run.is_done(['top1'], sha256, 64 * 'b', rows)
    later = [replace(row, settings_sha256=64 * 'b') for row in rows]
    # Measured with other settings since, it is not in the tables any more.
    assert not run.is_done(['top1'], sha256, settings, [*rows, *later])
    # A run that was killed between two rows is not done.
    assert not any(run.is_done(['top1', 'top5'], sha256, settings, rows[:count]) for count in range(4))


def test_options_that_the_runs_differ_in_are_refused(make_runs: Callable[..., list[Run]]) -> None:
    with pytest.raises(ResultError, match='default_hooks.gplq.seed is no option'):
        make_runs(options={'default_hooks.gplq.seed': '7'})


@pytest.mark.parametrize(
    ('methods', 'variants', 'option', 'culprit'),
    [
        (['fp32', 'gplq'], [''], 'iterations', '--methods fp32'),
        (['rtn'], [''], 'iterations', '--methods rtn'),
        (['gplq'], ['', 'no mimicking'], 'mimicking', "--variants 'no mimicking'"),
        (['gplq'], ['folded'], 'recipe.balance', "--variants 'folded'"),
    ],
)
def test_options_that_would_undo_a_method_or_variant_are_refused(
    methods: list[str], variants: list[str], option: str, culprit: str, make_runs: Callable[..., list[Run]]
) -> None:
    options = {f'default_hooks.gplq.{option}': '2'}
    with pytest.raises(ResultError, match=f'{option} is no option beside {culprit}'):
        make_runs(methods, [3], [0], variants, options)
    make_runs(['gplq'], [3], [0], [''], options)


def test_bits_are_one_number_or_two() -> None:
    assert (bits_of('4'), bits_of('W3A4'), bits_of('w8a2')) == ((4, 4), (3, 4), (8, 2))
    for text in ('9', 'W4', 'four', 'W4A32', '32'):
        with pytest.raises(RecipeError):
            bits_of(text)


def test_runs_that_differ_in_the_weight_stage_share_an_activation_stage(make_runs: Callable[..., list[Run]]) -> None:
    runs = make_runs(['gplq'], [(4, 4), (2, 4), (3, 3)], [0, 1], ['', 'qwt', 'folded'])
    trained_by = {(run.bits, run.seed, run.variant): run.trained_by for run in runs}
    first = next(run for run in runs if (run.bits, run.seed, run.variant) == ((4, 4), 1, ''))
    assert trained_by[(4, 4), 1, 'qwt'] == trained_by[(2, 4), 1, ''] == trained_by[(2, 4), 1, 'qwt'] == first
    # Another seed, other activation bits or other activation quantizers have a stage of their own.
    assert [key for key, parent in trained_by.items() if parent is None] == [
        key
        for seed in (0, 1)
        for key in (((4, 4), seed, ''), ((4, 4), seed, 'folded'), ((3, 3), seed, ''), ((3, 3), seed, 'folded'))
    ]
    second = next(run for run in runs if (run.bits, run.seed, run.variant) == ((2, 4), 1, ''))
    options = dict(part.split('=', 1) for part in second.command[second.command.index('--cfg-options') + 1 :])
    assert options['load_from'] == str(first.work_dir / 'gplq_w32a4.pth')
    assert options['default_hooks.gplq.iterations'] == '0'
    assert second.bits_of_rows == [('W2A4', 2, 4)]


def test_what_is_named_twice_runs_once(make_runs: Callable[..., list[Run]]) -> None:
    runs = make_runs(['rtn', 'rtn', 'gplq'], [4, (4, 4)], [0, 0], ['', ''])
    assert [(run.method, run.trained_by) for run in runs] == [('rtn', None), ('gplq', None)]


def test_many_options_have_a_folder_of_a_name_that_is_not_too_long(make_runs: Callable[..., list[Run]]) -> None:
    options = {f'default_hooks.gplq.stage.a_setting_with_a_long_name_{n}': '0.123456789' for n in range(9)}
    (run,) = make_runs(['gplq'], [4], [0], [''], options)
    (other,) = make_runs(['gplq'], [4], [0], [''], {**options, 'another': '1'})
    assert len(run.work_dir.name) < 130
    assert run.work_dir != other.work_dir


def test_gplq_is_gplq_whatever_the_configs_hook_says(make_runs: Callable[..., list[Run]]) -> None:
    for run in make_runs(['gplq', 'fp32_control'], [4], [0], ['']):
        assert 'default_hooks.gplq.method=gplq' in run.command


def test_a_shared_activation_stage_counts_in_the_minutes_of_each(make_runs: Callable[..., list[Run]]) -> None:
    first, second = make_runs(['gplq'], [(4, 4), (2, 4)], [0], [''])
    for run, steps in (
        (first, {'W32A4': 2.0, 'W4A4': 0.5}),
        # The checkpoint brings calibrated activations, whose measuring takes no minutes.
        (second, {'W32A4': 0.0, 'W2A4': 0.25}),
    ):
        run.work_dir.mkdir(parents=True)
        noted = [dict(STEP, step=name, metrics={'top1': 1.0}, minutes=spent) for name, spent in steps.items()]
        (run.work_dir / 'gplq.json').write_text(json.dumps(noted))
    assert [row.minutes for row in rows_of(second, ['top1'], 'vit')] == [2.25]

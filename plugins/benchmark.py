"""The runs of a benchmark, and the command that carries each one out."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gplq.errors import RecipeError
from gplq.plugins.hooks.curve import CURVE, read_curve
from gplq.plugins.hooks.report import STEPS, minutes_up_to, read_steps
from gplq.plugins.methods import FLOATING, METHODS, VARIANTS, variants_of
from gplq.plugins.results import ResultError, ResultRow, commit, file_sha256, versions
from gplq.recipe import WEIGHT_STAGE_FIELDS, Recipe

__all__ = ['HOOK', 'TOOL', 'Bits', 'Run', 'bits_of', 'curve_of', 'plan_runs', 'rows_of']

# Of weights and of activations.
Bits = tuple[int, int]

TOOL = 'tools/train.py'
HOOK = 'default_hooks.gplq.'

# How a run measures another part of the data than its config does.
SPLITS: dict[str, dict[str, str]] = {
    'detection': {
        'val_dataloader.dataset.ann_file': '{split}.json',
        'val_evaluator.ann_file': '${{GPLQ_DATA_ROOT}}/{split}.json',
        'val_evaluator.outfile_prefix': '{work_dir}/predictions',
    },
    'classification': {
        'val_dataloader.dataset.split': '{split}',
        'val_evaluator.outfile': '{work_dir}/predictions.json',
    },
}

# What the program sets itself, by the end of the option's name.
OWN = ('weight_bits', 'activation_bits', 'seed', 'method', 'load_from', 'ann_file', 'split')


@dataclass(frozen=True)
class Run:
    """One training run: what it measures and the options that make it."""

    benchmark: str
    config: str
    checkpoint: str
    split: str
    method: str
    bits: Bits
    seed: int
    variant: str
    options: tuple[tuple[str, str], ...]
    work_dir: Path
    task: str = 'detection'
    # The run whose activation stage this one takes over, if it differs from it in the weight stage alone.
    trained_by: Run | None = None
    # Its name in the rows.
    model: str = ''

    @property
    def command(self) -> list[str]:
        """The program and its arguments; a user can paste it."""
        settings = METHODS[self.method] | VARIANTS[self.variant]
        if self.method not in FLOATING:
            settings = dict(zip(('weight_bits', 'activation_bits'), self.bits, strict=True)) | settings
        settings['seed'] = self.seed
        if self.method != 'fp32':
            settings['validate_fp32'] = False
        options = {f'{HOOK}{key}': _text(value) for key, value in settings.items()}
        options |= {'load_from': self.checkpoint, 'randomness.seed': str(self.seed)}
        place = {'split': self.split, 'work_dir': str(self.work_dir)}
        options |= {key: value.format(**place) for key, value in SPLITS[self.task].items()}
        options |= dict(self.options)
        if self.trained_by is not None:
            options |= {f'{HOOK}iterations': '0', 'load_from': str(self.trained_by.stage_file)}
        pairs = [f'{key}={value}' for key, value in options.items()]
        return ['python', TOOL, self.config, '--work-dir', str(self.work_dir), '--cfg-options', *pairs]

    @property
    def label(self) -> str:
        """What differs from the method as it is: the variant and the user's options."""
        own = [f'{key.removeprefix(HOOK)}={value}' for key, value in self.options]
        return ', '.join(filter(None, (self.variant, *own)))

    @property
    def text(self) -> str:
        """The command as one line."""
        return ' '.join(part if '${' in part else shlex.quote(part) for part in self.command)

    def arguments(self, data_root: str) -> list[str]:
        """The command for this interpreter and this place of the data."""
        filled = [part.replace('${GPLQ_DATA_ROOT}', data_root) for part in self.command]
        return [sys.executable, *filled[1:]]

    @property
    def stage_file(self) -> Path:
        """The checkpoint that the activation stage leaves."""
        return self.work_dir / f'gplq_w32a{self.bits[1]}.pth'

    @property
    def bits_of_rows(self) -> list[tuple[str, int, int]]:
        """Name, weight bits and activation bits of each step that has rows; the last one's predictions are kept."""
        if self.method in FLOATING:
            return [(FLOATING[self.method], 32, 32)]
        weights, activations = self.bits
        both = (f'W{weights}A{activations}', weights, activations)
        trains = self.method == 'gplq' and self.trained_by is None
        return [(f'W32A{activations}', 32, activations), both] if trains else [both]

    def is_done(self, metrics: Sequence[str], sha256: str, settings: str, rows: Sequence[ResultRow]) -> bool:
        """Whether ``rows`` hold every metric of each step, measured on the checkpoint and config of these hashes."""
        # Of several, tables show the last.
        last: dict[tuple[object, ...], tuple[str | None, str | None]] = {
            (row.metric, row.weight_bits, row.activation_bits): (row.checkpoint_sha256, row.settings_sha256)
            for row in rows
            if (row.command, row.split) == (self.text, self.split)
        }
        wanted = [(metric, *bits) for metric in metrics for _, *bits in self.bits_of_rows]
        return all(last.get(figure) == (sha256, settings) for figure in wanted)


def bits_of(text: str) -> Bits:
    """`'4'` and `'W4A4'` are both four bits for both, `'W3A4'` three for weights and four for activations.

    Raises:
        RecipeError: the text has another form, or the bits are not supported.
    """
    recipe = Recipe.from_string(f'w{text}a{text}' if text.isdecimal() else text)
    if 32 in (recipe.weight_bits, recipe.activation_bits):
        raise RecipeError(f'--bits {text}: 2 to 8 for both; FP32 is a method, and W32A4 a step of gplq')
    return recipe.weight_bits, recipe.activation_bits


def plan_runs(
    benchmark: str,
    config: str,
    checkpoint: str,
    split: str,
    methods: Sequence[str],
    bits: Sequence[Bits],
    seeds: Sequence[int],
    variants: Sequence[str],
    options: dict[str, str],
    work: Path,
    task: str = 'detection',
    model: str = '',
) -> Iterator[Run]:
    """Every run once: FP32 and its control know no bits, variants are GPLQ's or PTQ4ViT's, and FP32 knows no seed.

    Runs of GPLQ that differ in the weight stage alone share the activation stage of the first of them.

    Raises:
        ResultError: if an option is one of those that the runs differ in, or that a method or variant among them sets.
    """
    _check_options(options, methods, variants)
    methods, bits, seeds, variants = (list(dict.fromkeys(chosen)) for chosen in (methods, bits, seeds, variants))  # type: ignore[assignment]
    # An activation stage is calibrated for the weights of its own run: for as many bits as the activations have, where
    # those are asked for, or the fewest, whatever the order in which they were named.
    bits = sorted(bits, key=lambda pair: (-pair[1], pair[0] != pair[1], pair[0]))
    slug = re.sub(r'[^\w.=-]+', '_', '_'.join(f'{key}={value}' for key, value in options.items()))
    if len(slug) > 100:
        # Folders' names have an end.
        slug = f'{slug[:80]}_{hashlib.sha256(slug.encode()).hexdigest()[:8]}'
    trained: dict[tuple[int, int, str], Run] = {}
    for seed in seeds:
        for method in methods:
            for pair in bits if method not in FLOATING else ((32, 32),):
                for variant in variants_of(method, variants):
                    if method == 'fp32' and seed != seeds[0]:
                        continue
                    # The same command whatever the seeds, so that a later call finds it done.
                    run_seed = 0 if method == 'fp32' else seed
                    width = f'w{pair[0]}' if pair[0] == pair[1] else f'w{pair[0]}a{pair[1]}'
                    label = re.sub(r"[ ',]+", '_', variant)
                    name = '_'.join(filter(None, (method, width, label, slug, f's{run_seed}')))
                    run = Run(
                        benchmark,
                        config,
                        checkpoint,
                        split,
                        method,
                        pair,
                        run_seed,
                        variant,
                        tuple(options.items()),
                        work / split / name,
                        task,
                        model=model,
                    )
                    if method == 'gplq':
                        stage = (seed, pair[1], '' if _weights_alone(variant) else variant)
                        first = trained.setdefault(stage, run)
                        run = run if first is run else replace(run, trained_by=first)
                    yield run


def _check_options(options: dict[str, str], methods: Sequence[str], variants: Sequence[str]) -> None:
    chosen = {f'--methods {name}': METHODS[name] for name in methods}
    own = [name for method in methods for name in variants_of(method, variants)]
    chosen |= {f'--variants {name!r}': VARIANTS[name] for name in own}
    for key in options:
        if key.rpartition('.')[2] in OWN:
            raise ResultError(f'{key} is no option: --bits, --seeds, --methods, --split and CHECKPOINT set it')
        for what, settings in chosen.items():
            if key.removeprefix(HOOK) in settings:
                raise ResultError(f'{key} is no option beside {what}, which sets it: measure them one at a time')


def _weights_alone(variant: str) -> bool:
    """Whether a variant leaves the activation stage as it is."""
    return all(key.removeprefix('recipe.') in WEIGHT_STAGE_FIELDS for key in VARIANTS[variant])


def rows_of(run: Run, metrics: Sequence[str], model: str, settings: str | None = None) -> list[ResultRow]:
    """Rows of a finished run from what its hook noted; ``settings`` is the hash of its config.

    Raises:
        ResultError: if the run did not come to its end.
    """
    record = run.work_dir / STEPS
    if not record.is_file():
        raise ResultError(f'{run.work_dir} holds no {STEPS}: the run failed, its log is there')
    noted = read_steps(record)
    steps = {step['step']: step for step in noted}
    rows = []
    before = 0.0
    if run.trained_by is not None:
        stage = read_steps(run.trained_by.work_dir / STEPS)
        before = minutes_up_to(stage, f'W32A{run.bits[1]}')
    for name, weight_bits, activation_bits in run.bits_of_rows:
        if name not in steps:
            raise ResultError(f'{record} has no step {name}: the run failed, its log is in {run.work_dir}')
        step = steps[name]
        values = {key.rpartition('/')[2]: value for key, value in step['metrics'].items()}
        for metric in metrics:
            if metric not in values:
                raise ResultError(f'--metrics {metric}: the evaluator gives {sorted(values)}')
            rows.append(
                ResultRow(
                    benchmark=run.benchmark,
                    split=run.split,
                    model=model,
                    # A classifier's head is the last layer, which every method quantizes alike.
                    scope=step['scope'] if run.task == 'detection' else 'backbone',
                    checkpoint_sha256=file_sha256(run.checkpoint),
                    method=run.method,
                    weight_bits=weight_bits,
                    activation_bits=activation_bits,
                    effective_bits=step['effective_bits'],
                    seed=run.seed,
                    metric=metric,
                    value=values[metric],
                    minutes=before + minutes_up_to(noted, name),
                    peak_memory_mb=step['peak_memory_mb'],
                    artifact_bytes=step['model_bytes'],
                    command=run.text,
                    commit=commit(),
                    versions=versions(),
                    variant=run.label,
                    calibration_samples=step.get('calibration_samples'),
                    settings_sha256=settings,
                )
            )
    return rows


def curve_of(run: Run, rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Rows of the validations during a finished run, each with the minutes until then; none if there were none.

    A share of oscillating weights, in percent, is noted beside the metrics where weights are trained.

    Args:
        run: the run.
        rows: its own rows (:func:`rows_of`), whose metrics are taken.
    """
    path = run.work_dir / CURVE
    if run.trained_by is not None or not path.is_file():
        return []
    found = []
    # What is trained comes first: W32A4, whose weights are rounded later, or all of it.
    first = {row.metric: row for row in reversed(rows)}
    first['oscillating'] = replace(rows[0], metric='oscillating')
    for point in read_curve(path):
        values = {key.rpartition('/')[2]: value for key, value in point['metrics'].items()}
        found += [
            replace(row, value=values[metric], minutes=point['minutes'])
            for metric, row in first.items()
            if metric in values
        ]
    return found


def _text(value: Any) -> str:
    return json.dumps(value).replace(' ', '') if isinstance(value, list) else str(value)

"""The runs of a benchmark: which settings each method has, and the command that carries one out."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gplq.plugins.bootstrap import Difference, compare_top1
from gplq.plugins.hooks.report import minutes_up_to
from gplq.plugins.results import BOUNDS, ResultError, ResultRow, commit, file_sha256, versions

__all__ = ['METHODS', 'VARIANTS', 'Comparison', 'Run', 'plan_runs', 'rows_of']

TOOL = 'tools/train.py'
COMPARE = 'tools/bootstrap.py'

METHODS: dict[str, dict[str, Any]] = {
    'fp32': {'weight_bits': 32, 'activation_bits': 32, 'iterations': 0},
    'fp32_control': {'weight_bits': 32, 'activation_bits': 32},
    'gplq': {},
    'rtn': {'method': 'rtn', 'iterations': 0},
}

# What differs from the hook's own settings.
VARIANTS: dict[str, dict[str, Any]] = {
    '': {},
    'no mimicking': {'mimicking': 0},
    'folded': {'recipe.exponents': [1.0], 'recipe.balance': False},
    'unfolded': {'recipe.exponents': [1.0], 'recipe.balance': False, 'recipe.fold': False},
    'per tensor': {'recipe.linear_input': 'tensor'},
    **{f'mimicking {weight:g}': {'mimicking': weight} for weight in (0.1, 10.0)},
    **{f'PCA {share} %': {'stage.explained_variance': share / 100} for share in (30, 90)},
    **{f'{count} iterations': {'iterations': count} for count in (1, 10, 100, 1000)},
    'scales only': {'stage.lr': 0.0},
    'nearest': {'recipe.rounding': 'nearest'},
    **{kind: {'recipe.compensation': kind} for kind in ('qwt', 'ridge', 'affine')},
}

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

# Of a metric: the file of predictions that a run leaves, and what a detector's are matched by.
PREDICTIONS = {
    'bbox_mAP': ('predictions.bbox.json', 'bbox'),
    'segm_mAP': ('predictions.segm.json', 'segm'),
    'top1': ('predictions.json', ''),
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
    bits: int
    seed: int
    variant: str
    options: tuple[tuple[str, str], ...]
    work_dir: Path
    task: str = 'detection'

    @property
    def command(self) -> list[str]:
        """The program and its arguments; a user can paste it."""
        settings = METHODS[self.method] | VARIANTS[self.variant]
        if self.bits != 32:
            settings = {'weight_bits': self.bits, 'activation_bits': self.bits} | settings
        settings['seed'] = self.seed
        if self.method != 'fp32':
            settings['validate_fp32'] = False
        options = {f'default_hooks.gplq.{key}': _text(value) for key, value in settings.items()}
        options |= {'load_from': self.checkpoint, 'randomness.seed': str(self.seed)}
        place = {'split': self.split, 'work_dir': str(self.work_dir)}
        options |= {key: value.format(**place) for key, value in SPLITS[self.task].items()}
        options |= dict(self.options)
        pairs = [f'{key}={value}' for key, value in options.items()]
        return ['python', TOOL, self.config, '--work-dir', str(self.work_dir), '--cfg-options', *pairs]

    @property
    def label(self) -> str:
        """What differs from the method as it is: the variant and the user's options."""
        own = [f'{key.removeprefix("default_hooks.gplq.")}={value}' for key, value in self.options]
        return ', '.join(filter(None, (self.variant, *own)))

    @property
    def scope(self) -> str:
        """What is quantized, as a row says it."""
        targets = re.findall(r'[\w.*]+', dict(self.options).get('default_hooks.gplq.targets', 'backbone'))
        return 'backbone' if all(name.split('.')[0] == 'backbone' for name in targets) else 'detector'

    @property
    def text(self) -> str:
        """The command as one line."""
        return ' '.join(part if '${' in part else shlex.quote(part) for part in self.command)

    def arguments(self, data_root: str) -> list[str]:
        """The command for this interpreter and this place of the data."""
        filled = [part.replace('${GPLQ_DATA_ROOT}', data_root) for part in self.command]
        return [sys.executable, *filled[1:]]

    @property
    def bits_of_rows(self) -> list[tuple[str, int, int]]:
        """Name, weight bits and activation bits of each step that has rows; the last one's predictions are kept."""
        return {
            'fp32': [('FP32', 32, 32)],
            'fp32_control': [('FP32 control', 32, 32)],
            'gplq': [(f'W32A{self.bits}', 32, self.bits), (f'W{self.bits}A{self.bits}', self.bits, self.bits)],
            'rtn': [(f'W{self.bits}A{self.bits}', self.bits, self.bits)],
        }[self.method]


@dataclass(frozen=True)
class Comparison:
    """One run's figure against FP32's on the same images."""

    run: Run
    fp32: Run
    metric: str

    @property
    def files(self) -> list[Path] | None:
        """Predictions of FP32 and of the run, or None where one is missing."""
        if self.metric not in PREDICTIONS:
            return None
        name, _ = PREDICTIONS[self.metric]
        files = [run.work_dir / name for run in (self.fp32, self.run)]
        return files if all(file.is_file() for file in files) else None

    @property
    def text(self) -> str:
        """The command as one line."""
        parts = ['python', COMPARE, *map(str, self.files or [])]
        if iou_type := PREDICTIONS[self.metric][1]:
            parts += ['--annotations', f'${{GPLQ_DATA_ROOT}}/{self.run.split}.json', '--iou-type', iou_type]
        return ' '.join(parts)

    def rows(self, difference: Difference, row: ResultRow) -> list[ResultRow]:
        """The bounds of the interval as rows like `row`, the figure's.

        Raises:
            ResultError: the predictions give another figure, so they are of another run.
        """
        # mmdet prints three decimals of AP.
        if abs(difference.second - row.value) > 0.001:
            raise ResultError(
                f'{self.run.work_dir}: its predictions give {self.metric} {difference.second:.4f}, its row has '
                f'{row.value:.4f}; they are of two runs, so delete the folder and the row and measure again'
            )
        values = zip(BOUNDS, (difference.low, difference.high), strict=True)
        return [replace(row, metric=self.metric + end, value=value, command=self.text) for end, value in values]

    def measure(self, data_root: str) -> Difference:
        """Resample the images.

        Raises:
            ResultError: predictions are missing or of other images.
        """
        if self.files is None:
            raise ResultError(f'{self.fp32.work_dir} or {self.run.work_dir} holds no predictions for {self.metric}')
        iou_type = PREDICTIONS[self.metric][1]
        if not iou_type:
            return compare_top1(*self.files)
        from gplq.plugins.detection.bootstrap import compare_detectors

        return compare_detectors(Path(data_root, f'{self.run.split}.json'), *self.files, iou_type)


def plan_runs(
    benchmark: str,
    config: str,
    checkpoint: str,
    split: str,
    methods: Sequence[str],
    bits: Sequence[int],
    seeds: Sequence[int],
    variants: Sequence[str],
    options: dict[str, str],
    work: Path,
    task: str = 'detection',
) -> Iterator[Run]:
    """Every run once: FP32 and its control know no bits, variants are GPLQ's, and FP32 knows no seed.

    Raises:
        ResultError: if an option is one of those that the runs differ in.
    """
    for key in options:
        if key.rpartition('.')[2] in OWN:
            raise ResultError(f'{key} is no option: --bits, --seeds, --methods, --split and CHECKPOINT set it')
    slug = re.sub(r'[^\w.=-]+', '_', '_'.join(f'{key}={value}' for key, value in options.items()))
    for seed in seeds:
        for method in methods:
            for width in bits if method in ('gplq', 'rtn') else (32,):
                for variant in variants if method == 'gplq' else ('',):
                    if method == 'fp32' and seed != seeds[0]:
                        continue
                    # The same command whatever the seeds, so that a later call finds it done.
                    run_seed = 0 if method == 'fp32' else seed
                    name = '_'.join(
                        filter(None, (method, f'w{width}', variant.replace(' ', '_'), slug, f's{run_seed}'))
                    )
                    yield Run(
                        benchmark,
                        config,
                        checkpoint,
                        split,
                        method,
                        width,
                        run_seed,
                        variant,
                        tuple(options.items()),
                        work / split / name,
                        task,
                    )


def rows_of(run: Run, metrics: Sequence[str], model: str) -> list[ResultRow]:
    """Rows of a finished run from what its hook noted.

    Raises:
        ResultError: if the run did not come to its end.
    """
    record = run.work_dir / 'gplq.json'
    if not record.is_file():
        raise ResultError(f'{run.work_dir} holds no gplq.json: the run failed, its log is there')
    noted = json.loads(record.read_text())
    steps = {step['step']: step for step in noted}
    rows = []
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
                    scope=run.scope,
                    checkpoint_sha256=file_sha256(run.checkpoint),
                    method=run.method,
                    weight_bits=weight_bits,
                    activation_bits=activation_bits,
                    effective_bits=step['effective_bits'],
                    seed=run.seed,
                    metric=metric,
                    value=values[metric],
                    minutes=minutes_up_to(noted, name),
                    peak_memory_mb=step['peak_memory_mb'],
                    artifact_bytes=step['model_bytes'],
                    command=run.text,
                    commit=commit(),
                    versions=versions(),
                    variant=run.label,
                )
            )
    return rows


def _text(value: Any) -> str:
    return json.dumps(value).replace(' ', '') if isinstance(value, list) else str(value)

"""Linear probes of one backbone, in FP32 and quantized: the runs, and the rows that they give."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS
from mmengine.utils import track_iter_progress
from torch import nn

from gplq.plugins.bootstrap import compare_top1, top1_of
from gplq.plugins.campaign import config_of
from gplq.plugins.fgvc.classifier import TimmClassifier
from gplq.plugins.logged_run import check_tool, run_logged
from gplq.plugins.results import (
    BOUNDS,
    ResultError,
    ResultRow,
    append_row,
    commit,
    file_sha256,
    measure,
    read_rows,
    versions,
)
from gplq.record import Stage, is_prepared, record_of
from gplq.size import effective_bits, float_bytes, packed_model_bytes

__all__ = ['Probe', 'plan_probes', 'probe']

TOOL = 'tools/train.py'
METRIC = 'top1'
FP32 = 'fp32'


@dataclass(frozen=True)
class Probe:
    """One head, trained on one frozen backbone."""

    config: str
    method: str
    file: Path
    seed: int
    split: str
    work_dir: Path

    @property
    def init_cfg(self) -> dict[str, str]:
        """Where the model takes its backbone from."""
        return {'type': 'Pretrained' if self.method == FP32 else 'Quantized', 'checkpoint': str(self.file)}

    @property
    def predictions(self) -> Path:
        """The file of what it sees in each image."""
        return self.work_dir / 'predictions.json'

    @property
    def command(self) -> list[str]:
        """The program and its arguments; a user can paste it."""
        options = {f'model.init_cfg.{key}': value for key, value in self.init_cfg.items()} | {
            'randomness.seed': self.seed,
            'val_dataloader.dataset.split': self.split,
            'val_evaluator.outfile': self.predictions,
        }
        pairs = [f'{key}={value}' for key, value in options.items()]
        return ['python', TOOL, self.config, '--work-dir', str(self.work_dir), '--cfg-options', *pairs]


def plan_probes(
    config: str,
    fp32: str,
    quantized: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    split: str,
    work: Path,
) -> list[Probe]:
    """Each backbone with each seed, FP32 first.

    Args:
        config: of a classifier with a frozen backbone.
        fp32: file of the FP32 backbone.
        quantized: what each of the others was quantized by, and its file as `gplq.save` writes it; `{seed}` in its
            name stands for the seed, so that heads are trained on backbones that differ as well.
        seeds: of the heads.
        split: what is measured on.
        work: folder of the runs.

    Raises:
        ResultError: a file is missing, or one would be measured as two.
    """
    named = [(FP32, fp32), *quantized]
    probes: dict[Path, Probe] = {}
    for seed in seeds:
        for method, pattern in named:
            file = Path(pattern.replace('{seed}', str(seed)))
            if not file.is_file():
                raise ResultError(f'{method}: {file} does not exist')
            stem = '' if method == FP32 else file.stem.removeprefix('gplq')
            folder = work / split / (re.sub(r'\W+', '_', f'{method}{stem}') + f'_s{seed}')
            if folder in probes:
                raise ResultError(f'{method}={pattern}: {probes[folder].file} has the same method and name; give one')
            probes[folder] = Probe(config, method, file, seed, split, folder)
    return list(probes.values())


def probe(probes: Sequence[Probe], benchmark: str, model: str, output: Path) -> None:
    """Train the heads whose rows are not in ``output``, and add rows of their top-1 and its interval.

    Args:
        probes: as :func:`plan_probes` gives them.
        benchmark: its name in the rows.
        model: its name in the rows.
        output: file of the rows.

    Raises:
        ResultError: the config is no probe, a backbone is not what its name says, or a run failed.
        CheckpointError: a file is damaged or another model's.
    """
    check_tool(TOOL)
    sizes = {one.file: _size(one) for one in _once(probes)}
    references = {one.seed: one for one in probes if one.method == FP32}
    sha256 = file_sha256(next(iter(references.values())).file)
    rows = {row.command: row for row in _rows(output) if (row.checkpoint_sha256, row.metric) == (sha256, METRIC)}
    waiting = [one for one in probes if shlex.join(one.command) not in rows]
    print(f'{len(probes)} probes, {len(probes) - len(waiting)} of them done already; rows: {output}')
    for one in track_iter_progress(waiting) if waiting else ():
        text = shlex.join(one.command)
        print(f'\n{text}', flush=True)
        with measure() as cost:
            run_logged([sys.executable, *one.command[1:]], one.work_dir)
        rows[text] = ResultRow(
            benchmark=benchmark,
            split=one.split,
            model=model,
            scope='backbone',
            checkpoint_sha256=sha256,
            method=one.method,
            seed=one.seed,
            metric=METRIC,
            value=top1_of(one.predictions),
            minutes=cost.minutes,
            peak_memory_mb=None,
            command=text,
            commit=commit(),
            versions=versions(),
            **sizes[one.file],
        )
        append_row(output, rows[text])
        print(f'{one.method} {METRIC} {rows[text].value:.2f}')
    _add_intervals(probes, references, rows, output)


def _add_intervals(
    probes: Sequence[Probe], references: Mapping[int, Probe], rows: Mapping[str, ResultRow], output: Path
) -> None:
    done = {row.command for row in _rows(output)}
    for one in probes:
        files = [references[one.seed].predictions, one.predictions]
        command = shlex.join(['python', 'tools/bootstrap.py', *map(str, files)])
        if one.method == FP32 or command in done or not all(file.is_file() for file in files):
            continue
        found = compare_top1(*files)
        row = rows[shlex.join(one.command)]
        if abs(found.second - row.value) > 1e-6:
            raise ResultError(
                f'{one.work_dir}: its predictions give {METRIC} {found.second:.4f}, its row has {row.value:.4f}; they '
                'are of two runs, so delete the row and measure again'
            )
        for end, value in zip(BOUNDS, (found.low, found.high), strict=True):
            append_row(output, replace(row, metric=METRIC + end, value=value, command=command))


def _rows(output: Path) -> list[ResultRow]:
    return read_rows(output) if output.is_file() else []


def _once(probes: Sequence[Probe]) -> Iterator[Probe]:
    """One probe of each file."""
    yield from {one.file: one for one in probes}.values()


def _size(one: Probe) -> dict[str, Any]:
    """Bits and bytes of a backbone, which is read for it as the run will."""
    cfg = config_of(one.config)
    if not cfg.model.get('frozen'):
        raise ResultError(f'{one.config} trains the backbone too: a probe has model = dict(frozen=True)')
    model: nn.Module = MODELS.build({**cfg.model, 'init_cfg': one.init_cfg})
    if not isinstance(model, TimmClassifier):
        raise ResultError(f'{one.config}: {type(model).__name__} is no TimmClassifier, whose backbones probes take')
    model.init_weights()
    if not is_prepared(model):
        return {
            'weight_bits': 32,
            'activation_bits': 32,
            'effective_bits': 32.0,
            'artifact_bytes': float_bytes(model.backbone),
        }
    record = record_of(model)
    if record.stage is not Stage.QUANTIZED:
        raise ResultError(f'{one.file}: its weights are not quantized yet')
    recipe = record.plan.recipe
    return {
        'weight_bits': recipe.weight_bits,
        'activation_bits': recipe.activation_bits,
        'effective_bits': effective_bits(model),
        'artifact_bytes': packed_model_bytes(model, model.backbone),
    }

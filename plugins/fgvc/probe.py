"""Linear probes of one backbone, in FP32 and quantized: the runs, and the rows that they give."""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.utils import track_iter_progress

from gplq.errors import GPLQError
from gplq.plugins.bootstrap import top1_of
from gplq.plugins.campaign import config_of
from gplq.plugins.command_line import option_value
from gplq.plugins.comparison import Comparison, add_intervals
from gplq.plugins.fgvc.classifier import TimmClassifier
from gplq.plugins.logged_run import alone, check_tool, run_logged
from gplq.plugins.results import (
    ResultError,
    ResultRow,
    append_row,
    commit,
    file_sha256,
    measure,
    rows_so_far,
    versions,
)
from gplq.plugins.settings_hash import settings_hash
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
    # Of the FP32 backbone.
    sha256: str

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

    @property
    def text(self) -> str:
        """The command as one line."""
        return shlex.join(self.command)


def plan_probes(
    config: str,
    fp32: str,
    quantized: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    split: str,
    work: Path,
) -> list[Probe]:
    """Each backbone with each seed, FP32 first.

    A probe's folder, and by it its command, is named for what is in the files: another backbone under an old name is
    another probe.

    Args:
        config: of a classifier with a frozen backbone.
        fp32: file of the FP32 backbone.
        quantized: what each of the others was quantized by, and its file as `gplq.save` writes it; `{seed}` in its
            name stands for the seed, so that heads are trained on backbones that differ as well.
        seeds: of the heads.
        split: what is measured on.
        work: folder of the runs.

    Raises:
        ResultError: a file is missing or has a name that options cannot hold, or a method has none.
    """
    if '{seed}' in fp32:
        raise ResultError(f'{fp32}: there is one FP32 backbone for all seeds, whose differences are measured from it')
    for method, pattern in quantized:
        if not re.fullmatch(r'[\w.-]+', method) or method == FP32:
            raise ResultError(f"{method}={pattern}: {method!r} names no method; write one such as 'gplq' or 'rtn'")
    sha256 = file_sha256(_file(FP32, fp32))
    probes = []
    for seed in dict.fromkeys(seeds):
        for method, pattern in ((FP32, fp32), *dict.fromkeys(quantized)):
            file = _file(method, pattern.replace('{seed}', str(seed)))
            content = hashlib.sha256(f'{config} {sha256} {file_sha256(file)}'.encode()).hexdigest()[:8]
            folder = work / split / f'{method}_s{seed}_{content}'
            if option_value(str(folder)) != str(folder):
                raise ResultError(f'--work-dir {work}: options cannot hold this name; choose one without , ( ) [ ]')
            probes.append(Probe(config, method, file, seed, split, folder, sha256))
    return probes


def _file(method: str, name: str) -> Path:
    if not Path(name).is_file():
        raise ResultError(f'{method}: {name} is no file; name one that holds the backbone')
    if option_value(name) != name:
        raise ResultError(f'{method}: options cannot hold the name {name}; rename the file, without , ( ) [ ]')
    return Path(name)


def probe(probes: Sequence[Probe], benchmark: str, model: str, output: Path) -> None:
    """Train the heads whose rows are not in ``output``, and add rows of their top-1 and its interval.

    Args:
        probes: as :func:`plan_probes` gives them.
        benchmark: its name in the rows.
        model: its name in the rows.
        output: file of the rows.

    Raises:
        ResultError: the config is no probe, a file holds no fit backbone, or a run failed.
        CheckpointError: a file is damaged or another model's.
    """
    check_tool(TOOL)
    if output.is_dir():
        raise ResultError(f'--output {output} is a folder; name a file for the rows')
    files = {(one.method == FP32, one.file): one for one in probes}
    sizes = {key: _size(one) for key, one in files.items()}
    cfg = config_of(probes[0].config)
    settings = settings_hash(cfg, str(cfg.get('data_root') or ''))
    # Of several, tables show the last.
    known = {row.command: row.settings_sha256 for row in rows_so_far(output) if row.metric == METRIC}
    waiting = [one for one in probes if known.get(one.text) != settings]
    print(f'{len(probes)} probes, {len(probes) - len(waiting)} of them done already; rows: {output}')
    for one in track_iter_progress(waiting) if waiting else ():
        print(f'\n{one.text}', flush=True)
        # What an earlier run left is not this one's.
        one.predictions.unlink(missing_ok=True)
        with measure() as cost:
            with alone(one.work_dir):
                run_logged([sys.executable, *one.command[1:]], one.work_dir)
        row = ResultRow(
            benchmark=benchmark,
            split=one.split,
            model=model,
            scope='backbone',
            checkpoint_sha256=one.sha256,
            method=one.method,
            seed=one.seed,
            metric=METRIC,
            value=top1_of(one.predictions),
            minutes=cost.minutes,
            peak_memory_mb=None,
            command=one.text,
            commit=commit(),
            versions=versions(),
            settings_sha256=settings,
            **sizes[one.method == FP32, one.file],
        )
        append_row(output, row)
        print(f'{one.method} {METRIC} {row.value:.2f}')
    references = {one.seed: one for one in probes if one.method == FP32}
    pairs = [Comparison(one, references[one.seed], METRIC) for one in probes if one.method != FP32]
    add_intervals(pairs, '', probes[0].sha256, output)


def _size(one: Probe) -> dict[str, Any]:
    """Bits and bytes of a backbone, which is read for it as the run will."""
    model = _built(config_of(one.config), one)
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


def _built(cfg: Config, one: Probe) -> TimmClassifier:
    """The config's model, if the config probes what init_cfg brings.

    Raises:
        ResultError: it does something else.
    """
    settings: Mapping[str, Any] = cfg.get('model') or {}
    if not settings.get('frozen'):
        raise ResultError(f'{one.config} trains the backbone too: a probe has model = dict(frozen=True)')
    if cfg.get('load_from') or cfg.get('resume'):
        raise ResultError(
            f'{one.config} has load_from or resume, whose weights would replace every backbone: remove it'
        )
    if 'gplq' in (cfg.get('default_hooks') or {}):
        raise ResultError(f'{one.config} has default_hooks.gplq, which quantizes by itself: a probe has none')
    try:
        model = MODELS.build({**settings, 'init_cfg': one.init_cfg})
    except GPLQError:
        raise
    except Exception as error:
        # Any model can be named, with any arguments.
        raise ResultError(f'{one.config}: its model cannot be built: {type(error).__name__}: {error}') from error
    if not isinstance(model, TimmClassifier):
        raise ResultError(f'{one.config}: {type(model).__name__} is no TimmClassifier, whose backbones probes take')
    return model

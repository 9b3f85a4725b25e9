"""Carrying out the runs of a benchmark one after the other; what has been measured is not measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.utils import track_iter_progress

from gplq.files import write_bytes_atomically
from gplq.plugins.benchmark import TOOL, Run, curve_of, rows_of
from gplq.plugins.comparison import Comparison, add_intervals
from gplq.plugins.hook_of_config import hook_of, settings_of_run
from gplq.plugins.hooks.resume import find_resume_point
from gplq.plugins.json_files import read_json
from gplq.plugins.logged_run import alone, check_tool, run_logged
from gplq.plugins.methods import VARIANTS, variants_of
from gplq.plugins.results import ResultError, append_row, file_sha256, rows_so_far
from gplq.plugins.settings_hash import settings_hash

__all__ = [
    'MARK',
    'carry_out',
    'check_variants',
    'config_of',
    'metrics_of',
    'model_of_config',
    'raise_failures',
    'read',
    'task_of',
]


# In the folder of a run that came to its end: which run it was.
MARK = 'run.json'
# While it has not: which run was begun there.
BEGUN = 'begun.json'


def task_of(cfg: Config, config: str) -> str:
    """Classification where the data set has splits by name, else detection.

    Raises:
        ResultError: the config, of this name, validates nothing.
    """
    dataset = (cfg.get('val_dataloader') or {}).get('dataset')
    if not dataset:
        raise ResultError(f'{config} has no val_dataloader with a dataset, on whose data the figures are measured')
    return 'classification' if 'split' in dataset else 'detection'


def read(config: str) -> Config:
    """A config with the two lines.

    Raises:
        ResultError: it is missing, cannot be read, or has no GPLQHook to set.
    """
    cfg = config_of(config)
    hook_of(cfg, config)
    return cfg


def config_of(config: str) -> Config:
    """Any config.

    Raises:
        ResultError: it is missing or cannot be read.
    """
    if not Path(config).is_file():
        raise ResultError(f'config {config} does not exist')
    try:
        return Config.fromfile(config)
    except Exception as error:
        # A config is a program; what it raises can be any error.
        raise ResultError(f'config {config} cannot be read: {type(error).__name__}: {error}') from error


def check_variants(
    cfg: Config, config: str, methods: Sequence[str], variants: Sequence[str], options: Mapping[str, str]
) -> None:
    """Refuse a variant under whose name the settings of the config itself would be measured.

    Args:
        cfg: with the two lines.
        config: its name.
        methods: names in :data:`gplq.plugins.methods.METHODS`.
        variants: names in :data:`gplq.plugins.methods.VARIANTS`.
        options: the user's, which are set in every run.

    Raises:
        ResultError: a variant changes no setting.
        RecipeError: the settings are no hook's.
    """

    for method in methods:
        for variant in filter(VARIANTS.get, variants_of(method, variants)):
            plain, varied = (settings_of_run(cfg, config, method, name, options) for name in ('', variant))
            if varied == plain:
                raise ResultError(f'--variants {variant!r}: {config} has these settings already; leave it out')


def metrics_of(task: str) -> list[str]:
    """What is measured where nothing is said."""
    return ['bbox_mAP' if task == 'detection' else 'top1']


def model_of_config(config: str, benchmark: str) -> str:
    """The model's name in the rows, where none is given."""
    return Path(config).stem.removeprefix('gplq_').removesuffix(f'_{benchmark}')


def carry_out(
    runs: Sequence[Run], metrics: Sequence[str], data_root: str, output: Path, curves: Path | None = None
) -> list[str]:
    """Make the runs whose rows are not in ``output``, then the intervals of their differences from FP32.

    A run that fails does not keep the others from being made; one that was interrupted is resumed.

    Args:
        runs: as :func:`gplq.plugins.benchmark.plan_runs` gives them.
        metrics: whose figures become rows.
        data_root: where the data is.
        output: file of the rows, which are added to it.
        curves: file of further rows, one for each validation during a run; None keeps none.

    Returns:
        Of each run that failed, its folder with its last words and the place of its log.

    Raises:
        ResultError: there is nothing to start from, or predictions are of other runs than the rows.
    """
    check_tool(TOOL)
    checkpoint = runs[0].checkpoint
    if not Path(checkpoint).is_file():
        raise ResultError(f'checkpoint {checkpoint} does not exist')
    sha256 = file_sha256(checkpoint)
    settings = settings_hash(config_of(runs[0].config), data_root)
    known = rows_so_far(output)
    waiting = [run for run in runs if not run.is_done(metrics, sha256, settings, known)]
    # An activation stage that others go on with may have been measured, and its checkpoint deleted or replaced since.
    stages = {run.trained_by for run in waiting if run.trained_by}
    lost = [stage for stage in stages if not _left_by(stage, sha256, settings)]
    waiting = [run for run in runs if run in waiting or run in lost]
    print(f'{len(runs)} runs, {len(runs) - len(waiting)} of them done already; rows: {output}')
    failed: dict[Path, str] = {}
    for number, run in enumerate(track_iter_progress(waiting) if waiting else (), start=1):
        print(f'\n[{number}/{len(waiting)}] {run.text}', flush=True)
        again = run.is_done(metrics, sha256, settings, known)
        try:
            if run.trained_by is not None and run.trained_by.work_dir in failed:
                raise ResultError(f'the activation stage of {run.trained_by.work_dir} has failed')
            with alone(run.work_dir):
                _make(run, data_root, _identity(run, sha256, settings))
            rows = rows_of(run, metrics, run.model or model_of_config(run.config, run.benchmark), settings)
        except ResultError as error:
            failed[run.work_dir] = str(error)
            print(f'{run.work_dir}: {error}', flush=True)
            continue
        for row in rows:
            if not again:
                append_row(output, row)
            print(f'W{row.weight_bits}A{row.activation_bits} {row.metric} {row.value:.4f}')
        if curves is not None and not again:
            for row in curve_of(run, rows):
                append_row(curves, row)
    references = [run for run in runs if run.method == 'fp32']
    compared = [metric for metric in metrics if Comparison.compares(metric)]
    pairs = [Comparison(run, fp32, metric) for fp32 in references for run in runs if run != fp32 for metric in compared]
    pairs = [pair for pair in pairs if not {pair.run.work_dir, pair.fp32.work_dir} & failed.keys()]
    add_intervals(pairs, data_root, sha256, output)
    return [f'{folder}: {words}' for folder, words in failed.items()]


def raise_failures(failed: Sequence[str]) -> None:
    """End a program whose runs have failed, once it has shown what the others found.

    Raises:
        ResultError: there are any.
    """
    if failed:
        raise ResultError('\n'.join([f'{len(failed)} runs failed; the same command makes them again:', *failed]))


def _make(run: Run, data_root: str, identity: dict[str, str]) -> None:
    """Carry out one run, from where it was interrupted if it was."""
    mark, begun = run.work_dir / MARK, run.work_dir / BEGUN
    mark.unlink(missing_ok=True)
    arguments = run.arguments(data_root)
    if _is(begun, identity) and find_resume_point(str(run.work_dir)):
        print('resumed')
        arguments.append('--resume')
    write_bytes_atomically(begun, json.dumps(identity).encode())
    run_logged(arguments, run.work_dir)
    write_bytes_atomically(mark, json.dumps(identity).encode())
    begun.unlink()


def _identity(run: Run, sha256: str, settings: str) -> dict[str, str]:
    return {'command': run.text, 'checkpoint_sha256': sha256, 'settings_sha256': settings}


def _left_by(run: Run, sha256: str, settings: str) -> bool:
    """Whether the activation stage in a run's folder is this run's, not one of another checkpoint or config."""
    return run.stage_file.is_file() and _is(run.work_dir / MARK, _identity(run, sha256, settings))


def _is(mark: Path, identity: dict[str, str]) -> bool:
    """Whether a mark is there and of this run."""
    try:
        return bool(read_json(mark) == identity)
    except ResultError:
        # None, or one that was damaged: nobody knows whose it is.
        return False

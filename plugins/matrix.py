"""What a comparison of methods shows: settings, a table as Markdown and CSV, and a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

from mmengine.config import Config

from gplq.plugins.benchmark import Run
from gplq.plugins.hook_of_config import settings_of_run
from gplq.plugins.plotting import look, new_figure, save
from gplq.plugins.results import BOUNDS, ResultRow, bits_name
from gplq.recipe import Recipe

__all__ = ['plot', 'rows_of_runs', 'settings_of', 'write_csv']

NAMES = ('method', 'variant', 'weight_bits', 'activation_bits', 'seed')
COLUMNS = ('minutes', 'peak_memory_mb', 'calibration_samples', 'effective_bits', 'artifact_bytes')
# What a comparison sets itself, or that decides nothing about the method.
BESIDE = ('weight_bits', 'activation_bits', 'targets', 'skip')


def settings_of(cfg: Config, config: str, method: str, options: dict[str, str], variant: str = '') -> dict[str, Any]:
    """Where the settings of a method, and of a variant of it, differ from the core's defaults, as names and values.

    Args:
        cfg: with the two lines.
        config: its name.
        method: a name in :data:`gplq.plugins.methods.METHODS`.
        options: the user's, as text.
        variant: a name in :data:`gplq.plugins.methods.VARIANTS`.

    Raises:
        RecipeError: the config's hook has a setting that there is not.
        ResultError: the config has no hook that takes them.
    """
    settings = settings_of_run(cfg, config, method, variant, options)
    found: dict[str, Any] = _differences(settings.recipe, Recipe(), '')
    if settings.recipe.rounding == 'reconstruct':
        found |= _all(settings.reconstruction, 'reconstruction.')
    if settings.recipe.weight_scheme == 'searched':
        found |= _all(settings.search, 'search.')
    if settings.trains:
        found |= _all(settings.stage, 'stage.')
    return found


def rows_of_runs(runs: Sequence[Run], rows: Sequence[ResultRow], sha256: str) -> list[ResultRow]:
    """The rows that these runs and their intervals have: the last figures, and the bounds behind them.

    Rows of intervals repeat what they are of, but for the command.
    """
    keys = {(run.method, run.label, *bits, run.seed, run.split) for run in runs for _, *bits in run.bits_of_rows}
    mine: dict[tuple[Any, ...], ResultRow] = {}
    for row in rows:
        key = (row.method, row.variant, row.weight_bits, row.activation_bits, row.seed, row.split)
        if key in keys and row.checkpoint_sha256 == sha256:
            if not row.metric.endswith(BOUNDS):
                # What was measured anew has no interval until that was, too.
                for end in BOUNDS:
                    mine.pop((key, row.metric + end), None)
            mine[key, row.metric] = row
    return list(mine.values())


def write_csv(rows: Sequence[ResultRow], metrics: Sequence[str]) -> str:
    """One line a run and step: its figures with the bounds of their difference from FP32, and what they cost."""
    names = [metric + end for metric in metrics for end in ('', *BOUNDS)]
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row.method, row.variant, row.weight_bits, row.activation_bits, row.seed)
        line = lines.setdefault(key, dict(zip(NAMES, key, strict=True)))
        line[row.metric] = row.value
        if not row.metric.endswith(BOUNDS):
            line |= {name: getattr(row, name) for name in COLUMNS}
    text = StringIO()
    writer = csv.DictWriter(
        text,
        [*NAMES, *names, *COLUMNS],
        extrasaction='ignore',
        lineterminator='\n',
    )
    writer.writeheader()
    writer.writerows(lines.values())
    return text.getvalue()


def plot(rows: Sequence[ResultRow], metric: str, path: Path) -> None:
    """Draw the metric against minutes and against bytes, a colour a method; means over seeds."""
    points: dict[str, dict[str, list[ResultRow]]] = {}
    for row in rows:
        # A step between has the weights of FP32, and so its size.
        if row.metric != metric or (row.weight_bits == 32) != (row.activation_bits == 32):
            continue
        name = ' '.join(filter(None, (row.method, row.variant)))
        bits = bits_name(row.weight_bits, row.activation_bits)
        points.setdefault(name, {}).setdefault(bits, []).append(row)
    figure = new_figure(13, 5.5)
    for axes, (field, title, unit) in zip(
        figure.subplots(1, 2, sharey=True),
        (('minutes', 'minutes', 1.0), ('artifact_bytes', 'size of the model, MB', 1e6)),
        strict=True,
    ):
        for number, (name, of_bits) in enumerate(sorted(points.items())):
            means = {
                bits: (_mean([getattr(row, field) or 0 for row in found]) / unit, _mean([row.value for row in found]))
                for bits, found in of_bits.items()
            }
            x, y = zip(*means.values(), strict=True)
            axes.plot(x, y, linestyle='none', label=name, **look(number))
            for bits, place in means.items():
                axes.annotate(bits, place, xytext=(4, 3), textcoords='offset points', fontsize=7)
        axes.set_xlabel(title)
    figure.axes[0].set_ylabel(metric)
    figure.axes[0].set_xscale('symlog', linthresh=0.1)
    figure.axes[1].legend(fontsize=8)
    save(figure, path)


def _differences(settings: Any, defaults: Any, prefix: str) -> dict[str, Any]:
    return {name: value for name, value in _all(settings, prefix).items() if value != _all(defaults, prefix)[name]}


def _all(settings: Any, prefix: str) -> dict[str, Any]:
    return {f'{prefix}{f.name}': getattr(settings, f.name) for f in fields(settings) if f.name not in BESIDE}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

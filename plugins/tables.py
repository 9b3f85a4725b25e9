"""Tables of README.md and docs/, written from result rows."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from .methods import VARIANTS
from .results import BOUNDS, ResultError, ResultRow, bits_name, rows_so_far

__all__ = ['fill_tables', 'render_table']

# Only at the start of a line, so that a page can quote a marker.
MARKER = re.compile(r'^<!-- table: (?P<options>[^>\n]*) -->\n.*?^<!-- /table -->', re.DOTALL | re.MULTILINE)
FIELDS = {f.name for f in fields(ResultRow)} - {'metric', 'value', 'versions'}
# Reading order within the same bits: what one compares with comes first, the method last.
FIRST, LAST = ('fp32', 'fp32_control', 'rtn'), 'gplq'
EXTRA = {
    'effective_bits': ('effective bits', '{:.2f}', 1),
    'minutes': ('minutes', '{:.1f}', 1),
    'peak_memory_mb': ('peak memory, MB', '{:.0f}', 1),
    'artifact_bytes': ('artifact, MB', '{:.2f}', 1e6),
    'calibration_samples': ('calibration images', '{:.0f}', 1),
}
INTERVAL = 'interval'

_Key = tuple[str, int, int, str, str]


def fill_tables(text: str, root: Path) -> str:
    """Fill every block between `<!-- table: FILE metrics=A,B … -->` and `<!-- /table -->` of a page.

    FILE is relative to `root`; `also=interval,minutes,artifact_bytes` adds columns, `interval` one for each metric,
    with the bounds of its difference from FP32; any other `field=value,value` keeps the rows with one of these values.
    Values with spaces are quoted.

    Raises:
        ResultError: an option is unknown, or rows contradict each other.
    """

    def replace(match: re.Match[str]) -> str:
        path, *options = shlex.split(match['options'])
        settings = dict(option.split('=', 1) for option in options if '=' in option)
        if len(settings) != len(options) or 'metrics' not in settings:
            raise ResultError(f'table of {path}: write <!-- table: FILE metrics=A,B field=value -->, not {options}')
        metrics = settings.pop('metrics').split(',')
        also = settings.pop('also').split(',') if 'also' in settings else []
        if foreign := sorted(set(settings) - FIELDS) + sorted(set(also) - {*EXTRA, INTERVAL}):
            raise ResultError(f'table of {path}: no field {", ".join(foreign)}')
        rows = rows_so_far(root / path)
        wanted = {name: values.split(',') for name, values in settings.items()}
        rows = [row for row in rows if all(str(getattr(row, n)) in v for n, v in wanted.items())]
        return f'<!-- table: {match["options"]} -->\n{render_table(rows, metrics, also)}<!-- /table -->'

    return MARKER.sub(replace, text)


def render_table(rows: Iterable[ResultRow], metrics: Sequence[str], also: Sequence[str] = ()) -> str:
    """Write rows as a table: a line for each method, bits and variant, mean ± standard deviation over seeds.

    Bounds of intervals are means over seeds too. A row that was run again replaces the earlier one.

    Raises:
        ResultError: rows of one model start from two checkpoints, or are of two splits or scopes.
    """
    extra = [name for name in also if name != INTERVAL]
    bounds = {metric: [metric + end for end in BOUNDS] for metric in metrics if INTERVAL in also}
    wanted = {*metrics, *(bound for pair in bounds.values() for bound in pair)}
    groups: dict[_Key, dict[str, dict[int, ResultRow]]] = {}
    first: dict[str, ResultRow] = {}
    for row in rows:
        if row.metric not in wanted:
            continue
        start = first.setdefault(row.model, row)
        if _identity(start) != _identity(row):
            raise ResultError(
                f'{row.benchmark}: the rows of {row.model} are of two checkpoints, splits or scopes, in '
                f'{start.method} and {row.method}; keep one with field=value in the table marker'
            )
        key = (row.model, row.weight_bits, row.activation_bits, row.method, row.variant)
        groups.setdefault(key, {}).setdefault(row.metric, {})[row.seed] = row
    if not groups:
        return '_No rows yet._\n'
    models = len({key[0] for key in groups}) > 1
    variants = any(key[4] for key in groups)
    head = (['model'] if models else []) + ['method'] + (['variant'] if variants else []) + ['bits']
    columns = [metric.replace('_', ' ') for metric in metrics]
    columns += [f'{metric.replace("_", " ")} − FP32, 95 %' for metric in bounds]
    columns += [*(EXTRA[name][0] for name in extra), 'seeds']
    lines = [[*head, *columns], ['---'] * len(head) + ['---:'] * len(columns)]
    for key in sorted(groups, key=_order):
        model, weight_bits, activation_bits, method, variant = key
        figures = groups[key]
        line = ([model] if models else []) + [method] + ([variant] if variants else [])
        line.append(bits_name(weight_bits, activation_bits))
        line += [_mean([r.value for r in figures.get(metric, {}).values()], _digits(metric)) for metric in metrics]
        line += [_interval(figures, pair, _digits(metric)) for metric, pair in bounds.items()]
        runs = {row.seed: row for of_metric in figures.values() for row in of_metric.values()}
        for name in extra:
            _, form, unit = EXTRA[name]
            numbers = [getattr(r, name) / unit for r in runs.values() if getattr(r, name) is not None]
            line.append(form.format(statistics.fmean(numbers)) if numbers else '')
        lines.append([*line, str(len(runs))])
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _identity(row: ResultRow) -> tuple[str, ...]:
    return row.benchmark, row.split, row.scope, row.checkpoint_sha256


def _order(key: _Key) -> tuple[str | int, ...]:
    model, weight_bits, activation_bits, method, variant = key
    rank = FIRST.index(method) if method in FIRST else len(FIRST) + (method == LAST)
    place = list(VARIANTS).index(variant) if variant in VARIANTS else len(VARIANTS)
    return model, -activation_bits, -weight_bits, rank, method, place, variant


def _digits(metric: str) -> str:
    """Fractions have three decimals, seconds and ratios two, percentages one, megabytes none."""
    if 'mAP' in metric:
        return '{:.3f}'
    if metric == 'allocated_mb':
        return '{:.0f}'
    return '{:.2f}' if metric.startswith('step_') or metric.endswith('_ratio') else '{:.1f}'


def _mean(values: list[float], form: str) -> str:
    if not values:
        return ''
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f'{mean} ± {form.format(statistics.stdev(values))}'


def _interval(figures: dict[str, dict[int, ResultRow]], bounds: Sequence[str], form: str) -> str:
    if not all(bound in figures for bound in bounds):
        return ''
    means = [statistics.fmean(row.value for row in figures[bound].values()) for bound in bounds]
    return ' to '.join(form.replace(':', ':+').format(mean) for mean in means)

"""Tables of README.md and docs/, written from result rows."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from .methods import METHODS, VARIANTS
from .results import BOUNDS, ResultError, ResultRow, bits_name, read_rows

__all__ = ['fill_tables', 'render_table']

OPENING = re.compile(r'<!-- table: (?P<options>[^>]*) -->')
CLOSING = '<!-- /table -->'
# What a reader takes for a marker: one that is misspelled would leave its table as it is for ever.
MARKER_LIKE = re.compile(r'\s*<!--\s*/?\s*table', re.IGNORECASE)
FENCE = re.compile(r'\s*(`{3,}(?=[^`]*$)|~{3,})')
LIST_ITEM = re.compile(r' *(?:[-*+]|\d+[.)])(?: +|$)')
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
    Values with spaces are quoted. Markers count at the start of a line; in code they are text.

    Raises:
        ResultError: a marker is misspelled or has no partner, its file, a value or an option is unknown, or rows
            contradict each other.
    """
    lines = text.split('\n')
    filled: list[str] = []
    copied = 0
    opened: int | None = None
    for place in _markers(lines):
        line = lines[place]
        marker = f'line {place + 1}, {line.strip()}'
        if match := OPENING.fullmatch(line):
            if opened is not None:
                raise ResultError(f'{marker}: the table of line {opened + 1} is open; close it with {CLOSING} before')
            opened = place
            filled += lines[copied : place + 1]
            try:
                filled += _table(match['options'], root).splitlines()
            except ResultError as error:
                raise ResultError(f'{marker}: {error}') from error
        elif not line.startswith(CLOSING):
            raise ResultError(
                f'{marker}: this is no marker of a table; write <!-- table: FILE metrics=A,B field=value --> or '
                f'{CLOSING} at the start of a line, alone there, or quote it as code'
            )
        elif opened is None:
            raise ResultError(f'{marker}: no table is open; write <!-- table: FILE metrics=A,B --> above it')
        else:
            opened, copied = None, place
    if opened is not None:
        raise ResultError(f'line {opened + 1}, {lines[opened]}: the table is never closed; write {CLOSING} below it')
    return '\n'.join(filled + lines[copied:])


def _markers(lines: Sequence[str]) -> Iterator[int]:
    """Places of the lines that begin like a marker and are no code, as Markdown has it.

    Code is fenced, or behind an empty line and indented by four columns more than what it stands in.

    Raises:
        ResultError: a fence is never closed, so that every marker behind it would be code.
    """
    fence, fenced = '', 0
    margin, may_be_code = 0, True
    for place, line in enumerate(lines):
        words = line.strip()
        indent = len(line.expandtabs(4)) - len(line.expandtabs(4).lstrip())
        if fence:
            if len(words) >= len(fence) and set(words) == {fence[0]}:
                fence, may_be_code = '', True
            continue
        if not words:
            may_be_code = True
            continue
        if may_be_code and indent < margin:
            margin = 0
        if may_be_code and indent >= margin + 4:
            continue
        may_be_code = False
        begin = 0
        if item := LIST_ITEM.match(line):
            begin = margin = item.end()
        if match := FENCE.match(line, begin):
            fence, fenced = match[1], place
        elif MARKER_LIKE.match(line, begin):
            yield place
    if fence:
        raise ResultError(f'line {fenced + 1}, {lines[fenced].strip()}: this block of code is never closed; close it')


def _table(options: str, root: Path) -> str:
    try:
        path, *given = shlex.split(options) or ['']
    except ValueError as error:
        raise ResultError(f"{error}; quote values with spaces as in variant='no mimicking'") from error
    settings = dict(option.split('=', 1) for option in given if '=' in option)
    if len(settings) != len(given) or 'metrics' not in settings:
        raise ResultError(f'write <!-- table: FILE metrics=A,B field=value -->, not {given}')
    metrics = settings.pop('metrics').split(',')
    also = settings.pop('also').split(',') if 'also' in settings else []
    if foreign := sorted(set(settings) - FIELDS) + sorted(set(also) - {*EXTRA, INTERVAL}):
        known = f'write {", ".join(sorted(FIELDS))}, or in also= {", ".join([*EXTRA, INTERVAL])}'
        raise ResultError(f'no field {", ".join(foreign)}; {known}')
    if not (root / path).is_file():
        raise ResultError(f'file {path!r} does not exist; name one of rows, from the root of the repository')
    rows = read_rows(root / path)
    wanted = {name: values.split(',') for name, values in settings.items()}
    kept = [row for row in rows if all(str(getattr(row, n)) in v for n, v in wanted.items())]
    asked = {'metric': metrics, **wanted}
    # In the whole file first: among the rows that are left, a misspelled value takes the others along.
    if missing := _missing(rows, asked):
        raise ResultError(f'no row of {path} has {missing}; correct it, or measure it first')
    if missing := _missing([row for row in kept if row.metric in metrics], asked):
        raise ResultError(f'no row of {path} has {missing} with the other options; correct them, or measure it first')
    return render_table(kept, metrics, also)


def _missing(rows: Iterable[ResultRow], asked: Mapping[str, Sequence[str]]) -> str:
    """The values that no row has, as text.

    Methods that benchmarks know are none of them: a page can be written before the last of its runs is made.
    """
    found = {(name, str(getattr(row, name))) for row in rows for name in asked}
    known = found | {('method', method) for method in METHODS}
    values = [(name, value) for name, values in asked.items() for value in values]
    return ', '.join(f'{name}={value}' for name, value in values if (name, value) not in known)


def render_table(rows: Iterable[ResultRow], metrics: Sequence[str], also: Sequence[str] = ()) -> str:
    """Write rows as a table: a line for each method, bits and variant, mean ± standard deviation over seeds.

    Bounds of intervals are means too, over the seeds that have both behind their last figure. A row that was run again
    replaces the earlier one.

    Raises:
        ResultError: rows of one model start from two checkpoints, or are of two splits or scopes, or of one config
            that said two things.
    """
    extra = [name for name in also if name != INTERVAL]
    bounds = {metric: [metric + end for end in BOUNDS] for metric in metrics if INTERVAL in also}
    wanted = {*metrics, *(bound for pair in bounds.values() for bound in pair)}
    groups: dict[_Key, dict[str, dict[int, ResultRow]]] = {}
    first: dict[tuple[str, int], ResultRow] = {}
    rows = list(rows)
    for row in rows:
        if row.metric not in wanted:
            continue
        # What is exported was quantized with a seed, so that every seed has a checkpoint of its own.
        start = first.setdefault((row.model, row.seed if row.benchmark == 'export' else 0), row)
        if _identity(start) != _identity(row):
            raise ResultError(
                f'{row.benchmark}: the rows of {row.model} are of two checkpoints, splits or scopes, in '
                f'{start.method} and {row.method}; keep one with field=value in the table marker'
            )
        key = (row.model, row.weight_bits, row.activation_bits, row.method, row.variant)
        group = groups.setdefault(key, {})
        group.setdefault(row.metric, {})[row.seed] = row
        # They were of the figure that this one replaces.
        for bound in bounds.get(row.metric, ()):
            group.get(bound, {}).pop(row.seed, None)
    shown = {id(row) for group in groups.values() for metric in metrics for row in group.get(metric, {}).values()}
    _check_settings(row for row in rows if id(row) in shown)
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
        line += [_interval(figures, metric, pair, _digits(metric)) for metric, pair in bounds.items()]
        runs = {row.seed: row for of_metric in figures.values() for row in of_metric.values()}
        for name in extra:
            _, form, unit = EXTRA[name]
            numbers = [getattr(r, name) / unit for r in runs.values() if getattr(r, name) is not None]
            line.append(form.format(statistics.fmean(numbers)) if numbers else '')
        lines.append([*line, str(len(runs))])
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _identity(row: ResultRow) -> tuple[str, ...]:
    return row.benchmark, row.split, row.scope, row.checkpoint_sha256


def _check_settings(shown: Iterable[ResultRow]) -> None:
    """Refuse to set side by side what one config gave before and after it, or its data, was changed.

    Rows from before there was a hash of the settings stand beside any.

    Args:
        shown: rows of figures, in the order of their file.

    Raises:
        ResultError: rows of one model and config have two hashes.
    """
    first: dict[tuple[str, str], ResultRow] = {}
    for row in shown:
        # Behind the program.
        files = [Path(part).as_posix() for part in shlex.split(row.command) if part.endswith('.py')]
        config = ' '.join(files[1:2])
        start = first.setdefault((row.model, config), row) if row.settings_sha256 else row
        if start.settings_sha256 != row.settings_sha256:
            raise ResultError(
                f'{row.benchmark}: {config} or its data was changed between the rows of {row.model} by '
                f'{start.method} {start.variant!r} and by {row.method} {row.variant!r} (settings_sha256 '
                f'{start.settings_sha256:.8} and {row.settings_sha256:.8}): measure the former again by its command'
            )


def _order(key: _Key) -> tuple[str | int, ...]:
    model, weight_bits, activation_bits, method, variant = key
    rank = FIRST.index(method) if method in FIRST else len(FIRST) + (method == LAST)
    place = list(VARIANTS).index(variant) if variant in VARIANTS else len(VARIANTS)
    return model, -activation_bits, -weight_bits, rank, method, place, variant


def _digits(metric: str) -> str:
    """Fractions have three decimals, seconds and ratios two, percentages one, megabytes none.

    Shares of what is equal have two: with one, 99.96 % would read as all of them.
    """
    if 'mAP' in metric:
        return '{:.3f}'
    if metric == 'allocated_mb':
        return '{:.0f}'
    two = metric.startswith('equal_') or metric.startswith('step_') or metric.endswith('_ratio')
    return '{:.2f}' if two else '{:.1f}'


def _mean(values: list[float], form: str) -> str:
    if not values:
        return ''
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f'{mean} ± {form.format(statistics.stdev(values))}'


def _interval(figures: dict[str, dict[int, ResultRow]], metric: str, bounds: Sequence[str], form: str) -> str:
    seeds = set.intersection(*(set(figures.get(name, {})) for name in (metric, *bounds)))
    if not seeds:
        return ''
    means = [statistics.fmean(figures[bound][seed].value for seed in seeds) for bound in bounds]
    return ' to '.join(form.replace(':', ':+').format(mean) for mean in means)

"""Accuracy along training, in minutes: a plot, and who gets where by when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from gplq.plugins.plotting import look, new_figure, save
from gplq.plugins.results import ResultError, ResultRow, bits_name

__all__ = ['Course', 'courses_of', 'draw', 'table']


class Course(NamedTuple):
    """One run's figures of a metric along its training.

    Attributes:
        name: method and variant.
        bits: such as W2A2.
        seed: the run's.
        points: minutes and value, in the order of the minutes.
    """

    name: str
    bits: str
    seed: int
    points: tuple[tuple[float, float], ...]

    @property
    def end(self) -> tuple[float, float]:
        """Minutes and value of the last validation."""
        return self.points[-1]

    def minutes_to(self, value: float) -> float | None:
        """When a value is reached for the first time, between two validations in proportion; None where it never is."""
        if self.points[0][1] >= value:
            return self.points[0][0]
        for (before, low), (after, high) in pairwise(self.points):
            if high >= value:
                return before + (after - before) * (value - low) / (high - low)
        return None

    def value_at(self, minutes: float) -> float | None:
        """The value after so many minutes, between two validations in proportion; None before the first."""
        if minutes < self.points[0][0]:
            return None
        for (before, first), (after, second) in pairwise(self.points):
            if before <= minutes <= after:
                return first + (second - first) * (minutes - before) / (after - before) if after > before else second
        return self.end[1]


def courses_of(files: Iterable[Iterable[ResultRow]], metric: str) -> list[Course]:
    """The courses that rows of `tools/benchmark.py --curves` hold, of one metric.

    Rows of a run's end, which lie in another file, belong to its course, too. Where the minutes of a run start anew
    within a file it was made again, and replaces the earlier one.

    Args:
        files: rows of each file.
        metric: of the rows that are taken.

    Raises:
        ResultError: there is none of the metric, or they are of several models, checkpoints or splits.
    """
    found: dict[tuple[int, str, str, int], dict[float, float]] = {}
    of: set[tuple[str, str, str, str]] = set()
    for number, row in ((number, row) for number, rows in enumerate(files) for row in rows):
        if row.metric == metric and row.minutes is not None:
            of.add((row.benchmark, row.model, row.split, row.checkpoint_sha256[:8]))
            name = ' '.join(filter(None, (row.method, row.variant)))
            bits = bits_name(row.weight_bits, row.activation_bits)
            points = found.setdefault((number, name, bits, row.seed), {})
            if points and row.minutes <= max(points):
                points.clear()
            points[row.minutes] = row.value
    if len(of) > 1:
        raise ResultError(f'rows of {metric} are of several models, checkpoints or splits: {sorted(of)}; choose one')
    if not found:
        raise ResultError(f'no rows of {metric} with minutes')
    whole: dict[tuple[str, str, int], dict[float, float]] = {}
    for (_, name, bits, seed), points in found.items():
        whole.setdefault((name, bits, seed), {}).update(points)
    return [Course(*key, tuple(sorted(points.items()))) for key, points in sorted(whole.items())]


def table(courses: Sequence[Course], reference: str) -> str:
    """Who needs how long for what the reference reaches, and has what when the reference is done; means over seeds.

    A figure that is better when it is higher is meant. The reference's own two are those of its end.

    Args:
        courses: of one metric.
        reference: name of the method, and its variant if any, of the same bits.

    Raises:
        ResultError: the reference has no course.
    """
    if reference not in {course.name for course in courses}:
        raise ResultError(f'--reference {reference}: there are courses of {sorted({c.name for c in courses})}')
    head: tuple[str, ...] = (
        'method',
        'bits',
        'minutes',
        'in the end',
        f'minutes to {reference}',
        f"at {reference}'s minutes",
        'seeds',
    )
    lines = [head, ('---', '---', *('---:',) * 5)]
    for name, bits in sorted({(course.name, course.bits) for course in courses}):
        goals = [course.end for course in courses if course.name == reference and course.bits == bits]
        mine = [course for course in courses if (course.name, course.bits) == (name, bits)]
        cells = [f'{fmean(course.end[0] for course in mine):.1f}', f'{fmean(course.end[1] for course in mine):.2f}']
        if goals:
            minutes, value = (fmean(side) for side in zip(*goals, strict=True))
            own = name == reference
            reached = [minutes] if own else [course.minutes_to(value) for course in mine]
            then = [value] if own else [course.value_at(minutes) for course in mine]
            cells += [_mean(reached, '{:.1f}', 'never'), _mean(then, '{:.2f}', '')]
        else:
            cells += ['', '']
        lines.append((name, bits, *cells, str(len(mine))))
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def draw(panels: Sequence[tuple[str, Sequence[Course]]], path: Path) -> None:
    """Draw a panel for each metric against minutes, a line for each run, a colour for each method and bits."""
    figure = new_figure(6.5 * len(panels), 5)
    labels = sorted({f'{course.name} {course.bits}' for _, courses in panels for course in courses})
    for axes, (title, courses) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for course in courses:
            label = f'{course.name} {course.bits}'
            shown = label if label not in axes.get_legend_handles_labels()[1] else None
            axes.plot(*zip(*course.points, strict=True), label=shown, markersize=4, **look(labels.index(label)))
        axes.set_xlabel('minutes of training')
        axes.set_ylabel(title)
        axes.legend(fontsize=8)
    save(figure, path)


def _mean(values: Sequence[float | None], form: str, otherwise: str) -> str:
    known = [value for value in values if value is not None]
    # A mean over those that get there alone would flatter the method.
    return form.format(fmean(known)) if len(known) == len(values) else otherwise

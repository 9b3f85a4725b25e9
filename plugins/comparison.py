"""How far a run is from FP32, with the interval from resampled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from mmengine.utils import track_iter_progress

from gplq.plugins.bootstrap import Difference, compare_top1
from gplq.plugins.results import BOUNDS, ResultError, ResultRow, append_row, rows_so_far

__all__ = ['Comparison', 'Measured', 'add_intervals', 'has_interval']

TOOL = 'tools/bootstrap.py'

# Of a metric: the file of predictions that a run leaves, and what a detector's are matched by.
PREDICTIONS = {
    'bbox_mAP': ('predictions.bbox.json', 'bbox'),
    'segm_mAP': ('predictions.segm.json', 'segm'),
    'top1': ('predictions.json', ''),
}


def has_interval(rows: Sequence[ResultRow], metric: str, figures: Sequence[str], comparison: str) -> bool:
    """Whether both bounds stand behind the figures that they compare: a figure measured anew needs new ones.

    Args:
        rows: of one FP32 checkpoint, in the order of their file.
        metric: what is compared.
        figures: commands of the rows of both figures.
        comparison: command of the rows of the bounds.
    """
    last = {(row.command, row.metric): place for place, row in enumerate(rows)}
    measured = max(last.get((command, metric), -1) for command in figures)
    return all(last.get((comparison, metric + end), -1) > measured for end in BOUNDS)


class Measured(Protocol):
    """A run whose predictions are kept."""

    @property
    def work_dir(self) -> Path:
        """Where its predictions are."""

    @property
    def split(self) -> str:
        """What they are of."""

    @property
    def text(self) -> str:
        """The command of its rows."""


@dataclass(frozen=True)
class Comparison:
    """One run's figure against FP32's on the same images; see :meth:`compares` for the metrics that can be."""

    run: Measured
    fp32: Measured
    metric: str

    @staticmethod
    def compares(metric: str) -> bool:
        """Whether a metric can be had from predictions that runs keep."""
        return metric in PREDICTIONS

    @property
    def files(self) -> list[Path]:
        """Predictions of FP32 and of the run."""
        name, _ = PREDICTIONS[self.metric]
        return [run.work_dir / name for run in (self.fp32, self.run)]

    @property
    def missing(self) -> list[Path]:
        """Those of them that are not there."""
        return [file for file in self.files if not file.is_file()]

    @property
    def text(self) -> str:
        """The command as one line."""
        parts = ['python', TOOL, *map(str, self.files)]
        if iou_type := PREDICTIONS[self.metric][1]:
            parts += ['--annotations', f'${{GPLQ_DATA_ROOT}}/{self.run.split}.json', '--iou-type', iou_type]
        return ' '.join(parts)

    def rows(self, difference: Difference, fp32: ResultRow, row: ResultRow) -> list[ResultRow]:
        """The bounds of the interval as rows like `row`, the run's figure; `fp32` is FP32's.

        Raises:
            ResultError: the predictions give another figure, so they are of another run.
        """
        # mmdet prints three decimals of AP.
        for run, found, known in ((self.fp32, difference.first, fp32), (self.run, difference.second, row)):
            if abs(found - known.value) > 0.001:
                raise ResultError(
                    f'{run.work_dir}: its predictions give {self.metric} {found:.4f}, its row has {known.value:.4f}; '
                    'they are of two runs, so delete the folder and the row and measure again'
                )
        values = zip(BOUNDS, (difference.low, difference.high), strict=True)
        return [replace(row, metric=self.metric + end, value=value, command=self.text) for end, value in values]

    def measure(self, data_root: str) -> Difference:
        """Resample the images.

        Raises:
            ResultError: predictions are missing or of other images.
        """
        if self.missing:
            raise ResultError(f'{self.missing[0]} is missing: no predictions for {self.metric}')
        iou_type = PREDICTIONS[self.metric][1]
        if not iou_type:
            return compare_top1(*self.files)
        from gplq.plugins.detection.bootstrap import compare_detectors

        return compare_detectors(Path(data_root, f'{self.run.split}.json'), *self.files, iou_type)


def add_intervals(pairs: Sequence[Comparison], data_root: str, sha256: str, output: Path) -> None:
    """Add the rows of intervals that `output` has not; where predictions are gone it is said and none is added.

    Args:
        pairs: of runs whose own rows are there.
        data_root: where the data is.
        sha256: of the FP32 checkpoint; rows of another count for nothing.
        output: file of the rows.

    Raises:
        ResultError: predictions are of another run than the rows, or of other images.
    """
    rows = [row for row in rows_so_far(output) if row.checkpoint_sha256 == sha256]
    # Of a run's steps the last one's predictions are kept, and its row comes last.
    figures = {(row.command, row.metric): row for row in rows}
    waiting = [p for p in pairs if not has_interval(rows, p.metric, (p.fp32.text, p.run.text), p.text)]
    for pair in waiting:
        if pair.missing:
            print(f'no interval of {pair.metric}: {pair.missing[0]} is gone; delete its row to measure it again')
    waiting = [pair for pair in waiting if not pair.missing]
    if waiting:
        print(f'\n{len(waiting)} intervals')
    for pair in track_iter_progress(waiting) if waiting else ():
        known = (figures[run.text, pair.metric] for run in (pair.fp32, pair.run))
        for row in pair.rows(pair.measure(data_root), *known):
            append_row(output, row)

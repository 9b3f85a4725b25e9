"""How far a benchmark's run is from FP32, with the interval from resampled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gplq.plugins.benchmark import Run
from gplq.plugins.bootstrap import Difference, compare_top1
from gplq.plugins.results import BOUNDS, ResultError, ResultRow

__all__ = ['Comparison', 'has_interval']

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
        parts = ['python', TOOL, *map(str, self.files or [])]
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
        if self.files is None:
            raise ResultError(f'{self.fp32.work_dir} or {self.run.work_dir} holds no predictions for {self.metric}')
        iou_type = PREDICTIONS[self.metric][1]
        if not iou_type:
            return compare_top1(*self.files)
        from gplq.plugins.detection.bootstrap import compare_detectors

        return compare_detectors(Path(data_root, f'{self.run.split}.json'), *self.files, iou_type)

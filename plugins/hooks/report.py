"""One line a step in the log, and the same as data in the working directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from gplq.files import write_bytes_atomically
from gplq.plugins.hooks.model import model_of, part_of
from gplq.plugins.hooks.settings import HookSettings
from gplq.plugins.json_files import read_points
from gplq.plugins.results import peak_memory_mb
from gplq.record import Stage, is_prepared, record_of
from gplq.size import effective_bits, float_bytes, packed_model_bytes

__all__ = ['STEPS', 'Report', 'evaluate', 'minutes_up_to', 'numbers', 'read_steps']

STEPS = 'gplq.json'


def evaluate(runner: Runner) -> dict[str, float]:
    """Metrics of the model as it is, by the config's validation loop but none of its hooks.

    Hooks would take the figures of an intermediate step for those of the training: the best checkpoint, early
    stopping. Empty where the config validates nothing.
    """
    loop = runner.val_loop
    if loop is None:
        return {}
    # Not every loop gives back what it found, every one tells its hooks.
    listener = _Listener()
    hooks, runner._hooks = runner.hooks, [listener]
    try:
        loop.run()
    finally:
        runner._hooks = hooks
    return numbers(listener.metrics)


def numbers(metrics: dict[str, Any] | None) -> dict[str, float]:
    """What of an evaluator's results is a number."""
    return {name: float(value) for name, value in (metrics or {}).items() if isinstance(value, (int, float))}


class _Listener(Hook):
    def __init__(self) -> None:
        self.metrics: dict[str, Any] | None = None

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        self.metrics = metrics


class Report:
    """Collects the steps of a run; the file is rewritten after each."""

    def __init__(self, settings: HookSettings) -> None:
        self.settings = settings
        self.steps: list[dict[str, Any]] = []
        self._samples: int | None = None

    def resume(self, runner: Runner) -> None:
        """Go on with the steps that the interrupted run reported."""
        path = Path(runner.work_dir) / STEPS
        if path.is_file():
            self.steps = read_steps(path)

    def saw(self, loader: DataLoader, samples: int) -> None:
        """Note how many images calibration has read, of all ranks together: the first so many in a fixed order."""
        subset: Any = loader.dataset
        self._samples = max(self._samples or 0, min(samples, len(subset.dataset)))

    def add(self, runner: Runner, step: str, metrics: dict[str, float], minutes: float, **files: str) -> None:
        """Log a step and keep it.

        Minutes are those that the step took, calibration and PCA included, validation left out; the peak memory is the
        run's.
        """
        model = model_of(runner)
        size = _sizes(model, self.settings)
        shown = '  '.join(f'{name.rpartition("/")[2]} {value:.4f}' for name, value in metrics.items() if value >= 0)
        runner.logger.info(
            f'GPLQ {step}: {shown or "not validated"}  {size["backbone_bytes"] / 2**20:.2f} MiB backbone  '
            f'{size["model_bytes"] / 2**20:.2f} MiB model  {minutes:.1f} min'
        )
        runner.visualizer.add_scalars({f'gplq/{step}/{n}': v for n, v in metrics.items()}, step=runner.iter)
        cost = {'minutes': minutes, 'peak_memory_mb': peak_memory_mb()}
        # A run that was resumed behind the step measures it again.
        self.steps = [earlier for earlier in self.steps if earlier['step'] != step]
        seen = {
            'scope': 'backbone' if self.settings.inside_part else 'detector',
            'calibration_samples': self._samples,
        }
        self.steps.append({'step': step, 'metrics': metrics, **seen, **cost, **size, **files})
        if is_main_process():
            path = Path(runner.work_dir) / STEPS
            write_bytes_atomically(path, json.dumps(self.steps, indent=1).encode())


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The steps that a run noted, in their order.

    Raises:
        ResultError: the file cannot be read or is no such file.
    """
    return read_points(path, {'step': str, 'metrics': dict, 'minutes': float})


def minutes_up_to(steps: list[dict[str, Any]], name: str) -> float:
    """Minutes from the FP32 checkpoint to a step, those before it included."""
    names = [step['step'] for step in steps]
    return float(sum(step['minutes'] for step in steps[: names.index(name) + 1]))


def _sizes(model: nn.Module, settings: HookSettings) -> dict[str, Any]:
    part = part_of(model, settings)
    if not is_prepared(model) or record_of(model).stage is not Stage.QUANTIZED:
        return {'backbone_bytes': float_bytes(part), 'model_bytes': float_bytes(model), 'effective_bits': 32.0}
    return {
        'backbone_bytes': packed_model_bytes(model, part),
        'model_bytes': packed_model_bytes(model),
        'effective_bits': effective_bits(model),
    }

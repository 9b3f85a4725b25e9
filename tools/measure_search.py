"""Compare PTQ4ViT with FP32 passes over the images that its search reads: time in passes, and memory.

All of it is timed, from the FP32 model to the rounded one: calibration, the search and rounding. Passes come before and
behind it. Memory is what was allocated at the peak of the search from before it, and beside it what one forward and
backward pass of the same loss takes on a batch, which comes on top of the budget `search.memory_mb`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import Runner
from torch import nn

from gplq.objectives import fisher
from gplq.plugins.allocated import watch_allocated
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.plugins.hooks import ActivationQATHook
from gplq.plugins.hooks.model import is_classifier, task_loss, whole_forward
from gplq.plugins.results import ResultRow, append_figures, commit, file_sha256, repeat_command, versions
from gplq.plugins.without_hook import without_hook
from gplq.weight_stage import quantize_weights

EXAMPLE = """example:
  GPLQ_DATA_ROOT=data/objects100 python tools/measure_search.py configs/gplq_vit-mini_objects100.py \\
      --cfg-options load_from=fp32.pth"""

BITS = 6


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='a config with the two lines')
    add_run_arguments(parser)
    parser.add_argument('--passes', type=int, default=5, help='timed FP32 passes on either side (default: %(default)s)')
    parser.add_argument('--output', type=Path, default=Path('results/search.jsonl'), help='default: %(default)s')
    return parser.parse_args()


def forward_pass(model: nn.Module, batches: Sequence[Any]) -> None:
    with torch.no_grad():
        for batch in batches:
            whole_forward(model, batch)


def gradient_pass(model: nn.Module, batch: Any) -> None:
    """Loss and gradients as the search takes them, with nothing kept."""
    if is_classifier(model):
        loss = fisher(whole_forward(model, batch), torch.Generator().manual_seed(0))
    else:
        loss = task_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)


def seconds_of(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    args = parse_args()
    cfg = without_hook(read_config(args), args.config, 'measure_search')
    runner = Runner.from_cfg(cfg)
    runner.load_checkpoint(cfg.load_from)
    given = {key: value for key, value in cfg.gplq_settings.items() if key not in ('weight_bits', 'activation_bits')}
    hook = ActivationQATHook(
        **given | {'method': 'ptq4vit', 'weight_bits': BITS, 'activation_bits': BITS, 'iterations': 0}
    )
    settings = hook.settings
    floating = runner.model.eval()
    model = copy.deepcopy(floating)
    loader = hook.loader(runner, settings.search.images)
    batches = list(loader)
    images = len(loader.dataset)

    def passes() -> list[float]:
        return [seconds_of(lambda: forward_pass(floating, batches)) for _ in range(args.passes)]

    passes()
    before = passes()
    hook.prepare(runner, model)
    calibrating = seconds_of(lambda: hook.calibrate(runner, model))
    with watch_allocated() as allocated:
        searching = seconds_of(lambda: hook.search(runner, model))
    rounding = seconds_of(lambda: quantize_weights(model))
    a_pass = statistics.median(before + passes())
    with watch_allocated() as of_a_batch:
        gradient_pass(floating, batches[0])

    total = calibrating + searching + rounding
    figures = {'pass_seconds': a_pass, 'search_seconds': searching, 'passes': total / a_pass}
    if allocated.peak_mb is not None and of_a_batch.peak_mb is not None:
        figures |= {'search_mb': allocated.peak_mb, 'gradient_mb': of_a_batch.peak_mb}
    print(
        f'{images} images, search.memory_mb={settings.search.memory_mb:g}: '
        + ', '.join(f'{name} {value:.2f}' for name, value in figures.items())
    )
    append_figures(args.output, _row(args, str(cfg.load_from), images, total), figures)


def _row(args: argparse.Namespace, checkpoint: str, images: int, seconds: float) -> ResultRow:
    return ResultRow(
        benchmark='search',
        split='train',
        model=Path(args.config).stem.removeprefix('gplq_'),
        scope='backbone',
        checkpoint_sha256=file_sha256(checkpoint),
        method='ptq4vit',
        weight_bits=BITS,
        activation_bits=BITS,
        effective_bits=None,
        seed=0,
        metric='any',
        value=0.0,
        minutes=seconds / 60,
        peak_memory_mb=None,
        artifact_bytes=None,
        command=repeat_command(),
        commit=commit(),
        versions=versions(),
        calibration_samples=images,
    )


if __name__ == '__main__':
    exit_on_error(main)

"""Compare a step of the activation stage with a step of FP32 fine-tuning: time, interleaved, and peak memory.

Both take the same batch, optimizer and precision; FP32 keeps its fused attention. Memory is measured in a process of
its own for each: what the process held at its peak, and what was allocated from before the model was built;
teacher, PCA and calibration are in both.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from gplq.activation_stage import parameter_groups
from gplq.errors import GPLQError
from gplq.plugins.allocated import watch_allocated
from gplq.plugins.amp import computes_bfloat16
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.plugins.hooks import ActivationQATHook
from gplq.plugins.hooks.data_hook import check_batches
from gplq.plugins.hooks.loss_term import LossTerm
from gplq.plugins.hooks.settings import HookSettings
from gplq.plugins.hooks.teacher import make_mimicking
from gplq.plugins.paired_timing import WARM_UP, time_in_turn
from gplq.plugins.results import ResultRow, append_figures, commit, file_sha256, measure, repeat_command, versions
from gplq.plugins.without_hook import without_hook

EXAMPLE = """example:
  GPLQ_DATA_ROOT=data/nuclei python tools/measure_step.py configs/gplq_mask_rcnn_vit-tiny_nuclei.py \\
      --cfg-options load_from=nuclei_vit.pth"""

METHODS = ('fp32', 'gplq')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='a config with the two lines')
    add_run_arguments(parser)
    parser.add_argument('--steps', type=int, default=12, help='timed steps of each (default: %(default)s)')
    parser.add_argument('--output', type=Path, default=Path('results/step.jsonl'), help='default: %(default)s')
    parser.add_argument('--only', choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def step_of(cfg: Config, method: str) -> Iterator[Callable[[Any], None]]:
    """A function that carries out one step on a batch, its backbone in FP32 or calibrated to the hook's bits."""
    runner = Runner.from_cfg(cfg)
    runner.load_checkpoint(cfg.load_from)
    model = runner.model
    groups: list[dict[str, Any]] = [{'params': list(model.parameters())}]
    with ExitStack() as stack:
        if method == 'gplq':
            hook = ActivationQATHook(**cfg.gplq_settings)
            settings = hook.settings = _of_a_batch(hook.settings, cfg.train_dataloader.batch_size)
            hook.prepare(runner, model)
            if settings.stage.mimicking_weight:
                images = hook.loader(runner, settings.stage.pca_samples)
                mimicking = make_mimicking(runner, settings, images)
                stack.enter_context(mimicking.attached())
                model.register_forward_hook(LossTerm('loss_mimicking', lambda *_: mimicking()), with_kwargs=True)
            hook.calibrate(runner, model)
            groups = parameter_groups(model, settings.stage, settings.iterations)
        wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
        wrapper.optimizer = torch.optim.AdamW(groups, lr=5e-6)
        wrapper.initialize_count_status(model, 0, 10**6)

        def step(batch: Any) -> None:
            model.train()
            model.train_step(copy.deepcopy(batch), wrapper)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        yield step


def _of_a_batch(settings: HookSettings, images: int) -> HookSettings:
    """With so many images for calibration and PCA, whose memory grows with a batch and hardly with their number."""
    recipe = replace(settings.recipe, calibration_samples=images)
    return replace(settings, recipe=recipe, stage=replace(settings.stage, pca_samples=images))


def batches(cfg: Config, count: int) -> list[Any]:
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    loader = Runner.build_dataloader(copy.deepcopy(cfg.train_dataloader), seed=0)
    check_batches(loader)
    # A small data set gives fewer in an epoch.
    return list(islice(chain.from_iterable(repeat(loader)), count))


def peak_memory(cfg: Config, method: str) -> tuple[float, float | None]:
    """Peak of what comes before the first step and of three steps, in MB: what the process held, and had allocated."""
    data = batches(cfg, 3)
    with measure() as cost, watch_allocated() as allocated, step_of(cfg, method) as step:
        for batch in data:
            step(batch)
    return float(cost.peak_memory_mb), allocated.peak_mb


def precision(cfg: Config) -> str:
    """In which dtype the config trains."""
    kind = str(cfg.optim_wrapper.get('type', 'OptimWrapper'))
    if 'BFloat16' in kind:
        emulates = cfg.optim_wrapper.get('emulate', False)
        return 'bfloat16' if emulates or computes_bfloat16(get_device()) else 'float32'
    return str(cfg.optim_wrapper.get('dtype') or 'float16') if 'Amp' in kind else 'float32'


def main() -> None:
    args = parse_args()
    cfg = without_hook(read_config(args), args.config, 'measure_step')
    if args.only:
        print('PEAK ' + json.dumps(peak_memory(cfg, args.only)))
        return
    peaks: dict[str, tuple[float, float | None]] = {}
    for method in METHODS:
        command = [sys.executable, *sys.argv, '--only', method]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise GPLQError(f'{shlex.join(command)} failed: {(done.stderr.splitlines() or ["it said nothing"])[-1]}')
        peaks[method] = json.loads(done.stdout.rsplit('PEAK ', 1)[1])
    data = batches(cfg, args.steps + WARM_UP)
    with step_of(cfg, 'fp32') as floating, step_of(cfg, 'gplq') as quantized:
        seconds = time_in_turn({'fp32': floating, 'gplq': quantized}, data)
    ratios = [b / a for a, b in zip(seconds['fp32'], seconds['gplq'], strict=True)]
    for method in METHODS:
        process, allocated = peaks[method]
        figures = {
            'step_seconds': statistics.median(seconds[method]),
            'step_ratio': statistics.median(ratios) if method == 'gplq' else 1.0,
            'process_ratio': process / peaks['fp32'][0],
        }
        if allocated is not None and peaks['fp32'][1] is not None:
            figures |= {'allocated_mb': allocated, 'allocated_ratio': allocated / peaks['fp32'][1]}
        print(f'{method}: ' + ', '.join(f'{name} {value:.2f}' for name, value in figures.items()))
        append_figures(args.output, _row(args, cfg, method, process), figures)
    print(f'ratios of time range from {min(ratios):.2f} to {max(ratios):.2f}')


def _row(args: argparse.Namespace, cfg: Config, method: str, process: float) -> ResultRow:
    return ResultRow(
        benchmark='step',
        split='train',
        model=Path(args.config).stem.removeprefix('gplq_'),
        scope='backbone',
        checkpoint_sha256=file_sha256(cfg.load_from),
        method=method,
        weight_bits=32,
        activation_bits=int(cfg.gplq_settings.get('activation_bits', 4)) if method == 'gplq' else 32,
        effective_bits=None,
        seed=0,
        metric='any',
        value=0.0,
        minutes=None,
        peak_memory_mb=process,
        artifact_bytes=None,
        command=repeat_command(),
        commit=commit(),
        versions=versions(),
        variant=precision(cfg),
    )


if __name__ == '__main__':
    exit_on_error(main)

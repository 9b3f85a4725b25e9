"""Train what a config describes: an FP32 model, or GPLQ's two stages by the hook in the config."""

from __future__ import annotations

import argparse

import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from gplq.errors import GPLQError
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.plugins.hooks.data_hook import DataHook
from gplq.plugins.hooks.restore_hook import RestoreHook
from gplq.plugins.preflight import preflight

EXAMPLE = """example:
  python tools/train.py configs/mask_rcnn_vit-tiny_nuclei.py --cfg-options data_root=PATH"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    add_run_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='mixed precision; bfloat16 where there is no GPU')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale learning rates with the batch')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint, or from the last one in the working directory',
    )
    return parser.parse_args()


def use_mixed_precision(cfg: Config) -> None:
    # Those of another kind of mixed precision; neither scales or casts in the same way.
    for option in ('dtype', 'loss_scale'):
        cfg.optim_wrapper.pop(option, None)
    if torch.cuda.is_available():
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    else:
        cfg.optim_wrapper.type = 'gplq.plugins.amp.BFloat16OptimWrapper'


def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    if args.amp:
        use_mixed_precision(cfg)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise GPLQError(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size to scale from')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    preflight(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(DataHook())
    runner.register_hook(RestoreHook())
    runner.train()


if __name__ == '__main__':
    exit_on_error(main)

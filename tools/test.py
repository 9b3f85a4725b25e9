"""Measure a checkpoint, FP32 or quantized, on the test data of a config."""

from __future__ import annotations

import argparse

from mmengine.config import Config
from mmengine.evaluator import DumpResults
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from gplq.errors import GPLQError
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.plugins.hooks.restore_hook import RestoreHook
from gplq.plugins.preflight import preflight

EXAMPLE = 'example: python tools/test.py configs/mask_rcnn_vit-tiny_nuclei.py nuclei.pth --show-dir pictures'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    add_run_arguments(parser)
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='folder under the working directory for drawn predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a window stays (default: 2)')
    return parser.parse_args()


def draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise GPLQError(f'--show and --show-dir need default_hooks.visualization, which {args.config} has not')
    hook.draw = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    if args.show_dir:
        hook.test_out_dir = args.show_dir


def dump(cfg: Config, path: str) -> DumpResults:
    if cfg.get('default_scope') == 'mmdet':
        # Masks need a packing that mmengine's own class does not know.
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults(out_file_path=path)
    return DumpResults(out_file_path=path)


def main() -> None:
    args = parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise GPLQError(f'--out {args.out}: predictions are pickled, so the name must end in .pkl or .pickle')
    cfg = read_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    preflight(cfg, splits=('test',))
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(RestoreHook())
    if args.out:
        runner.test_evaluator.metrics.append(dump(cfg, args.out))
    runner.test()


if __name__ == '__main__':
    exit_on_error(main)

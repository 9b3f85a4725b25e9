"""Measure a checkpoint, FP32 or quantized, on the test data of a config."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.evaluator import DumpResults
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from gplq.errors import GPLQError
from gplq.files import check_writable
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.plugins.hooks.data_hook import DataHook
from gplq.plugins.hooks.model import model_of
from gplq.plugins.hooks.restore_hook import RestoreHook
from gplq.plugins.preflight import preflight
from gplq.plugins.results import ResultRow, append_row, commit, file_sha256, repeat_command, versions
from gplq.record import is_prepared
from gplq.size import float_bytes

# What rows are made of where nothing is said: a detector's figure or a classifier's.
MAIN = ['bbox_mAP', 'top1']

EXAMPLE = """example:
  python tools/test.py configs/mask_rcnn_vit-tiny_nuclei.py nuclei.pth --show-dir pictures"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    add_run_arguments(parser)
    parser.add_argument('--out', metavar='FILE.pkl', help='write the predictions')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='folder under the working directory for drawn predictions')
    parser.add_argument('--rows', metavar='FILE.jsonl', help='append a row of results for each of --metrics, if FP32')
    parser.add_argument('--benchmark', default='', help='name in these rows')
    parser.add_argument('--split', default='test', help='in these rows (default: test)')
    parser.add_argument('--metrics', nargs='+', help='in these rows (default: bbox_mAP, of classifiers top1)')
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


def write_rows(args: argparse.Namespace, runner: Runner, found: dict[str, float]) -> None:
    """Rows of an FP32 model, such as another architecture to compare with."""
    model = model_of(runner)
    if is_prepared(model):
        raise GPLQError(f'--rows: {args.checkpoint} is quantized; tools/benchmark.py measures such models')
    values = {name.rpartition('/')[2]: value for name, value in found.items()}
    for metric in args.metrics or [name for name in MAIN if name in values] or MAIN[:1]:
        if metric not in values:
            raise GPLQError(f'--metrics {metric}: the evaluator gives {sorted(values)}')
        row = ResultRow(
            benchmark=args.benchmark,
            split=args.split,
            model=Path(args.config).stem.removesuffix(f'_{args.benchmark}'),
            scope='backbone',
            checkpoint_sha256=file_sha256(args.checkpoint),
            method='fp32',
            weight_bits=32,
            activation_bits=32,
            effective_bits=32.0,
            seed=0,
            metric=metric,
            value=float(values[metric]),
            minutes=None,
            peak_memory_mb=None,
            artifact_bytes=float_bytes(model),
            command=repeat_command(),
            commit=commit(),
            versions=versions(),
        )
        append_row(args.rows, row)


def main() -> None:
    args = parse_args()
    if args.rows and not args.benchmark:
        raise GPLQError('--rows needs --benchmark NAME')
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise GPLQError(f'--out {args.out}: predictions are pickled, so the name must end in .pkl or .pickle')
    for path in filter(None, (args.out, args.rows)):
        check_writable(path)
    cfg = read_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    if cfg.get('train_dataloader') is None:
        # mmengine wants all of these or none; what is only measured needs none.
        cfg.train_cfg = cfg.optim_wrapper = cfg.param_scheduler = None
    preflight(cfg, splits=('test',))
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(DataHook())
    runner.register_hook(RestoreHook())
    if args.out:
        runner.test_evaluator.metrics.append(dump(cfg, args.out))
    found = runner.test()
    if args.rows and is_main_process():
        write_rows(args, runner, found)


if __name__ == '__main__':
    exit_on_error(main)

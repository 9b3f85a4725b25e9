"""Measure GPLQ on one model: FP32, FP32 control, round-to-nearest and GPLQ over bits, seeds and variants.

Every run is one call of tools/train.py, printed and kept in its row. A run whose rows are in the output already is
not made again, so the program can be stopped and started at will. Where FP32 is among the methods, each run's
difference from it gets a 95 % interval from resampled images, as tools/bootstrap.py gives it. Settings are chosen on
--split dev; --split test is read once, for the table.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from gplq.plugins.benchmark import METHODS, ROW, VARIANTS, bits_of, plan_runs
from gplq.plugins.campaign import carry_out, metrics_of, task_of
from gplq.plugins.command_line import exit_on_error

EXAMPLE = """example:
  GPLQ_DATA_ROOT=data/bccd python tools/benchmark.py configs/gplq_faster_rcnn_vit-tiny_bccd.py bccd_vit.pth \\
      --benchmark bccd --metrics bbox_mAP --bits 4 3 --seeds 0 1 2"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='a config with the two lines')
    parser.add_argument('checkpoint', help='its FP32 model')
    parser.add_argument('--benchmark', required=True, help='name in the rows')
    parser.add_argument('--metrics', nargs='+', help='default: bbox_mAP, or top1 for classifiers')
    parser.add_argument(
        '--bits', nargs='+', default=['4', '3'], help='of weights and activations, or such as W3A4 (default: 4 3)'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='default: 0')
    parser.add_argument(
        '--methods',
        nargs='+',
        choices=METHODS,
        default=list(ROW),
        metavar='METHOD',
        help=f'{_choices(METHODS)} (default: {" ".join(ROW)})',
    )
    parser.add_argument(
        '--variants',
        nargs='+',
        choices=VARIANTS,
        default=[''],
        metavar='VARIANT',
        help=f"{_choices(VARIANTS)}; '' is the hook as it is (default: '')",
    )
    parser.add_argument('--split', choices=('dev', 'test'), default='dev', help='default: dev')
    parser.add_argument('--output', type=Path, help='default: results/BENCHMARK.jsonl; for dev, in --work-dir')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/BENCHMARK')
    parser.add_argument('--options', nargs='+', default=[], metavar='KEY=VALUE', help='for every run')
    return parser.parse_args()


def _choices(names: Iterable[str]) -> str:
    # argparse formats help texts with %.
    return ', '.join(repr(name) if ' ' in name else name for name in names if name).replace('%', '%%')


def main() -> None:
    args = parse_args()
    data_root = os.environ.get('GPLQ_DATA_ROOT')
    if not data_root:
        sys.exit('error: say where the data is: GPLQ_DATA_ROOT=PATH')
    work = args.work_dir or Path('work_dirs', args.benchmark)
    output = args.output or (Path('results') if args.split == 'test' else work) / f'{args.benchmark}.jsonl'
    if wrong := [option for option in args.options if '=' not in option]:
        sys.exit(f'error: --options wants KEY=VALUE, got {wrong[0]}')
    task = task_of(args.config)
    runs = plan_runs(
        args.benchmark,
        args.config,
        args.checkpoint,
        args.split,
        args.methods,
        [bits_of(text) for text in args.bits],
        args.seeds,
        args.variants,
        dict(option.split('=', 1) for option in args.options),
        work,
        task,
    )
    carry_out(list(runs), args.metrics or metrics_of(task), data_root, output)


if __name__ == '__main__':
    exit_on_error(main)

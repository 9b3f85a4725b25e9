"""Compare two models on the same images, with a 95 % interval of the difference from resampled images.

The files of predictions are what a run writes with `--cfg-options val_evaluator.outfile_prefix=PREFIX` (detectors) or
`val_evaluator.outfile=FILE` (classifiers), and what tools/benchmark.py leaves in the folder of each run.
"""

from __future__ import annotations

import argparse

from mmengine.utils import track_iter_progress

from gplq.plugins.bootstrap import compare_top1
from gplq.plugins.command_line import exit_on_error

EXAMPLE = """example:
  python tools/bootstrap.py fp32/predictions.json w4a4/predictions.json
  python tools/bootstrap.py fp32.segm.json w4a4.segm.json --annotations shapes/annotations/val.json --iou-type segm"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('first', help='predictions to compare with')
    parser.add_argument('second', help='predictions to be compared')
    parser.add_argument('--annotations', help="of detectors: the truth, in COCO's format")
    parser.add_argument('--iou-type', choices=('bbox', 'segm'), default='bbox', help='default: %(default)s')
    parser.add_argument('--samples', type=int, default=1000, help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    common = dict(samples=args.samples, seed=args.seed, progress=track_iter_progress)
    if args.annotations is None:
        name, digits = 'top-1', 2
        result = compare_top1(args.first, args.second, **common)
    else:
        from gplq.plugins.detection.bootstrap import compare_detectors

        name, digits = 'AP', 4
        result = compare_detectors(args.annotations, args.first, args.second, args.iou_type, **common)
    first, second = f'{result.first:.{digits}f}', f'{result.second:.{digits}f}'
    low, middle, high = (f'{value:+.{digits}f}' for value in (result.low, result.difference, result.high))
    print(
        f'\n{name} {first} -> {second}, difference {middle}, 95 % between {low} and {high} ({result.samples} samples)'
    )


if __name__ == '__main__':
    exit_on_error(main)

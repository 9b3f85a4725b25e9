"""Compare two detectors' AP on the same images, with a 95 % interval from resampled images.

The prediction files are what `tools/test.py … --cfg-options test_evaluator.outfile_prefix=PREFIX` writes.
"""

from __future__ import annotations

import argparse

from mmengine.utils import track_iter_progress

from gplq.plugins.detection.bootstrap import paired_bootstrap

EXAMPLE = """example:
  python tools/bootstrap.py shapes/annotations/val.json fp32.bbox.json w4a4.bbox.json
  python tools/bootstrap.py shapes/annotations/val.json fp32.segm.json w4a4.segm.json --iou-type segm"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('annotations', help="the truth, in COCO's format")
    parser.add_argument('first', help='predictions to compare with')
    parser.add_argument('second', help='predictions to be compared')
    parser.add_argument('--iou-type', choices=('bbox', 'segm'), default='bbox', help='default: %(default)s')
    parser.add_argument('--samples', type=int, default=1000, help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    result = paired_bootstrap(**vars(args), progress=track_iter_progress)
    print(
        f'\nAP {result.first:.4f} -> {result.second:.4f}, difference {result.difference:+.4f}, '
        f'95 % between {result.low:+.4f} and {result.high:+.4f} ({result.samples} samples)'
    )


if __name__ == '__main__':
    main()

"""Measure GPLQ on one model: FP32, FP32 control, round-to-nearest and GPLQ over bits, seeds and variants.

Every run is one call of tools/train.py, printed and kept in its row. A run whose rows are in the output already is
not made again, so the program can be stopped and started at will. Where FP32 is among the methods, each run's
difference from it gets a 95 % interval from resampled images, as tools/bootstrap.py gives it. Settings are chosen on
--split dev; --split test is read once, for the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from gplq.plugins.campaign import carry_out, raise_failures
from gplq.plugins.campaign_arguments import add_campaign_arguments, request_of
from gplq.plugins.command_line import exit_on_error
from gplq.plugins.methods import METHODS, ROW, VARIANTS, variants_of

EXAMPLE = """example:
  GPLQ_DATA_ROOT=data/bccd python tools/benchmark.py configs/gplq_faster_rcnn_vit-tiny_bccd.py bccd_vit.pth \\
      --benchmark bccd --metrics bbox_mAP --bits 4 3 --seeds 0 1 2"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_campaign_arguments(parser, bits=('4', '3'))
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
        help=f"{_choices(VARIANTS)}; '' is the hook as it is (default: ''); "
        f"{_choices(variants_of('ptq4vit', [*VARIANTS]))} are PTQ4ViT's, the others GPLQ's",
    )
    parser.add_argument('--curves', type=Path, help='also keep rows of the validations during each run, in this file')
    return parser.parse_args()


def _choices(names: Iterable[str]) -> str:
    # argparse formats help texts with %.
    return ', '.join(repr(name) if ' ' in name else name for name in names if name).replace('%', '%%')


def main() -> None:
    args = parse_args()
    request = request_of(args)
    runs = request.runs(args.methods, args.variants)
    raise_failures(carry_out(runs, request.metrics, request.data_root, request.output, args.curves))


if __name__ == '__main__':
    exit_on_error(main)

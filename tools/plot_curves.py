"""Draw accuracy, and oscillating weights, against minutes of training; print who gets where by when.

FILES are rows that tools/benchmark.py --curves keeps, and its own rows for methods without validations on the way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gplq.plugins.command_line import exit_on_error
from gplq.plugins.curves import courses_of, draw, table
from gplq.plugins.results import ResultError, read_rows

EXAMPLE = """example:
  python tools/plot_curves.py results/curves.jsonl --metrics top1 oscillating --reference gplq --output curves.png"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('files', nargs='+', type=Path, metavar='FILES')
    parser.add_argument(
        '--metrics', nargs='+', default=['top1'], help='a panel each, the table is of the first (default: top1)'
    )
    parser.add_argument('--reference', default='gplq', help='whose minutes and figure others are asked for')
    parser.add_argument('--model', help='where FILES hold several')
    parser.add_argument('--split', help='likewise')
    parser.add_argument('--bits', nargs='+', help='such as W2A2 (default: all)')
    parser.add_argument('--output', type=Path, default=Path('curves.png'), help='default: curves.png')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    missing = [str(path) for path in args.files if not path.is_file()]
    if missing:
        raise ResultError(f'{", ".join(missing)}: no such file; tools/benchmark.py --curves writes one')
    wanted = {name: value for name in ('model', 'split') if (value := getattr(args, name))}
    files = [
        [row for row in read_rows(path) if all(getattr(row, name) == value for name, value in wanted.items())]
        for path in args.files
    ]
    panels = []
    for metric in args.metrics:
        courses = [course for course in courses_of(files, metric) if not args.bits or course.bits in args.bits]
        if not courses:
            raise ResultError(f'--bits {" ".join(args.bits)}: no rows of {metric} have them')
        panels.append((metric, courses))
    draw(panels, args.output)
    # Of the first; fewer oscillating weights are nothing to be reached.
    print(table(panels[0][1], args.reference), end='')
    print(f'\nplot: {args.output}')


if __name__ == '__main__':
    exit_on_error(main)

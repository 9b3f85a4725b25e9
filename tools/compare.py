"""Which method for my model? Measure methods and bits on one checkpoint, as a table, a CSV file and a plot.

Every run is one call of tools/train.py, printed and kept in its row; what has been measured is not measured again, so
the program can be stopped and started at will. GPLQ trains once for each number of activation bits and rounds the
weights from there. `--stages` gives it other ways of rounding them. Settings are chosen on --split dev; --split test
is read once, for the table.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gplq.files import write_bytes_atomically
from gplq.plugins.benchmark import METHODS, bits_of, plan_runs
from gplq.plugins.campaign import carry_out, metrics_of, task_of
from gplq.plugins.command_line import exit_on_error
from gplq.plugins.matrix import plot, rows_of_runs, settings_of, write_csv
from gplq.plugins.results import ResultError, file_sha256, read_rows
from gplq.plugins.tables import render_table

EXAMPLE = """example:
  GPLQ_DATA_ROOT=data/objects100 python tools/compare.py configs/gplq_vit-mini_objects100.py fp32.pth \\
      --methods rtn ptq4vit gptq gplq --bits W8A8 W4A4 W3A4 --seeds 0 1 2"""

DEFAULT = ('rtn', 'ptq4vit', 'repq_vit', 'gptq', 'qwt', 'erq', 'reconstruct', 'gplq')
STAGES = ('', 'nearest', 'reconstruct', 'qwt', 'ridge', 'affine', 'erq', "paper's weights")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='a config with the two lines')
    parser.add_argument('checkpoint', help='its FP32 model')
    parser.add_argument(
        '--methods',
        nargs='+',
        choices=METHODS,
        default=list(DEFAULT),
        metavar='METHOD',
        help=f'{", ".join(METHODS)} (default: {" ".join(DEFAULT)}); fp32 is always among them',
    )
    parser.add_argument(
        '--bits', nargs='+', default=['W8A8', 'W6A6', 'W4A4'], help='such as 4 or W3A4 (default: W8A8 W6A6 W4A4)'
    )
    parser.add_argument(
        '--stages', nargs='+', choices=STAGES, default=[''], metavar='STAGE', help=f"GPLQ's second stage: {STAGES}"
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='default: 0')
    parser.add_argument('--benchmark', help='name in the rows and of the files (default: the name of CONFIG)')
    parser.add_argument('--metrics', nargs='+', help='default: bbox_mAP, or top1 for classifiers')
    parser.add_argument('--split', choices=('dev', 'test'), default='dev', help='default: dev')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/BENCHMARK')
    parser.add_argument('--output', type=Path, help='rows; default: results/BENCHMARK.jsonl; for dev, in --work-dir')
    parser.add_argument('--options', nargs='+', default=[], metavar='KEY=VALUE', help='for every run')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    data_root = os.environ.get('GPLQ_DATA_ROOT')
    if not data_root:
        raise ResultError('say where the data is: GPLQ_DATA_ROOT=PATH')
    if wrong := [option for option in args.options if '=' not in option]:
        raise ResultError(f'--options wants KEY=VALUE, got {wrong[0]}')
    options = dict(option.split('=', 1) for option in args.options)
    name = args.benchmark or Path(args.config).stem.removeprefix('gplq_')
    work = args.work_dir or Path('work_dirs', name)
    output = args.output or (Path('results') if args.split == 'test' else work) / f'{name}.jsonl'
    task = task_of(args.config)
    metrics = args.metrics or metrics_of(task)
    methods = ['fp32', *(method for method in args.methods if method != 'fp32')]
    told = {method: settings_of(args.config, method, options) for method in methods if method != 'fp32'}
    settings = '\n'.join(f'- `{method}`: {_shown(values)}' for method, values in told.items())
    bits = [bits_of(text) for text in args.bits]
    plan = (name, args.config, args.checkpoint, args.split, methods, bits, args.seeds, args.stages, options, work, task)
    runs = list(plan_runs(*plan))
    print(f'Where the methods differ from the defaults:\n{settings}\n')
    carry_out(runs, metrics, data_root, output)

    rows = rows_of_runs(runs, read_rows(output), file_sha256(args.checkpoint))
    columns = ('interval', 'minutes', 'peak_memory_mb', 'calibration_samples', 'effective_bits', 'artifact_bytes')
    table = render_table(rows, metrics, columns)
    page = f'# {name}, {args.split}\n\n{table}\nWhere the methods differ from the defaults:\n\n{settings}\n'
    write_bytes_atomically(work / f'compare_{args.split}.md', page.encode())
    write_bytes_atomically(work / f'compare_{args.split}.csv', write_csv(rows, metrics).encode())
    plot(rows, metrics[0], work / f'compare_{args.split}.png')
    print(f'\n{table}\n{work}/compare_{args.split}.md, .csv and .png')


def _shown(values: dict[str, object]) -> str:
    return ', '.join(f'`{name}={value}`' for name, value in values.items()) or 'the defaults'


if __name__ == '__main__':
    exit_on_error(main)

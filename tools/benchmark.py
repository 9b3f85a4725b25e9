"""Measure GPLQ on one model: FP32, FP32 control, round-to-nearest and GPLQ over bits, seeds and variants.

Every run is one call of tools/train.py, printed and kept in its row. A run whose rows are in the output already is
not made again, so the program can be stopped and started at will. Where FP32 is among the methods, each run's
difference from it gets a 95 % interval from resampled images, as tools/bootstrap.py gives it. Settings are chosen on
--split dev; --split test is read once, for the table.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from mmengine.config import Config
from mmengine.utils import track_iter_progress

from gplq.plugins.benchmark import METHODS, ROW, VARIANTS, Run, plan_runs, rows_of
from gplq.plugins.command_line import exit_on_error
from gplq.plugins.comparison import Comparison
from gplq.plugins.results import ResultError, append_row, file_sha256, read_rows

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
    parser.add_argument('--bits', nargs='+', type=int, default=[4, 3], help='default: 4 3')
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


def task_of(config: str) -> str:
    """Classification where the data set has splits by name, else detection."""
    if not Path(config).is_file():
        raise ResultError(f'config {config} does not exist')
    loader = Config.fromfile(config).get('val_dataloader')
    if not loader:
        raise ResultError(f'{config} has no val_dataloader, on whose data the figures are measured')
    data = loader.dataset
    return 'classification' if 'split' in data else 'detection'


def carry_out(run: Run, data_root: str) -> None:
    run.work_dir.mkdir(parents=True, exist_ok=True)
    with open(run.work_dir / 'log.txt', 'w') as log:
        done = subprocess.run(run.arguments(data_root), stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        reasons = re.findall(r'^(?:error: .*|\w*Error: .*)', (run.work_dir / 'log.txt').read_text(), re.MULTILINE)
        sys.exit(f'failed: {reasons[-1] if reasons else "no reason given"}\nsee {run.work_dir / "log.txt"}')


def add_intervals(runs: list[Run], metrics: list[str], data_root: str, sha256: str, output: Path) -> None:
    """Compare each run's predictions with FP32's, unless its rows are there."""
    references = [run for run in runs if run.method == 'fp32']
    if not references:
        return
    pairs = [Comparison(run, references[0], metric) for run in runs if run.method != 'fp32' for metric in metrics]
    pairs = [pair for pair in pairs if pair.files is not None]
    rows = [row for row in read_rows(output) if row.checkpoint_sha256 == sha256]
    done = {row.command for row in rows}
    figures = {(row.command, row.metric, row.weight_bits): row for row in rows}
    waiting = [pair for pair in pairs if pair.text not in done]
    if waiting:
        print(f'\n{len(waiting)} intervals')
    for pair in track_iter_progress(waiting) if waiting else ():
        _, weight_bits, _ = pair.run.bits_of_rows[-1]
        known = figures[pair.fp32.text, pair.metric, 32], figures[pair.run.text, pair.metric, weight_bits]
        for row in pair.rows(pair.measure(data_root), *known):
            append_row(output, row)


def main() -> None:
    args = parse_args()
    data_root = os.environ.get('GPLQ_DATA_ROOT')
    if not data_root:
        sys.exit('error: say where the data is: GPLQ_DATA_ROOT=PATH')
    work = args.work_dir or Path('work_dirs', args.benchmark)
    output = args.output or (Path('results') if args.split == 'test' else work) / f'{args.benchmark}.jsonl'
    if wrong := [option for option in args.options if '=' not in option]:
        sys.exit(f'error: --options wants KEY=VALUE, got {wrong[0]}')
    if not Path(args.checkpoint).is_file():
        sys.exit(f'error: checkpoint {args.checkpoint} does not exist')
    options = dict(option.split('=', 1) for option in args.options)
    task = task_of(args.config)
    metrics = args.metrics or ['bbox_mAP' if task == 'detection' else 'top1']
    runs = list(
        plan_runs(
            args.benchmark,
            args.config,
            args.checkpoint,
            args.split,
            args.methods,
            args.bits,
            args.seeds,
            args.variants,
            options,
            work,
            task,
        )
    )
    sha256 = file_sha256(args.checkpoint)
    known = read_rows(output) if output.is_file() else []
    waiting = [run for run in runs if not run.is_done(metrics, sha256, known)]
    print(f'{len(runs)} runs, {len(runs) - len(waiting)} of them done already; rows: {output}')
    start = time.perf_counter()
    for number, run in enumerate(waiting, start=1):
        print(f'\n[{number}/{len(waiting)}] {run.text}', flush=True)
        carry_out(run, data_root)
        model = Path(args.config).stem.removeprefix('gplq_').removesuffix(f'_{args.benchmark}')
        for row in rows_of(run, metrics, model):
            append_row(output, row)
            print(f'W{row.weight_bits}A{row.activation_bits} {row.metric} {row.value:.4f}')
        left = (time.perf_counter() - start) / number * (len(waiting) - number) / 60
        print(f'{left:.0f} minutes left', flush=True)
    add_intervals(runs, metrics, data_root, sha256, output)


if __name__ == '__main__':
    exit_on_error(main)

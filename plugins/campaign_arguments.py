"""What the command lines of benchmark programs have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from gplq.plugins.benchmark import Bits, Run, bits_of, plan_runs
from gplq.plugins.campaign import check_variants, metrics_of, read, task_of
from gplq.plugins.results import ResultError, rows_file

__all__ = ['Request', 'add_campaign_arguments', 'request_of']


@dataclass(frozen=True)
class Request:
    """One model's benchmark: on which data, with which metrics, and where its rows and files go."""

    name: str
    config: str
    cfg: Config
    checkpoint: str
    split: str
    bits: Sequence[Bits]
    seeds: Sequence[int]
    options: dict[str, str]
    data_root: str
    task: str
    metrics: Sequence[str]
    work_dir: Path
    output: Path
    model: str = ''

    def runs(self, methods: Sequence[str], variants: Sequence[str]) -> list[Run]:
        """Its runs of these methods, as :func:`gplq.plugins.benchmark.plan_runs` says.

        Raises:
            ResultError: a variant changes nothing, or an option is none.
        """
        check_variants(self.cfg, self.config, methods, variants, self.options)
        return list(
            plan_runs(
                self.name,
                self.config,
                self.checkpoint,
                self.split,
                methods,
                self.bits,
                self.seeds,
                variants,
                self.options,
                self.work_dir,
                self.task,
                self.model,
            )
        )


def add_campaign_arguments(parser: argparse.ArgumentParser, bits: Sequence[str]) -> None:
    """Arguments for :func:`request_of`; ``bits`` are those that are measured where nothing is said."""
    parser.add_argument('config', help='a config with the two lines')
    parser.add_argument('checkpoint', help='its FP32 model')
    parser.add_argument('--benchmark', help='name in the rows and of the files (default: the name of CONFIG)')
    parser.add_argument('--model', default='', help='its name in the rows (default: from the name of CONFIG)')
    parser.add_argument('--metrics', nargs='+', help='default: bbox_mAP, or top1 for classifiers')
    parser.add_argument(
        '--bits',
        nargs='+',
        default=list(bits),
        help=f'of weights and activations, such as 4 or W3A4 (default: {" ".join(bits)})',
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='default: 0')
    parser.add_argument('--split', choices=('dev', 'test'), default='dev', help='default: dev')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/BENCHMARK')
    parser.add_argument('--output', type=Path, help='rows; default: results/BENCHMARK.jsonl; for dev, in --work-dir')
    parser.add_argument('--options', nargs='+', default=[], metavar='KEY=VALUE', help='for every run')


def request_of(args: argparse.Namespace) -> Request:
    """The command line's request.

    Raises:
        ResultError: nothing says where the data is, an option or a number of bits cannot be read, or the config cannot.
    """
    data_root = os.environ.get('GPLQ_DATA_ROOT')
    if not data_root:
        raise ResultError('say where the data is: GPLQ_DATA_ROOT=PATH')
    if wrong := [option for option in args.options if '=' not in option]:
        raise ResultError(f'--options wants KEY=VALUE, got {wrong[0]}')
    name = args.benchmark or Path(args.config).stem.removeprefix('gplq_')
    work_dir = args.work_dir or Path('work_dirs', name)
    cfg = read(args.config)
    task = task_of(cfg, args.config)
    return Request(
        name=name,
        config=args.config,
        cfg=cfg,
        checkpoint=args.checkpoint,
        split=args.split,
        bits=[bits_of(text) for text in args.bits],
        seeds=args.seeds,
        options=dict(option.split('=', 1) for option in args.options),
        data_root=data_root,
        task=task,
        metrics=args.metrics or metrics_of(task),
        work_dir=work_dir,
        model=args.model,
        output=rows_file(args.output, args.split, work_dir, name),
    )

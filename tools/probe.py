"""Linear probes of a backbone in FP32 and quantized: how good are its features for other classes?

A head is trained on each frozen backbone by tools/train.py and the config of a probe. A probe whose row is in the
output already is not made again, so the program can be stopped and started at will; another backbone in a file of the
same name is measured anew. The difference of each from FP32's probe with the same seed gets a 95 % interval from
resampled images, as tools/bootstrap.py gives it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.registry import init_default_scope

from gplq.plugins.command_line import exit_on_error
from gplq.plugins.fgvc.probe import plan_probes, probe
from gplq.plugins.results import ResultError, rows_file

EXAMPLE = """example:
  GPLQ_DATA_ROOT=data/animals24 python tools/probe.py configs/probe_swin-mini_animals24.py \\
      checkpoints/swin_objects100.safetensors --benchmark animals24_probe --model swin --seeds 0 1 2 --split test \\
      --backbones 'gplq=work_dirs/objects100_swin/test/gplq_w4_s{seed}/gplq_w4a4.safetensors'"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='of a TimmClassifier with frozen=True')
    parser.add_argument('fp32', help='weights of the FP32 backbone, as init_cfg takes them')
    parser.add_argument(
        '--backbones',
        nargs='+',
        action='extend',
        required=True,
        metavar='METHOD=FILE',
        help='what quantized a backbone, and the file that gplq.save wrote of it; {seed} stands for the seed',
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='default: 0')
    parser.add_argument('--split', choices=('dev', 'test'), default='dev', help='default: dev')
    parser.add_argument('--benchmark', help='name in the rows and of the files (default: the name of CONFIG)')
    parser.add_argument('--model', help='its name in the rows (default: the name of CONFIG)')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/BENCHMARK')
    parser.add_argument('--output', type=Path, help='rows; default: results/BENCHMARK.jsonl; for dev, in --work-dir')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if wrong := [text for text in args.backbones if '=' not in text]:
        raise ResultError(f'--backbones wants METHOD=FILE, got {wrong[0]}')
    init_default_scope('mmengine')
    name = Path(args.config).stem
    benchmark = args.benchmark or name
    work_dir = args.work_dir or Path('work_dirs', benchmark)
    backbones = [tuple(text.split('=', 1)) for text in args.backbones]
    probes = plan_probes(args.config, args.fp32, backbones, args.seeds, args.split, work_dir)
    output = rows_file(args.output, args.split, work_dir, benchmark)
    probe(probes, benchmark, args.model or name, output)


if __name__ == '__main__':
    exit_on_error(main)

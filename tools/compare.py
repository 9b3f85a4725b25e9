"""Which method for my model? Measure methods and bits on one checkpoint, as a table, a CSV file and a plot.

Every run is one call of tools/train.py, printed and kept in its row; what has been measured is not measured again, so
the program can be stopped and started at will. GPLQ trains once for each number of activation bits and rounds the
weights from there. `--stages` gives it other ways of rounding them. Settings are chosen on --split dev; --split test
is read once, for the table.
"""

from __future__ import annotations

import argparse

from gplq.files import write_bytes_atomically
from gplq.plugins.campaign import carry_out, raise_failures
from gplq.plugins.campaign_arguments import add_campaign_arguments, request_of
from gplq.plugins.command_line import exit_on_error
from gplq.plugins.matrix import plot, rows_of_runs, settings_of, write_csv
from gplq.plugins.methods import METHODS
from gplq.plugins.results import file_sha256, rows_so_far
from gplq.plugins.tables import render_table

EXAMPLE = """example:
  GPLQ_DATA_ROOT=data/objects100 python tools/compare.py configs/gplq_vit-mini_objects100.py fp32.pth \\
      --methods rtn ptq4vit gptq gplq --bits W8A8 W4A4 W3A4 --seeds 0 1 2"""

DEFAULT = ('rtn', 'ptq4vit', 'repq_vit', 'gptq', 'qwt', 'erq', 'reconstruct', 'gplq')
STAGES = (
    '',
    'nearest',
    'searched',
    'repq_vit',
    'feedback',
    'reconstruct',
    'qwt',
    'ridge',
    'affine',
    'erq',
    "paper's weights",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_campaign_arguments(parser, bits=('W8A8', 'W6A6', 'W4A4'))
    parser.add_argument(
        '--methods',
        nargs='+',
        choices=METHODS,
        default=list(DEFAULT),
        metavar='METHOD',
        help=f'{", ".join(METHODS)} (default: {" ".join(DEFAULT)}); fp32 is always among them',
    )
    parser.add_argument(
        '--stages', nargs='+', choices=STAGES, default=[''], metavar='STAGE', help=f"GPLQ's second stage: {STAGES}"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    request = request_of(args)
    methods = ['fp32', *(method for method in args.methods if method != 'fp32')]
    told = {
        ' '.join(filter(None, (method, stage))): settings_of(
            request.cfg, request.config, method, request.options, stage
        )
        for method in methods
        if method != 'fp32'
        for stage in (args.stages if method == 'gplq' else [''])
    }
    settings = '\n'.join(f'- `{name}`: {_shown(values)}' for name, values in told.items())
    runs = request.runs(methods, args.stages)
    print(f'Where the methods differ from the defaults:\n{settings}\n')
    failed = carry_out(runs, request.metrics, request.data_root, request.output)

    rows = rows_of_runs(runs, rows_so_far(request.output), file_sha256(request.checkpoint))
    columns = ('interval', 'minutes', 'peak_memory_mb', 'calibration_samples', 'effective_bits', 'artifact_bytes')
    if not rows:
        raise_failures(failed)
    table = render_table(rows, request.metrics, columns)
    page = f'# {request.name}, {request.split}\n\n{table}\nWhere the methods differ from the defaults:\n\n{settings}\n'
    files = request.work_dir / f'compare_{request.split}'
    write_bytes_atomically(files.with_suffix('.md'), page.encode())
    write_bytes_atomically(files.with_suffix('.csv'), write_csv(rows, request.metrics).encode())
    plot(rows, request.metrics[0], files.with_suffix('.png'))
    print(f'\n{table}\n{files}.md, .csv and .png')
    raise_failures(failed)


def _shown(values: dict[str, object]) -> str:
    return ', '.join(f'`{name}={value}`' for name, value in values.items()) or 'the defaults'


if __name__ == '__main__':
    exit_on_error(main)

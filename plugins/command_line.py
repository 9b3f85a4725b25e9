"""What the programs that run a config have in common: their arguments and how a config is read."""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from gplq.errors import GPLQError

from .allocator import keep_freed_memory
from .data_root import apply_options
from .downloads import read_downloads_safely
from .preflight import PreflightError
from .safe_load import allow_mmengine_objects

__all__ = ['add_run_arguments', 'exit_on_error', 'option_value', 'read_config']


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that mm's programs share, by the same names."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/CONFIG)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_OptionsAction,
        metavar='KEY=VALUE',
        help='override settings of the config; data_root=PATH moves every data set',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes --local-rank, its older versions --local_rank.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


class _OptionsAction(DictAction):
    """mmengine's, with an error for what it cannot read: dicts and calls are no values on a command line."""

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        return option_value(val)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        try:
            super().__call__(parser, namespace, values, option_string)
        except (RecursionError, ValueError, AssertionError) as error:
            reason = str(error) or type(error).__name__
            parser.error(
                f'{option_string} {" ".join(values)}: cannot be read ({reason}); write KEY=VALUE with a number, a text '
                'or a list of these, and anything else in a config'
            )


def option_value(text: str) -> Any:
    """A value of `--cfg-options` as mmengine reads it, but for spaces in a text, which stay: paths may have them."""
    value = DictAction._parse_iterable(text)
    return text.strip('\'"') if isinstance(value, str) else value


def read_config(args: argparse.Namespace) -> Config:
    """Read a config and its overrides, and prepare the process for what it will run.

    Raises:
        PreflightError: there is no such config.
    """
    if not Path(args.config).is_file():
        raise PreflightError(f'config {args.config} does not exist')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if importlib.util.find_spec('mmdet') is not None:
        # Before the config: what it imports may import mmcv.ops.
        importlib.import_module('gplq.plugins.detection')
    keep_freed_memory()
    allow_mmengine_objects()
    read_downloads_safely()
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    apply_options(cfg, args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(args.config).stem))
    return cfg


def exit_on_error(main: Callable[[], None]) -> None:
    """Run a program; what a user can mend is printed as one line, with exit status 2.

    Ctrl-C ends it without a traceback, with 130 as shells have it.
    """
    try:
        main()
    except GPLQError as error:
        # An error in a worker of the data loader comes with the worker's traceback before it.
        marker = f'{type(error).__module__}.{type(error).__qualname__}: '
        print(f'error: {str(error).rpartition(marker)[2].strip()}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)

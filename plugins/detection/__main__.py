"""Run a program with mmcv's operators in place: python -m gplq.plugins.detection SCRIPT ARGS..."""

import runpy
import sys
from pathlib import Path

from .stand_in import install_operators

_USAGE = """usage: python -m gplq.plugins.detection SCRIPT [ARGS ...]

Runs SCRIPT with stand-ins for mmcv's compiled operators where there are none, for programs that import them
before they read a config, for example mmdet's own test program:

  python -m gplq.plugins.detection path/to/mmdetection/tools/test.py CONFIG CHECKPOINT
"""


def main() -> None:
    """Hand the command line on to the script, as Python itself would."""
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        print(_USAGE, end='')
        sys.exit(0 if len(sys.argv) > 1 else 2)
    script = sys.argv[1]
    if not Path(script).is_file():
        sys.exit(f'gplq.plugins.detection: there is no script {script}')
    install_operators()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    main()

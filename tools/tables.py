"""Write the tables of README.md and docs/*.md from results/*.jsonl."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gplq.plugins.results import ResultError
from gplq.plugins.tables import fill_tables

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = 'example: python tools/tables.py --check'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument('pages', nargs='*', type=Path, help='default: README.md and docs/*.md')
    parser.add_argument('--check', action='store_true', help='write nothing; fail where a table is out of date')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    stale = False
    for page in args.pages or [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]:
        if not page.is_file():
            sys.exit(f'error: page {page} does not exist')
        text = page.read_text(encoding='utf-8')
        try:
            filled = fill_tables(text, ROOT)
        except ResultError as error:
            sys.exit(f'{page}: {error}')
        if filled == text:
            continue
        stale = True
        print(f'{page}: {"out of date" if args.check else "written"}')
        if not args.check:
            page.write_text(filled, encoding='utf-8')
    if stale and args.check:
        sys.exit('run: python tools/tables.py')


if __name__ == '__main__':
    main()

"""The page about a model's sites: complete, self-contained, and read by a browser without complaint."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gplq.analysis import SiteReport
from gplq.plugins.analysis_page import Model, Sensitivity, render_page, write_csv, write_table
from gplq.variation import Distribution

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
VOID = {'meta', 'link', 'rect', 'line'}


def site(name: str, kind: str = 'linear_input', **settings) -> SiteReport:
    values = dict(sqnr=12.3, histogram=(1, 0, 5, 2), low=-1.0, high=2.0, grid=(-0.5, 0.0, 0.5), heads=())
    shape = Distribution(mean_size=0.5, deviation=0.7, largest=2.0, kurtosis=3.1, outliers=4.0, channel_ratio=1.5)
    return SiteReport(name, kind, 3, shape, **{**values, **settings})


MODELS = [
    Model(
        'vit <small>',
        [site('blocks.0.fc1'), site('a:query', 'query', heads=(0.1, 0.4)), site('fc1', 'weight', sqnr=None, grid=())],
    ),
    Model('resnet', [site('conv')]),
]
BARS = [Sensitivity('blocks.0', alone=0.49, without=0.45), Sensitivity('head', alone=0.501, without=0.40)]


@pytest.fixture
def page() -> str:
    return render_page(MODELS, BARS, 'top1', 0.5, 0.4)


class Nesting(HTMLParser):
    """Every element that opens is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ''

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_everything_is_on_the_page_and_nothing_from_elsewhere(page: str) -> None:
    parser = Nesting()
    parser.feed(page)
    assert parser.open == []
    for words in ('vit <small>', 'resnet', 'blocks.0', 'top1: 0.5000 in floating point, 0.4000', 'Heads', '12.3 dB'):
        assert words in parser.text
    assert '<small>' not in page, 'names are escaped'
    assert not re.search(r'https?://|<script', page)
    # Two bars a module, three lines of the grid for each of the two histograms that have one, two heads.
    assert len(re.findall(r'<title>(lost|won back)', page)) == 4
    assert page.count('<line ') == 6
    assert page.count('<title>head ') == 2
    # Of a single histogram's four bins.
    assert page.count('fill="#7f8c8d"') == 3 * 4


def test_parts_that_were_not_measured_are_left_out() -> None:
    page = render_page([Model('a', [site('fc')])], [], '', None, None)
    assert 'Sensitivity' not in page and 'Heads' not in page
    even = site('constant', histogram=(0, 0), low=1.0, high=1.0)
    assert 'constant' in render_page([Model('a', [even])], [], '', None, None)


def test_table_and_csv_have_a_line_a_site() -> None:
    lines = list(csv.DictReader(io.StringIO(write_csv(MODELS))))
    assert [(line['model'], line['site'], line['SQNR dB']) for line in lines] == [
        ('vit <small>', 'blocks.0.fc1', '12.3'),
        ('vit <small>', 'a:query', '12.3'),
        ('vit <small>', 'fc1', ''),
        ('resnet', 'conv', '12.3'),
    ]
    assert write_table(MODELS).count('\n') == 2 + 4


@pytest.mark.skipif(BROWSER is None, reason='needs Chromium')
def test_a_browser_draws_it_without_an_error(page: str, tmp_path: Path) -> None:
    path = tmp_path / 'page.html'
    path.write_text(page, encoding='utf-8')
    offline = ['--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-quic']
    command = [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', *offline]
    command += [f'--user-data-dir={tmp_path / "user"}', '--enable-logging=stderr', '--dump-dom', path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert 'resnet' in done.stdout and done.stdout.count('<rect') == page.count('<rect')
    assert not re.search(r'CONSOLE.*(error|Error)', done.stderr), done.stderr

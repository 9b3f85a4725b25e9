"""One page of HTML about a model's sites, with its plots inside: no script, no network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gplq.analysis import SiteReport
from gplq.variation import variation

__all__ = ['Model', 'Sensitivity', 'render_page', 'write_csv', 'write_table']

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child, td.text { text-align: left } figure { display: inline-block; margin: 8px }
figcaption { font-size: 12px; max-width: 300px; overflow-wrap: anywhere } svg { background: #fafafa }
"""
HEAD = ('site', 'kind', 'bits', 'mean size', 'largest', 'outliers', 'kurtosis', 'channel ratio', 'SQNR, dB')


@dataclass(frozen=True)
class Sensitivity:
    """A metric with one module quantized alone, and with everything quantized but that."""

    module: str
    alone: float
    without: float


@dataclass(frozen=True)
class Model:
    """What was found of one model."""

    name: str
    sites: Sequence[SiteReport]


def write_table(models: Sequence[Model]) -> str:
    """Markdown: a line a site."""
    lines = [f'| {" | ".join(("model", *HEAD))} |', f'| {" | ".join(["---"] * (len(HEAD) + 1))} |']
    lines += [f'| {" | ".join((model.name, *_cells(site)))} |' for model in models for site in model.sites]
    return '\n'.join(lines) + '\n'


def write_csv(models: Sequence[Model]) -> str:
    """The same, separated by commas; names of modules have none."""
    lines = [','.join(('model', *(name.replace(',', '') for name in HEAD)))]
    lines += [','.join((model.name, *_cells(site))) for model in models for site in model.sites]
    return '\n'.join(lines) + '\n'


def render_page(
    models: Sequence[Model], sensitivities: Sequence[Sensitivity], metric: str, fp32: float | None, whole: float | None
) -> str:
    """The page: variation of the models, sensitivity bars, heads, histograms under the quantization grid.

    Args:
        models: the one in question first; others stand beside it in the first table.
        sensitivities: of its modules, empty where they were not measured.
        metric: their name.
        fp32: the metric in floating point.
        whole: the metric with everything quantized.
    """
    first = models[0]
    parts = [f'<h1>{_text(first.name)}</h1>', '<h2>Variation</h2>', _variation(models)]
    if sensitivities and fp32 is not None and whole is not None:
        parts += ['<h2>Sensitivity</h2>', _bars(sensitivities, metric, fp32, whole)]
    if any(site.heads for site in first.sites):
        parts += [
            '<h2>Heads</h2>',
            '<p>Mean absolute value of each head, darker is larger; a row has its own scale.</p>',
        ]
        parts.append(_heads(first.sites))
    parts += ['<h2>Histograms</h2>', '<p>Counts in logarithmic height; red lines are values of codes.</p>']
    parts += [_histogram(site) for site in first.sites]
    parts += ['<h2>Sites</h2>', _sites(first.sites)]
    title = f'<title>{_text(first.name)}</title>'
    head = f'<meta charset="utf-8"><link rel="icon" href="data:,">{title}<style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _cells(site: SiteReport) -> tuple[str, ...]:
    d = site.distribution
    numbers = (d.mean_size, d.largest, d.outliers, d.kurtosis, d.channel_ratio)
    sqnr = '' if site.sqnr is None else f'{site.sqnr:.1f}'
    return (site.name, site.kind, str(site.bits), *(f'{number:.4g}' for number in numbers), sqnr)


def _sites(sites: Sequence[SiteReport]) -> str:
    rows = [''.join(f'<td>{_text(cell)}</td>' for cell in _cells(site)) for site in sites]
    return _table(HEAD, rows)


def _variation(models: Sequence[Model]) -> str:
    rows = []
    for model in models:
        for what, weights in (('weights', True), ('activations', False)):
            found = [s.distribution for s in model.sites if (s.kind == 'weight') == weights]
            if not found:
                continue
            worst = max(found, key=lambda d: d.outliers)
            channels = max(d.channel_ratio for d in found)
            cells = (f'{variation(found):.3f}', f'{worst.outliers:.1f}', f'{channels:.1f}', str(len(found)))
            numbers = ''.join(f'<td>{cell}</td>' for cell in cells)
            rows.append(f'<td>{_text(model.name)}</td><td class="text">{what}</td>{numbers}')
    return _table(('model', '', 'spread of mean sizes', 'worst outlier', 'worst channel', 'sites'), rows)


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    top = ''.join(f'<th>{_text(cell)}</th>' for cell in head)
    body = ''.join(f'<tr>{row}</tr>' for row in rows)
    return f'<table><tr>{top}</tr>{body}</table>'


def _bars(sensitivities: Sequence[Sensitivity], metric: str, fp32: float, whole: float) -> str:
    """Two bars a module: what is lost when it alone is quantized, what is won back when it alone is not."""
    left, width, step = 260, 600, 34
    values = [(s.module, fp32 - s.alone, s.without - whole) for s in sensitivities]
    largest = max(max(abs(lost), abs(won)) for _, lost, won in values) or 1.0
    lines = []
    for number, (module, lost, won) in enumerate(values):
        y = number * step
        lines.append(f'<text x="{left - 8}" y="{y + 20}" text-anchor="end" font-size="12">{_text(module)}</text>')
        for offset, value, color, what in ((6, lost, '#c0392b', 'lost'), (18, won, '#2471a3', 'won back')):
            length = max(abs(value) / largest * width, 0.5)
            lines.append(
                f'<rect x="{left}" y="{y + offset}" width="{length:.1f}" height="10" fill="{color}" '
                f'opacity="{1 if value >= 0 else 0.35}"><title>{what}: {value:+.4f}</title></rect>'
            )
    told = (
        f'<p>{_text(metric)}: {fp32:.4f} in floating point, {whole:.4f} with everything quantized. Red: lost where the '
        'module alone is quantized; blue: won back where it alone is not. Pale bars are negative; the longest is '
        f'{largest:.4f}.</p>'
    )
    return told + f'<svg width="{left + width + 20}" height="{len(values) * step + 8}">{"".join(lines)}</svg>'


def _heads(sites: Sequence[SiteReport]) -> str:
    with_heads = [site for site in sites if site.heads]
    left, side = 320, 22
    lines = []
    for row, site in enumerate(with_heads):
        lines.append(
            f'<text x="{left - 8}" y="{row * side + 15}" text-anchor="end" font-size="11">{_text(site.name)}</text>'
        )
        largest = max(site.heads) or 1.0
        for column, value in enumerate(site.heads):
            shade = round(245 - 215 * value / largest)
            lines.append(
                f'<rect x="{left + column * side}" y="{row * side}" width="{side - 2}" height="{side - 2}" '
                f'fill="rgb({shade},{shade},{min(255, shade + 30)})"><title>head {column}: {value:.4g}</title></rect>'
            )
    width = left + max(len(site.heads) for site in with_heads) * side
    return f'<svg width="{width}" height="{len(with_heads) * side}">{"".join(lines)}</svg>'


def _histogram(site: SiteReport) -> str:
    width, height = 300, 110
    span = site.high - site.low or 1.0
    tallest = math.log1p(max(site.histogram)) or 1.0
    bar = width / len(site.histogram)
    lines = []
    for number, count in enumerate(site.histogram):
        tall = math.log1p(count) / tallest * height
        place = f'x="{number * bar:.2f}" y="{height - tall:.2f}"'
        lines.append(f'<rect {place} width="{bar:.2f}" height="{tall:.2f}" fill="#7f8c8d"/>')
    for value in site.grid:
        x = (value - site.low) / span * width
        if 0 <= x <= width:
            lines.append(f'<line x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{height}" stroke="#c0392b" stroke-width="0.7"/>')
    sqnr = '' if site.sqnr is None else f', {site.sqnr:.1f} dB'
    told = f'{_text(site.name)} ({_text(site.kind)}, {site.bits} bits{sqnr}): {site.low:.3g} to {site.high:.3g}'
    return (
        f'<figure><svg width="{width}" height="{height}">{"".join(lines)}</svg><figcaption>{told}</figcaption></figure>'
    )


def _text(value: str) -> str:
    return html.escape(value)

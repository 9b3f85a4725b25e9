"""What is quantized and what is not, as a table a person reads and a program can check."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gplq.plan import NOT_RUN, Floating
from gplq.quantizer import Quantizer
from gplq.record import map_of, named_products, record_of, weight_views
from gplq.size import effective_bits, float_bytes, packed_model_bytes, view_bytes
from gplq.spec import FLOAT_BITS, QuantizerSpec

__all__ = ['SiteRow', 'Summary', 'WeightRow', 'summary']


@dataclass(frozen=True)
class SiteRow:
    """An activation site; low and high are the ends of its representable range (of all its scales)."""

    name: str
    site: str
    bits: int
    signed: bool | None
    granularity: str
    low: float
    high: float
    calibrated: bool


@dataclass(frozen=True)
class WeightRow:
    """A weight matrix; ``multiplications`` are those of the example forward."""

    name: str
    bits: int
    rows: int
    columns: int
    bytes: int
    rounded: bool
    multiplications: int


@dataclass(frozen=True)
class Summary:
    """All rows and the shares of multiplications and bytes."""

    recipe: str
    stage: str
    sites: tuple[SiteRow, ...]
    weights: tuple[WeightRow, ...]
    floating: tuple[Floating, ...]
    quantized_multiplications: float
    quantized_bytes: float
    float_bytes: int
    packed_bytes: int
    effective_bits: float

    def __str__(self) -> str:
        lines = [f'{self.recipe}, {self.stage}', '', _line('site', 'kind', 'bits', 'granularity', 'range')]
        for site in self.sites:
            span = f'[{site.low:.4g}, {site.high:.4g}]' if site.calibrated else 'not calibrated'
            sign = {None: '', True: 'signed ', False: 'unsigned '}[site.signed]
            lines.append(_line(site.name, site.site, str(site.bits), sign + site.granularity, span))
        lines += ['', _line('weight', 'shape', 'bits', 'bytes', 'state')]
        for weight in self.weights:
            state = 'rounded' if weight.rounded else 'FP32 so far'
            shape = f'{weight.rows} x {weight.columns}'
            lines.append(_line(weight.name, shape, str(weight.bits), str(weight.bytes), state))
        if self.floating:
            lines += ['', 'in floating point:']
            lines += [f'  {row.name or "the model"} ({row.what}): {row.reason}' for row in self.floating]
        unseen = sum(row.reason.endswith(NOT_RUN) for row in self.floating)
        without = f' of those in the example, which {unseen} layers took no part in' if unseen else ''
        lines += [
            '',
            f'multiplications with both operands quantized: {self.quantized_multiplications:.1%}{without}',
            f'bytes of weights that are quantized: {self.quantized_bytes:.1%} of the FP32 model',
            f'size: {self.float_bytes / 2**20:.2f} MiB in FP32, {self.packed_bytes / 2**20:.2f} MiB packed '
            f'({self.float_bytes / max(self.packed_bytes, 1):.2f} times smaller), '
            f'{self.effective_bits:.2f} bits a targeted weight',
        ]
        return '\n'.join(lines)


def _line(name: str, kind: str, bits: str, detail: str, last: str) -> str:
    return f'{name:<44} {kind:<18} {bits:>4}  {detail:<18} {last}'


def summary(model: nn.Module) -> Summary:
    """Describe a prepared model: every site, every weight, everything in floating point with the reason.

    Raises:
        StageError: if the model is not prepared.
    """
    record = record_of(model)
    plan = record.plan
    sites: list[SiteRow] = []
    for a_map in plan.maps:
        quantizer = map_of(model, a_map).input
        if quantizer is not None and a_map.input is not None:
            name = a_map.name if a_map.kind in ('linear', 'conv2d') else f'{a_map.name}.{a_map.kind}'
            sites.append(_site(name, a_map.input.site, quantizer))
    for name, product in named_products(model):
        for site, quantizer in zip(product.sites, product.operands, strict=True):
            sites.append(_site(name.rpartition(':')[0], site, quantizer))
    weights: list[WeightRow] = []
    quantized = quantized_weight_bytes = 0
    for a_map, view in weight_views(model):
        matrix = view.matrix()
        rounded = view.map.weight is not None and view.map.weight.enabled
        weights.append(
            WeightRow(
                view.name,
                a_map.weight_bits,
                matrix.shape[0],
                matrix.shape[1],
                view_bytes(view, a_map.weight_bits),
                rounded,
                a_map.multiplications,
            )
        )
        if a_map.weight_bits != FLOAT_BITS:
            quantized_weight_bytes += matrix.numel() * matrix.element_size()
            if a_map.input is not None:
                quantized += a_map.multiplications
    quantized += sum(product.multiplications for product in plan.products)
    every = sum(row.multiplications for row in plan.floating) + sum(row.multiplications for row in plan.products)
    every += sum(row.multiplications for row in plan.maps)
    full = float_bytes(model)
    return Summary(
        recipe=plan.recipe.name,
        stage=record.stage.value,
        sites=tuple(sites),
        weights=tuple(weights),
        floating=plan.floating,
        quantized_multiplications=quantized / every if every else 0.0,
        quantized_bytes=quantized_weight_bytes / full if full else 0.0,
        float_bytes=full,
        packed_bytes=packed_model_bytes(model),
        effective_bits=effective_bits(model),
    )


def _site(name: str, site: str, quantizer: Quantizer) -> SiteRow:
    spec = quantizer.spec
    low, high = (quantizer.scale.detach() * bound.detach() for bound in quantizer.bounds())
    return SiteRow(
        name,
        site,
        spec.bits,
        spec.signed,
        ' + '.join([spec.granularity, *(['offset'] if spec.offset else []), *_scheme(spec)]),
        float(low.min()),
        float(high.max()),
        quantizer.enabled,
    )


def _scheme(spec: QuantizerSpec) -> list[str]:
    return [] if spec.scheme == 'uniform' else [spec.scheme.replace('_', ' ')]

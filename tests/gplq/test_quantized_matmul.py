"""The product that keeps codes is the written-out one, gradients included."""

from __future__ import annotations

import pytest
import torch

from gplq.grid import Grid
from gplq.products import QuantizedProduct
from gplq.quantized_matmul import quantized_matmul
from gplq.quantizer import Quantizer
from gplq.spec import QuantizerSpec

N, K, M = 5, 6, 4


@pytest.mark.parametrize(
    ('lead', 'scales'), [((), ()), ((3, 2), (1,)), ((3, 2), (2, 1, 1)), ((6,), (6, 1, 1)), ((3, 2), (2, 1, 'columns'))]
)
@pytest.mark.parametrize('shifted', [False, True])
@pytest.mark.parametrize('autocast', [False, True])
def test_equals_the_written_out_product(lead, scales, shifted, autocast, written_out_lsq) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def parameter(columns: int) -> torch.Tensor:
        return draw(*(columns if size == 'columns' else size for size in scales))

    # Rows of the left operand share their scale, so do the columns' values of the right one that are summed.
    given = {
        'left': 6 * draw(*lead, N, K),
        'right': 8 * draw(*lead, K, M) - 4,
        'left_scale': draw(*(1 if size == 'columns' else size for size in scales)) * 0.1 + 0.1,
        'right_scale': parameter(M) * 0.1 + 0.2,
        'left_offset': draw(*(1 if size == 'columns' else size for size in scales)) if shifted else None,
        'right_offset': parameter(M) if shifted else None,
    }
    upstream = draw(*lead, N, M)
    results = []
    for fused in (True, False):
        leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in given.items()}
        grids = (
            Grid(leaves['left_scale'], 0, 15, leaves['left_offset'], 0.5),
            Grid(leaves['right_scale'], -8, 7, leaves['right_offset'], 0.25),
        )
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            if fused:
                y = quantized_matmul(leaves['left'], leaves['right'], grids)
            else:
                y = written_out_lsq(leaves['left'], grids[0]) @ written_out_lsq(leaves['right'], grids[1])
        y.backward(upstream.to(y.dtype))
        results.append((y, {name: x.grad for name, x in leaves.items() if x is not None}))
    (found, mine), (expected, theirs) = results
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    for name, gradient in theirs.items():
        slack = torch.full_like(gradient, 1e-5 + (2**-6 if autocast else 1e-6) * float(gradient.abs().max()))
        operand, _, kind = name.partition('_')
        if kind == 'scale':
            # Rounding errors of what is not clipped are kept in steps of 1 / 254.
            slack += 0.5 * theirs[operand].abs().sum_to_size(gradient.shape) / 508
        assert bool(((mine[name] - gradient).abs() <= slack).all()), name
        assert float(gradient.abs().max()) > 0, 'gradients of 0 would pass'


def test_keeps_a_byte_and_a_half_a_value() -> None:
    left, right = torch.rand(2, 8, 16, requires_grad=True), torch.rand(2, 16, 4, requires_grad=True)
    grids = tuple(Grid(torch.tensor(0.1, requires_grad=True), *bounds) for bounds in ((0, 15), (-8, 7)))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantized_matmul(left, right, grids)
    assert sum(t.numel() * t.element_size() for t in kept) == (left.numel() + right.numel()) * 1.5 + 2 * 4


def test_keeps_nothing_of_a_map_that_its_softmax_keeps(written_out_lsq) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, value = torch.randn(2, 8, 16, generator=generator), torch.randn(2, 16, 4, generator=generator)
    upstream = torch.randn(2, 8, 4, generator=generator)
    results, kept = [], {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    for fused in (True, False):
        leaves = [x.clone().requires_grad_() for x in (scores, value, torch.tensor(0.02), torch.tensor(0.3))]
        grids = (Grid(leaves[2], 0, 15, None, 0.5), Grid(leaves[3], -8, 7, None, 0.25))
        with torch.autograd.graph.saved_tensors_hooks(keep if fused else lambda x: x, lambda x: x):
            attention = torch.softmax(leaves[0], dim=-1)
            if fused:
                y = quantized_matmul(attention, leaves[1], grids)
            else:
                y = written_out_lsq(attention, grids[0]) @ written_out_lsq(leaves[1], grids[1])
        y.backward(upstream)
        results.append((y.detach(), *(x.grad for x in leaves)))
    assert sum(kept.values()) == attention.numel() * 4 + value.numel() * 1.5 + 2 * 4
    (y, *mine), (expected, *theirs) = results
    assert torch.equal(y, expected)
    torch.testing.assert_close(mine[:2], theirs[:2])
    # The scales' depend on errors in steps of 1 / 254.
    torch.testing.assert_close(mine[2:], theirs[2:], rtol=1e-2, atol=1e-2)


@pytest.fixture
def product() -> QuantizedProduct:
    """Both operands at 4 bits, settled."""
    quantizers = []
    for scale in (0.3, 0.4):
        quantizer = Quantizer(QuantizerSpec(4), ())
        quantizer.initialize(torch.tensor(scale), None, signed=True, elements=1)
        quantizers.append(quantizer)
    return QuantizedProduct(0, ('left', 'right'), (quantizers[0], quantizers[1]))


@pytest.mark.parametrize(
    ('left', 'right'),
    [((2, 3, 4, 5), (2, 3, 5, 4)), ((2, 3, 4, 5), (3, 5, 4)), ((2, 1, 4, 5), (2, 3, 5, 4)), ((4, 5), (5,))],
)
def test_a_product_of_any_shapes_is_that_of_its_quantized_operands(product, left, right) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator) for shape in (left, right)]
    results = []
    for run in (
        lambda *x: product(*x, torch.matmul),
        lambda *x: torch.matmul(*(q(y) for q, y in zip(product.operands, x, strict=True))),
    ):
        operands = [x.clone().requires_grad_() for x in given]
        y = run(*operands)
        y.square().sum().backward()
        results.append((y, *(x.grad for x in operands)))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_product_keeps_codes(product) -> None:
    operands = torch.randn(2, 8, 16, requires_grad=True), torch.randn(2, 16, 4, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product(*operands, torch.matmul)
    assert {t.dtype for t in kept if t.numel() > 1} == {torch.uint8}


def test_another_multiplication_is_left_to_the_caller(product) -> None:
    left, right = torch.randn(2, 4, 5), torch.randn(2, 6, 5)
    first, second = product.operands
    found = product(left, right, lambda x, y: torch.einsum('bik,bjk->bij', x, y))
    assert torch.equal(found, torch.einsum('bik,bjk->bij', first(left), second(right)))

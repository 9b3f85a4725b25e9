"""Round a weight column by column, each column making up for the errors of those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.weights import WeightScales, restore_weight, round_weight

__all__ = ['damped', 'round_with_feedback']

# Beyond it the inputs are not finite.
_LARGEST_DAMPING = 1e6
# Where none was asked for and some is needed.
_LEAST_DAMPING = 1e-8


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    """``gram`` in double precision with a share of its mean diagonal added to it; columns without energy have some.

    Of inputs that are all but equal, what is left around their mean is rounding, and need not be positive definite: the
    share grows tenfold until it is.
    """
    gram = gram.double().clone()
    gram.diagonal()[gram.diagonal() <= 0] = 1.0
    mean = gram.diagonal().mean()
    gram.diagonal().add_(damping * mean)
    while damping < _LARGEST_DAMPING and bool(torch.linalg.cholesky_ex(gram).info):
        more = max(10 * damping, _LEAST_DAMPING)
        gram.diagonal().add_((more - damping) * mean)
        damping = more
    return gram


@torch.no_grad()
def round_with_feedback(
    weight: Tensor, scales: WeightScales, bits: int, gram: Tensor, damping: float = 0.01, block: int = 64
) -> Tensor:
    """Values on the grid of ``scales`` that nearly minimize ``||(weight - rounded) x||^2`` (GPTQ, Frantar 2023).

    Columns are rounded in the order of falling input energy. What a column's rounding does to the output is
    subtracted, as far as the inputs are correlated, from the columns that are still to come.

    Args:
        weight: ``(rows, columns)`` in the domain in which it is rounded.
        scales: of its rows.
        bits: 2 to 8.
        gram: ``(columns, columns)``, the sum of ``x x^T`` over inputs in the same domain.
        damping: share of the mean diagonal that is added to it.
        block: columns whose updates are gathered before the rest is touched; changes speed, not the result.

    Returns:
        ``(rows, columns)`` on the grid.
    """
    rounded = weight.double().clone()
    gram = damped(gram, damping)
    order = torch.argsort(gram.diagonal(), descending=True)
    rounded, gram = rounded[:, order], gram[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)
    columns = rounded.shape[1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros_like(rounded[:, start:end])
        for column in range(start, end):
            exact = rounded[:, column].clone()
            nearest = _nearest(exact, scales, bits)
            rounded[:, column] = nearest
            error = (exact - nearest) / factor[column, column]
            errors[:, column - start] = error
            rounded[:, column + 1 : end] -= torch.outer(error, factor[column, column + 1 : end])
        rounded[:, end:] -= errors @ factor[start:end, end:]
    return rounded[:, torch.argsort(order)].to(weight.dtype)


def _nearest(column: Tensor, scales: WeightScales, bits: int) -> Tensor:
    values = column[:, None].to(scales.scale.dtype)
    return restore_weight(round_weight(values, scales, bits), scales)[:, 0].to(column.dtype)

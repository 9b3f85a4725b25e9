"""Choose the codes of a rounded weight anew, one column at a time, until none of them gets any better."""

from __future__ import annotations

import torch
from torch import Tensor

from gplq.weights import WeightScales, restore_weight, round_weight

__all__ = ['descend']


@torch.no_grad()
def descend(
    weight: Tensor,
    rounded: Tensor,
    scales: WeightScales,
    bits: int,
    gram: Tensor,
    sweeps: int = 8,
    block: int = 64,
) -> Tensor:
    """Lower ``||(weight - rounded) x||^2`` by coordinate descent on the grid (QuantEase, Behdin et al. 2023).

    With all other columns given, the best code of a column is the nearest one to the quadratic's minimum along it. A
    sweep gives every column that, in the order of falling input energy; the error never grows. Rounding with error
    feedback looks back at no column, this does, and starts best from there.

    Args:
        weight: ``(rows, columns)`` in the domain in which it is rounded.
        rounded: ``(rows, columns)``, values on the grid to start from.
        scales: of the rows.
        bits: 2 to 8.
        gram: ``(columns, columns)``, the sum of ``x x^T`` over inputs in the same domain; its diagonal is positive.
        sweeps: over all columns at most; it ends with the first that changes nothing.
        block: columns whose updates are gathered before the rest is touched; changes speed, not the result.

    Returns:
        ``(rows, columns)`` on the grid.
    """
    order = torch.argsort(gram.diagonal(), descending=True)
    gram = gram.double()[order][:, order]
    found = rounded.double()[:, order]
    # What each column would still have to change by is its entry here over its energy.
    residual = (weight.double()[:, order] - found) @ gram
    energy = gram.diagonal()
    columns = found.shape[1]
    for _ in range(sweeps):
        changed = False
        for start in range(0, columns, block):
            end = min(start + block, columns)
            own, within = residual[:, start:end].clone(), gram[start:end, start:end]
            steps = torch.zeros_like(own)
            for column in range(end - start):
                before = found[:, start + column]
                best = before + own[:, column] / energy[start + column]
                values = best[:, None].to(scales.scale.dtype)
                after = restore_weight(round_weight(values, scales, bits), scales)[:, 0].double()
                steps[:, column] = after - before
                found[:, start + column] = after
                own -= torch.outer(steps[:, column], within[column])
            residual -= steps @ gram[start:end]
            changed = changed or bool(steps.any())
        if not changed:
            break
    return found[:, torch.argsort(order)].to(weight.dtype)

"""Find what can be quantized by running an example, decide how, and put the quantizers in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gplq.errors import CalibrationError, ProductError, StageError
from gplq.insert import insert
from gplq.layers import DecomposedMultiheadAttention
from gplq.plan import Plan
from gplq.planning import Example, make_plan
from gplq.recipe import Recipe, as_recipe
from gplq.record import is_prepared
from gplq.swap import swap_class
from gplq.targets import Targets
from gplq.trace import evaluating, trace_forward

__all__ = ['prepare']


def prepare(
    model: nn.Module,
    recipe: Recipe | str,
    example_inputs: Any = None,
    *,
    forward: Callable[[nn.Module], Any] | None = None,
) -> Plan:
    """Insert quantizers for every targeted site; they let values pass until :func:`gplq.calibrate`.

    An example is needed because head counts and attention products exist only in a forward pass. It runs once
    or twice, in inference mode, with the random state put back. All parameters keep their names and values.

    Args:
        model: any module; it is changed in place, never wrapped.
        recipe: settings, or ``'w4a4'`` and the like.
        example_inputs: a tensor, or a tuple of arguments, for ``model(...)``.
        forward: instead of ``example_inputs``, a function that runs the part to be quantized.

    Returns:
        The plan: every site and everything left in floating point.

    Raises:
        TargetError: if a pattern matches nothing, or a targeted layer never ran.
        ProductError: if an attention module's products cannot be found.
        StageError: if the model is prepared already.
    """
    recipe = as_recipe(recipe)
    if is_prepared(model):
        raise StageError(f'{type(model).__name__} is prepared already; start from a fresh model')
    if not recipe.quantizes:
        plan = Plan(recipe)
        insert(model, plan)
        return plan
    run = _runner(example_inputs, forward)
    targets = Targets(model, recipe)
    for name in targets.multiheads:
        # Taken apart before the trace: its products are hidden inside one fused call.
        swap_class(model.get_submodule(name), DecomposedMultiheadAttention)
    trace, expected = trace_forward(model, run)
    plan = make_plan(Example(model, recipe, targets, trace))
    insert(model, plan)
    with evaluating(model):
        _check_unchanged(model, expected, run(model))
    return plan


def _runner(example: Any, forward: Callable[[nn.Module], Any] | None) -> Callable[[nn.Module], Any]:
    if forward is not None:
        return forward
    if example is None:
        raise CalibrationError("prepare needs example_inputs (a batch of the model's input) or forward")
    arguments = example if isinstance(example, tuple) else (example,)
    for x in arguments:
        if isinstance(x, Tensor) and (x.numel() == 0 or (x.is_floating_point() and not x.isfinite().all())):
            raise CalibrationError(f'the example of shape {tuple(x.shape)} is empty or not finite')
    return lambda model: model(*arguments)


def _check_unchanged(model: nn.Module, expected: Any, found: Any) -> None:
    """Insertion must not change the function; if it does, a layer is not what its class says."""
    for before, after in zip(_flat(expected), _flat(found), strict=True):
        scale = before.abs().max().clamp(min=1e-6)
        if not torch.isfinite(before).all():
            raise CalibrationError("the model's output for the example is not finite")
        # Half precision adds up in another order, so a few of its steps are no sign of anything.
        if float((before - after).abs().max() / scale) > max(1e-3, 8 * torch.finfo(before.dtype).eps):
            raise ProductError(
                f"{type(model).__name__} computes something else once its layers are replaced: a layer's forward "
                'differs from its class; name it in skip'
            )


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    if isinstance(value, dict):
        return [x for item in value.values() for x in _flat(item)]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in _flat(item)]
    return []

"""Modules that stay in FP32 when the model around them is cast."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ['SinglePrecision']


class SinglePrecision(nn.Module):
    """Keeps its tensors, its children's included, in the type they have; ``model.half()`` moves them at most.

    Scales decide every code, and a file that is saved must restore the weights that they rounded: half precision
    would shift both.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SinglePrecision:
        def keep_type(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(keep_type, recurse)  # type: ignore[no-untyped-call]
        return self

"""GELUs by their definition, whose last bits are not those of PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ['DefinedGELU']


class DefinedGELU(TorchFunctionMode):
    """Within it ``gelu(x)`` is ``x / 2 * (1 + erf(x / sqrt(2)))``, step by step.

    So ONNX Runtime computes it, ten times nearer to this than to oneDNN's kernel, which PyTorch takes and OpenVINO is
    made of. A linear layer on integers has few different outputs, so where the GELU of one lies next to a tie, kernels
    that differ in the last bit round it otherwise in one image after the other. GELUs by tanh are left to PyTorch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _gelu(*args, **(kwargs or {})) if func is F.gelu else func(*args, **(kwargs or {}))


def _gelu(x: Tensor, approximate: str = 'none') -> Tensor:
    if approximate != 'none':
        return F.gelu(x, approximate=approximate)
    return x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))

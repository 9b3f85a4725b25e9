"""Mixed precision that also runs where mmengine's AmpOptimWrapper does not: on the CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from torch import nn

__all__ = ['BFloat16OptimWrapper', 'computes_bfloat16']

CPUINFO = Path('/proc/cpuinfo')
# What it calls instructions for bfloat16: Intel's and AMD's, then ARM's.
INSTRUCTIONS = {'amx_bf16', 'avx512_bf16', 'bf16'}
# What limits oneDNN, whose products these are, and the limits below those instructions.
LIMITS = ('ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA')
WITHOUT = {'SSE41', 'AVX', 'AVX2', 'AVX2_VNNI', 'AVX2_VNNI_2', 'AVX512_CORE', 'AVX512_CORE_VNNI'}


def computes_bfloat16(device: str) -> bool:
    """Whether a kind of device (`'cpu'`, `'cuda'`, …) multiplies bfloat16 itself, which is faster than float32 then.

    Where it does not, libraries emulate it, on a CPU with AVX2 some sixty times slower than float32. So they do where
    ``ONEDNN_MAX_CPU_ISA`` keeps oneDNN from the instructions: ``AVX512_CORE_VNNI`` makes any CPU train in float32.
    """
    if device == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != 'cpu':
        return True
    if any(os.environ.get(limit, '').upper() in WITHOUT for limit in LIMITS):
        return False
    return CPUINFO.is_file() and not INSTRUCTIONS.isdisjoint(CPUINFO.read_text().split())


class BFloat16OptimWrapper(OptimWrapper):
    """An OptimWrapper whose forward passes run under bfloat16 autocast, if the model's device computes it.

    bfloat16 has float32's range, so there is no loss to scale. On CPUs with AMX or AVX512-BF16 it is several
    times faster than float32; where it would be emulated the passes stay in float32, and the log says so.
    Parameters, gradients and optimizer states are float32 anyway.

    Args:
        emulate: use it on every device, however slow.
        options: those of :class:`mmengine.optim.OptimWrapper`.
    """

    def __init__(self, *args: Any, emulate: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.emulate = emulate
        self._computed: dict[str, bool] = {}

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16, enabled=self._uses(device)):
            yield

    def _uses(self, device: str) -> bool:
        if device not in self._computed:
            self._computed[device] = self.emulate or computes_bfloat16(device)
            if not self._computed[device]:
                print_log(f'this {device} does not multiply bfloat16 itself: training in float32', logger='current')
        return self._computed[device]

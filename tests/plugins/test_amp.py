from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn

from gplq.plugins import amp
from gplq.plugins.amp import BFloat16OptimWrapper, computes_bfloat16


def ones() -> nn.Linear:
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    return model


def test_forward_runs_in_bfloat16_and_parameters_stay_float32() -> None:
    model = ones()
    wrapper = BFloat16OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.5), emulate=True)
    with wrapper.optim_context(model):
        out = model(torch.tensor([[1.0, 3.0]]))
    assert out.dtype == torch.bfloat16
    wrapper.update_params(out.float().sum())
    assert model.weight.dtype == torch.float32
    assert model.weight.tolist() == [[0.5, -0.5]]
    assert not torch.is_autocast_enabled('cpu')


def test_forward_stays_float32_where_bfloat16_would_be_emulated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(amp, 'computes_bfloat16', lambda device: False)
    model = ones()
    wrapper = BFloat16OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.5))
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                with wrapper.optim_context(model):
                    assert model(torch.ones(1, 2)).dtype == torch.float32
    finally:
        logger.removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records]
    assert said == ['this cpu does not multiply bfloat16 itself: training in float32']


@pytest.mark.parametrize(
    ('flags', 'computes'),
    [('flags : fpu avx2 fma', False), ('flags : avx512f avx512_bf16', True), ('Features : fp asimd bf16 i8mm', True)],
)
def test_the_processor_says_whether_it_computes_bfloat16(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, computes: bool
) -> None:
    cpuinfo = tmp_path / 'cpuinfo'
    cpuinfo.write_text(f'processor : 0\n{flags}\n')
    monkeypatch.setattr(amp, 'CPUINFO', cpuinfo)
    for name in amp.LIMITS:
        monkeypatch.delenv(name, raising=False)
    assert computes_bfloat16('cpu') is computes
    monkeypatch.setattr(amp, 'CPUINFO', tmp_path / 'none')
    assert not computes_bfloat16('cpu')


@pytest.mark.parametrize('name', ['ONEDNN_MAX_CPU_ISA', 'DNNL_MAX_CPU_ISA'])
@pytest.mark.parametrize(
    ('limit', 'computes'), [('avx512_core_vnni', False), ('AVX2', False), ('AVX512_CORE_BF16', True), ('ALL', True)]
)
def test_instructions_that_onednn_is_kept_from_do_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, limit: str, computes: bool
) -> None:
    cpuinfo = tmp_path / 'cpuinfo'
    cpuinfo.write_text('flags : avx512f avx512_bf16\n')
    monkeypatch.setattr(amp, 'CPUINFO', cpuinfo)
    monkeypatch.setenv(name, limit)
    assert computes_bfloat16('cpu') is computes

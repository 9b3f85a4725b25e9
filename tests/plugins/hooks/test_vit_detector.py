"""The demo's detector, shrunk, on real images of shapes: the hooks with heads, masks and mixed precision."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gplq.plugins.detection  # noqa: F401  isort: skip
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from gplq.errors import TargetError
from gplq.record import record_of


def steps_of(runner: Runner) -> list[dict[str, Any]]:
    return json.loads((Path(runner.work_dir) / 'gplq.json').read_text())


def test_three_steps_in_mixed_precision(detector: Callable[..., Runner]) -> None:
    def in_bfloat16(config: Config) -> None:
        config.optim_wrapper.type = 'gplq.plugins.amp.BFloat16OptimWrapper'
        config.optim_wrapper.emulate = True

    runner = detector(change=in_bfloat16)
    runner.train()
    steps = steps_of(runner)
    assert [step['step'] for step in steps] == ['FP32', 'W32A4', 'W4A4']
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(steps[0]['metrics'])
    plan = record_of(runner.model).plan
    assert len(plan.products) == 4, 'two products in the windowed block and two in the global one'
    log = (Path(runner.log_dir) / f'{runner.timestamp}.log').read_text()
    lines = re.findall(r'Epoch\(train\).*loss_mask: .*', log) or re.findall(r'Iter\(train\).*loss_mask: .*', log)
    assert len(lines) == 2 and all('loss_mimicking: ' in line and 'loss_bbox: ' in line for line in lines)

    again = detector('test', load_from=steps[2]['checkpoint'])
    assert again.test() == pytest.approx(steps[2]['metrics'])


def test_label_free_mode_runs_no_head(detector: Callable[..., Runner], tmp_path: Path) -> None:
    runner = detector(label_free=True, validate_fp32=False)
    training = []
    for part in (runner.model.neck, runner.model.rpn_head, runner.model.roi_head.bbox_head):
        part.register_forward_hook(lambda module, *_: training.append(module.training))
    runner.train()
    assert training and not any(training), 'heads run in validation alone'
    original = torch.load(tmp_path / 'fp32.pth', weights_only=True)['state_dict']
    final = torch.load(steps_of(runner)[0]['checkpoint'], weights_only=True)['state_dict']
    for name, tensor in original.items():
        if not name.startswith('backbone.'):
            assert torch.equal(final[name], tensor), name
    assert any(not torch.equal(final[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize('kind', ['erq', 'affine', 'ridge', 'qwt'])
def test_heads_behind_proposals_are_not_compensated(kind: str, detector: Callable[..., Runner]) -> None:
    """Model and reference would be compared on different objects."""
    few = dict(calibration_samples=4, exponents=(0.0, 1.0), clips=(1.0,), compensation=kind)
    settings = dict(iterations=0, recipe=few, validate_fp32=False)
    with pytest.raises(TargetError, match=f"compensation='{kind}' compares outputs .* the heads of MaskRCNN"):
        detector(targets=['backbone', 'roi_head.bbox_head.shared_fcs.*'], **settings).train()
    detector('inside', targets=['backbone', 'neck.lateral_convs.0'], **settings).train()

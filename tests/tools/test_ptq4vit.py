"""PTQ4ViT on a detector by tools/test.py, with the detector's own loss for gradients, and what is wrong before it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gplq.plugins.json_files import read_json

ROOT = Path(__file__).parents[2]
HOOK = """
_base_ = '{base}'
default_hooks = dict(
    gplq=dict(
        type='gplq.plugins.PTQ4ViTHook',
        weight_bits=6,
        activation_bits=6,
        search=dict(candidates=5, rounds=1, images=2, memory_mb=64),
    )
)
"""


@pytest.fixture
def config(tiny_detector_config: Path, tiny_detector_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / 'ptq4vit.py'
    path.write_text(HOOK.format(base=tiny_detector_config))
    return path


def run(config: Path, checkpoint: str, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [config, checkpoint, '--work-dir', 'run', *options]
    command = [sys.executable, ROOT / 'tools/test.py', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=config.parent, timeout=300)


def test_a_detector_is_quantized_before_it_is_measured(config: Path) -> None:
    done = run(config, 'fp32.pth')
    assert done.returncode == 0, done.stderr
    (step,) = read_json(config.parent / 'run/gplq.json')
    assert step['step'] == 'W6A6' and {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(step['metrics'])
    assert 5.5 < step['effective_bits'] < 8.5
    assert Path(config.parent, step['artifact']).is_file()
    # The scales found are the search's own, not those of calibration.
    log = done.stdout + done.stderr
    assert 'no image of the search reached it' not in log
    state = torch.load(config.parent / step['checkpoint'], weights_only=True)['state_dict']
    assert all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point())
    # As it is by now it needs no training data.
    again = run(config, 'run/gplq_w6a6.pth', '--cfg-options', 'train_dataloader.dataset.ann_file=none.json')
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('train_dataloader.dataset.ann_file=none.json', 'the training data to calibrate on is missing'),
        ('train_dataloader=None', 'there is no train_dataloader to take calibration images from'),
    ],
)
def test_without_training_data_there_is_one_line(option: str, message: str, config: Path) -> None:
    done = run(config, 'fp32.pth', '--cfg-options', option)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert message in error
    assert 'Traceback' not in done.stderr

"""tools/export.py on a detector's backbone; the classifier's is with its pipeline."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')

ROOT = Path(__file__).parents[2]
FEW = dict(calibration_samples=2, exponents=(0.0, 1.0), clips=(1.0,))


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_the_backbone_of_a_detector(tiny_detector_config: Path, tmp_path: Path) -> None:
    """Patch embedding of 8 bits, two products, and two blocks of six; the neck's convolutions are not exported."""
    hook = dict(type='gplq.plugins.GPLQHook', iterations=0, validate_fp32=False, recipe=FEW)
    done = run(ROOT / 'tools/train.py', tiny_detector_config, '--cfg-options', 'train_cfg.max_epochs=1', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = tmp_path / 'gplq.py'
    config.write_text(
        f'_base_ = {str(tiny_detector_config)!r}\ndefault_hooks = dict(gplq={hook!r})\n'
        "load_from = 'work_dirs/tiny/epoch_1.pth'\n"
    )
    done = run(ROOT / 'tools/train.py', config, '--work-dir', 'run', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    arguments = [tiny_detector_config, 'run/gplq_w4a4.pth', 'backbone.onnx']
    whole = run(ROOT / 'tools/export.py', *arguments, cwd=tmp_path)
    assert whole.returncode == 2 and '--part backbone' in whole.stderr
    # Data workers that would be there at exit, beside OpenVINO.
    workers = ['--cfg-options', 'val_dataloader.num_workers=1', 'val_dataloader.persistent_workers=True']
    done = run(ROOT / 'tools/export.py', *arguments, '--part', 'backbone', '--images', 2, *workers, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    products = re.findall(r'^(\w+) .*: (\d+) products on integers, (\d+) in floating point$', done.stdout, re.M)
    equal = [float(share) for share in re.findall(r'codes equal to those in PyTorch: ([\d.]+) %', done.stdout)]
    assert [name for name, _, _ in products] == ['ONNX', 'OpenVINO']
    assert len(equal) == 2 and min(equal) > 99
    assert products[0][1:] == products[1][1:] == (str(2 + 2 * 6), '0')

    done = run(ROOT / 'tools/export.py', tiny_detector_config, 'work_dirs/tiny/epoch_1.pth', 'no.onnx', cwd=tmp_path)
    assert done.returncode == 2 and 'is not quantized' in done.stderr
    (tmp_path / 'text.pth').write_text('no checkpoint')
    done = run(ROOT / 'tools/export.py', tiny_detector_config, 'text.pth', 'no.onnx', cwd=tmp_path)
    assert done.returncode == 2 and 'text.pth' in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert not (tmp_path / 'no.onnx').exists()

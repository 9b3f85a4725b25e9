"""Two processes on the CPU: what is inserted late is synchronized and optimized as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def train_together(tmp_path: Path, checkpoint: Path, what: str) -> list[dict[str, Any]]:
    # What torchrun sets, without its start-up time and with a file in place of a port.
    common = {**os.environ, 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '0'}
    command = [sys.executable, str(HERE / 'two_ranks.py'), str(tmp_path), str(checkpoint), what]
    processes = [
        subprocess.Popen(
            command, env={**common, 'RANK': rank, 'LOCAL_RANK': rank}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        for rank in ('0', '1')
    ]
    try:
        errors = [process.communicate(timeout=240)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], '\n'.join(e[-3000:] for e in errors)
    return [torch.load(tmp_path / f'rank{rank}.pth', weights_only=True) for rank in range(2)]


def test_ranks_end_with_the_same_model(tmp_path: Path, checkpoint: Path) -> None:
    first, second = train_together(tmp_path, checkpoint, 'train')
    assert first['error'] == second['error'] == ''
    assert first['wrapper'] == 'MMDistributedDataParallel'
    assert not torch.equal(first['images'], second['images']), 'each rank has images of its own'
    moved = set()
    for when in ('calibrated', 'state'):
        assert first[when].keys() == second[when].keys()
        for name, tensor in first[when].items():
            assert torch.equal(tensor, second[when][name]), (when, name)
    for name, tensor in first['calibrated'].items():
        if not torch.equal(tensor, first['state'][name]):
            moved.add(name)
    scales = {name for name in first['state'] if name.endswith('log_scale')}
    assert len(scales) == 17 and scales <= moved, 'nine layers and two products a block have two or one scale each'
    steps = json.loads((tmp_path / 'run/gplq.json').read_text())
    assert [step['step'] for step in steps] == ['FP32', 'W32A4', 'W4A4']


def test_a_broken_loss_on_one_rank_stops_both(tmp_path: Path, checkpoint: Path) -> None:
    for result in train_together(tmp_path, checkpoint, 'spoil'):
        assert result['error'].startswith('TrainingError: the loss of iteration 1 is nan')
    assert (tmp_path / 'run/gplq_last_good.pth').is_file()

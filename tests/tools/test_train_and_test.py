"""The programs that run a config, and mmdet's own beside them, on a detector of two blocks."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import gplq.plugins.detection  # noqa: F401  isort: skip
import mmdet
import pytest
import torch

from gplq.plugins.results import read_rows

ROOT = Path(__file__).parents[2]
TRAIN, TEST = ROOT / 'tools/train.py', ROOT / 'tools/test.py'
MMDET_TOOLS = Path(mmdet.__file__).parent / '.mim/tools'


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=cwd, timeout=300)


def metrics(work_dir: Path) -> dict[str, float]:
    """Read the metrics that the last run in a working directory wrote."""
    last = sorted(path for path in work_dir.iterdir() if (path / f'{path.name}.json').is_file())[-1]
    values = json.loads((last / f'{last.name}.json').read_text(encoding='utf-8').splitlines()[-1])
    return {name: value for name, value in values.items() if name.startswith('coco/')}


def test_train_resume_and_test(tiny_detector_config: Path, tmp_path: Path) -> None:
    done = run(
        TRAIN, tiny_detector_config, '--work-dir', 'run', '--cfg-options', 'train_cfg.max_epochs=1', cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run/epoch_1.pth').is_file()

    # --amp decides, also over what a config says of another kind of mixed precision.
    mixed = ('--cfg-options', 'optim_wrapper.type=AmpOptimWrapper', 'optim_wrapper.loss_scale=dynamic')
    done = run(TRAIN, tiny_detector_config, '--work-dir', 'run', '--resume', '--amp', *mixed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'resumed epoch: 1, iter: 2' in done.stdout + done.stderr
    assert (tmp_path / 'run/epoch_2.pth').is_file()

    arguments = [tiny_detector_config, 'run/epoch_2.pth', '--work-dir', 'ours', '--out', 'predictions.pkl']
    arguments += ['--rows', 'rows.jsonl', '--benchmark', 'tiny', '--metrics', 'bbox_mAP', 'segm_mAP']
    done = run(TEST, *arguments, '--show-dir', 'pictures', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    predictions = pickle.loads((tmp_path / 'predictions.pkl').read_bytes())
    assert len(predictions) == 2
    assert all(len(p['pred_instances']['masks']) == 10 for p in predictions)
    assert len(list(tmp_path.glob('ours/*/pictures/*.png'))) == 2

    # mmdet's program imports mmcv.ops before it reads the config.
    arguments = [tiny_detector_config, 'run/epoch_2.pth', '--work-dir', 'theirs']
    done = run('-m', 'gplq.plugins.detection', MMDET_TOOLS / 'test.py', *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / 'theirs') == metrics(tmp_path / 'ours')
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(metrics(tmp_path / 'ours'))
    rows = {f'coco/{row.metric}': row.value for row in read_rows(tmp_path / 'rows.jsonl')}
    assert rows == {name: metrics(tmp_path / 'ours')[name] for name in ('coco/bbox_mAP', 'coco/segm_mAP')}


def test_quantized_checkpoint_is_measured_under_the_fp32_config(
    tiny_detector_config: Path, tiny_detector_checkpoint: Path, tmp_path: Path
) -> None:
    hook = [f'default_hooks.gplq.{key}' for key in ('type=gplq.plugins.GPLQHook', 'iterations=0', 'recipe.clips=[1.0]')]
    options = ['--work-dir', 'run', '--cfg-options', 'load_from=fp32.pth', *hook]
    done = run(TRAIN, tiny_detector_config, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    scores = []
    for name, options in (('fp32', []), ('gplq', ['--cfg-options', hook[0]])):
        arguments = ['run/gplq_w4a4.pth', '--work-dir', name, '--out', f'{name}.pkl', *options]
        done = run(TEST, tiny_detector_config, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        predictions = pickle.loads((tmp_path / f'{name}.pkl').read_bytes())
        scores.append(torch.cat([prediction['pred_instances']['scores'] for prediction in predictions]))
    assert torch.equal(*scores)


def test_mmdets_own_train_program_takes_our_configs(tiny_detector_config: Path, tmp_path: Path) -> None:
    options = ['--work-dir', 'run', '--cfg-options', 'train_cfg.max_epochs=1', 'val_evaluator.metric=bbox']
    done = run(MMDET_TOOLS / 'train.py', tiny_detector_config, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run/epoch_1.pth').is_file()


@pytest.mark.parametrize(
    ('tool', 'options', 'message'),
    [
        (TRAIN, ['--cfg-options', 'data_root=none'], 'data root none (train_dataloader) does not exist'),
        (TRAIN, ['--resume', 'none.pth'], 'checkpoint none.pth (load_from) does not exist'),
        (TEST, ['none.pth'], 'checkpoint none.pth (load_from) does not exist'),
        (TEST, ['none.pth', '--rows', 'rows.jsonl'], '--rows needs --benchmark NAME'),
        (TEST, ['none.pth', '--out', 'predictions.txt'], '--out predictions.txt: predictions are pickled'),
        (TEST, ['none.pth', '--out', '/dev/null/x.pkl'], '/dev/null/x.pkl cannot be written'),
        (TEST, ['none.pth', '--rows', '.', '--benchmark', 'b'], '. is a folder: give the name of a file in it'),
    ],
)
def test_what_is_missing_is_one_line(
    tool: Path, options: list[str], message: str, tiny_detector_config: Path, tmp_path: Path
) -> None:
    done = run(tool, tiny_detector_config, *options, cwd=tmp_path)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1
    assert message in errors[0]
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'work_dirs').exists()

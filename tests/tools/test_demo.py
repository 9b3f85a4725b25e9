from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cv2
import pytest

from gplq.plugins.detection.shapes import ShapesSettings, write_split
from gplq.plugins.results import read_rows

TOOL = Path(__file__).parents[2] / 'tools' / 'demo.py'


@pytest.fixture(scope='module')
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location('demo', TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules['demo'] = module  # where dataclasses look up annotations
    spec.loader.exec_module(module)
    return module


def record(step: str, box: float, mask: float, minutes: float) -> dict:
    return dict(
        step=step,
        metrics={'coco/bbox_mAP': box, 'coco/segm_mAP': mask},
        minutes=minutes,
        backbone_bytes=1_500_000,
        model_bytes=6_000_000,
        effective_bits=4.5,
        peak_memory_mb=700.0,
    )


@pytest.fixture
def steps(demo: ModuleType, tmp_path: Path) -> list:
    records = [record('FP32', 0.5, 0.4, 0.0), record('W32A4', 0.49, 0.39, 1.0), record('W4A4', 0.48, 0.38, 0.5)]
    (tmp_path / 'gplq.json').write_text(json.dumps(records))
    read = demo.read_records(tmp_path)
    assert list(read) == ['FP32', 'W32A4', 'W4A4']
    return [
        demo.Step('FP32', 'fp32', 32, 32, read['FP32']),
        demo.Step('W4A4', 'gplq', 4, 4, read['W4A4']),
    ]


def test_table_has_a_line_for_each_step(demo: ModuleType, steps: list, capsys: pytest.CaptureFixture) -> None:
    demo.print_table(steps)
    lines = capsys.readouterr().out.strip('\n').splitlines()
    assert lines[0].split() == 'box AP mask AP backbone MB model MB minutes'.split()
    assert lines[1].split() == ['FP32', '0.500', '0.400', '1.50', '6.00', '0.0']
    assert lines[2].split() == ['W4A4', '0.480', '0.380', '1.50', '6.00', '1.5'], 'minutes from the FP32 model on'
    assert len({len(line) for line in lines}) == 1


def test_rows_say_where_they_come_from(demo: ModuleType, steps: list, tmp_path: Path) -> None:
    checkpoint = tmp_path / 'epoch_1.pth'
    checkpoint.write_bytes(b'weights')
    demo.write_rows(tmp_path / 'results.jsonl', steps, checkpoint, seed=3)
    rows = read_rows(tmp_path / 'results.jsonl')
    assert [(r.method, r.weight_bits, r.activation_bits, r.metric, r.value) for r in rows] == [
        ('fp32', 32, 32, 'bbox_mAP', 0.5),
        ('fp32', 32, 32, 'segm_mAP', 0.4),
        ('gplq', 4, 4, 'bbox_mAP', 0.48),
        ('gplq', 4, 4, 'segm_mAP', 0.38),
    ]
    assert {r.benchmark for r in rows} == {'demo'} and {r.seed for r in rows} == {3}


def test_pictures_of_both_detectors_side_by_side(demo: ModuleType, tmp_path: Path) -> None:
    write_split(tmp_path, 'val', 3, ShapesSettings(size=64, max_radius=16))
    confident = dict(image_id=1, category_id=1, score=0.9, bbox=[10, 10, 30, 30])
    unsure = dict(confident, score=0.1)
    for name, predictions in (('fp32', [confident]), ('unsure', [unsure])):
        (tmp_path / f'{name}.json').write_text(json.dumps(predictions))
    files = {'FP32': tmp_path / 'fp32.json', '4 bit': tmp_path / 'unsure.json'}
    folder = demo.draw_pictures(tmp_path, tmp_path, files, count=2)
    assert sorted(p.name for p in folder.iterdir()) == ['000000.png', '000001.png']
    picture = cv2.imread(str(folder / '000000.png'))[20:]
    # What is there, then the two detectors.
    width = picture.shape[1] // 3
    truth, confident_one, unsure_one = (picture[:, n * width : (n + 1) * width] for n in range(3))
    assert (confident_one != unsure_one).any() and (truth != unsure_one).any()
    untouched = cv2.imread(str(folder / '000001.png'))[20:]
    assert (untouched[:, width : 2 * width] == untouched[:, 2 * width :]).all()


@pytest.mark.slow
def test_quick_demo_from_start_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), '--quick', '--work-dir', str(tmp_path), '--pictures', '2']
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = read_rows(tmp_path / 'results.jsonl')
    assert len(rows) == 8
    assert len(list((tmp_path / 'pictures').iterdir())) == 2
    size = {(r.weight_bits, r.activation_bits): r.artifact_bytes for r in rows}
    assert size[4, 4] < size[32, 4] <= size[32, 32]

"""Take a Mask R-CNN with a plain ViT from FP32 to 4 bits on generated images; what `make demo` runs.

Draws the images, trains the FP32 detector, then runs the two-line config with 32 bits (the control: the same
extra training, no quantizers) and with 4 bits. Prints a table, writes pictures and rows of results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.utils import track_iter_progress

from gplq.plugins.command_line import exit_on_error
from gplq.plugins.detection.pictures import draw_predictions, side_by_side
from gplq.plugins.detection.shapes import CLASSES, ShapesSettings, is_written, write_split
from gplq.plugins.hooks.report import STEPS, minutes_up_to, read_steps
from gplq.plugins.results import ResultRow, append_row, commit, file_sha256, repeat_command, versions

ROOT = Path(__file__).resolve().parents[1]
FP32_CONFIG = ROOT / 'configs/mask_rcnn_vit-tiny_shapes.py'
GPLQ_CONFIG = ROOT / 'configs/gplq_mask_rcnn_vit-tiny_shapes.py'
RUNS = ('FP32 training', 'FP32 control', 'GPLQ', 'FP32 predictions', '4-bit predictions')
METRICS = {'bbox_mAP': 'box AP', 'segm_mAP': 'mask AP'}
# Lower scores would hide the picture under boxes.
MIN_SCORE = 0.3
EXAMPLE = 'example: python tools/demo.py --quick'


@dataclass(frozen=True)
class Scale:
    """How many images are drawn, for how many epochs the FP32 detector sees them, how many at once."""

    train: int
    val: int
    epochs: int
    batch: int
    warmup: int


FULL = Scale(train=1800, val=256, epochs=Config.fromfile(FP32_CONFIG).max_epochs, batch=4, warmup=200)
# Small batches: so few images must make for some hundred steps, or the detector finds nothing at all.
QUICK = Scale(train=96, val=12, epochs=3, batch=2, warmup=20)


@dataclass(frozen=True)
class Step:
    """One line of the table."""

    name: str
    method: str
    weight_bits: int
    activation_bits: int
    record: dict[str, Any]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--quick', action='store_true', help='few images: a minute and a half, figures that mean nothing'
    )
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/demo, or work_dirs/demo_quick')
    parser.add_argument('--seed', type=int, default=0, help='of images and training (default: %(default)s)')
    parser.add_argument('--pictures', type=int, default=12, help='how many are drawn (default: %(default)s)')
    return parser.parse_args()


def draw_data(root: Path, scale: Scale, seed: int) -> None:
    settings = ShapesSettings(seed=seed)
    for split, images in (('train', scale.train), ('val', scale.val)):
        if not is_written(root, split, images, settings):
            print(f'drawing {images} images for {split}')
            write_split(root, split, images, settings, progress=track_iter_progress)
            print()


def run_tool(title: str, name: str, *args: str | Path, options: dict[str, Any]) -> float:
    """Run one of our tools as a user would; give its minutes.

    Args:
        title: one of `RUNS`.
    """
    command = ['python', f'tools/{name}', *map(str, args)]
    command += ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
    print(f'\n== {title}, run {RUNS.index(title) + 1} of {len(RUNS)}\n$ {shlex.join(command)}', flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command[1:]], cwd=ROOT)
    if done.returncode:
        sys.exit(f'tools/{name} failed; its log is above')
    return (time.perf_counter() - start) / 60


def train_fp32(work: Path, scale: Scale, options: dict[str, Any]) -> tuple[Path, float]:
    """Train, unless this has been done here already; give the checkpoint and the minutes it took."""
    epochs = scale.epochs
    checkpoint, record = work / f'epoch_{epochs}.pth', work / 'trained.json'
    recipe = (Config.fromfile(FP32_CONFIG).to_dict(), scale, options)
    config = hashlib.sha256(str(recipe).encode()).hexdigest()
    done = json.loads(record.read_text()) if record.is_file() and checkpoint.is_file() else {}
    if done.get('config') == config:
        print(f'the FP32 detector is there already; remove {work} to train it again')
        return checkpoint, float(done['minutes'])
    schedule = {
        'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs,
        'param_scheduler.0.end': scale.warmup,
        'param_scheduler.1.end': epochs,
        'param_scheduler.1.T_max': epochs,
        'default_hooks.checkpoint.interval': epochs,
    }
    minutes = run_tool(RUNS[0], 'train.py', FP32_CONFIG, '--work-dir', work, options=options | schedule)
    record.write_text(json.dumps({'config': config, 'minutes': minutes}))
    return checkpoint, minutes


def read_records(work: Path) -> dict[str, dict[str, Any]]:
    """Read what the hook noted, by step: metrics, minutes up to it, bytes and files."""
    records = read_steps(work / STEPS)
    minutes = [minutes_up_to(records, record['step']) for record in records]
    for record, spent in zip(records, minutes, strict=True):
        record['minutes'] = spent
        record['metrics'] = {name.removeprefix('coco/'): v for name, v in record['metrics'].items()}
    return {record['step']: record for record in records}


def print_table(steps: list[Step]) -> None:
    head = ['', *METRICS.values(), 'backbone MB', 'model MB', 'minutes']
    lines = [head]
    for step in steps:
        lines.append(
            [step.name]
            + [f'{step.record["metrics"][metric]:.3f}' for metric in METRICS]
            + [f'{step.record[size] / 1e6:.2f}' for size in ('backbone_bytes', 'model_bytes')]
            + [f'{step.record["minutes"]:.1f}']
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    print()
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        print('  '.join(cells))


def write_rows(path: Path, steps: list[Step], checkpoint: Path, seed: int) -> None:
    shared: dict[str, Any] = dict(
        benchmark='demo',
        split='val',
        model='mask_rcnn_vit-tiny',
        scope='backbone',
        checkpoint_sha256=file_sha256(checkpoint),
        seed=seed,
        command=repeat_command(),
        commit=commit(),
        versions=versions(),
    )
    for step in steps:
        for metric in METRICS:
            row = ResultRow(
                method=step.method,
                weight_bits=step.weight_bits,
                activation_bits=step.activation_bits,
                effective_bits=step.record['effective_bits'],
                metric=metric,
                value=step.record['metrics'][metric],
                minutes=step.record['minutes'],
                peak_memory_mb=step.record['peak_memory_mb'],
                artifact_bytes=step.record['model_bytes'],
                **shared,
            )
            append_row(path, row)


def draw_pictures(work: Path, data: Path, predictions: dict[str, Path], count: int) -> Path:
    """Draw the first images: what is there, and each detector's predictions, next to each other."""
    folder = work / 'pictures'
    folder.mkdir(exist_ok=True)
    annotated = json.loads((data / 'annotations/val.json').read_text())
    images = annotated['images'][:count]
    # What is there is no prediction and has no score.
    found = {'truth': [{**annotation, 'score': 1.0} for annotation in annotated['annotations']]}
    found |= {title: json.loads(path.read_text()) for title, path in predictions.items()}
    for image in images:
        pixels = np.asarray(cv2.imread(str(data / 'val' / image['file_name'])))[:, :, ::-1]
        columns = [
            draw_predictions(
                pixels, [p for p in of if p['image_id'] == image['id'] and p['score'] >= MIN_SCORE], CLASSES
            )
            for of in found.values()
        ]
        cv2.imwrite(str(folder / image['file_name']), side_by_side(columns, list(found))[:, :, ::-1])
    return folder


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    scale = QUICK if args.quick else FULL
    work = (args.work_dir or ROOT / 'work_dirs' / ('demo_quick' if args.quick else 'demo')).resolve()
    data = work / 'data'
    draw_data(data, scale, args.seed)
    options: dict[str, Any] = {
        'data_root': data,
        'randomness.seed': args.seed,
        'train_dataloader.batch_size': scale.batch,
    }
    checkpoint, minutes = train_fp32(work / 'fp32', scale, options)

    options['load_from'] = checkpoint
    floating = {
        'default_hooks.gplq.weight_bits': 32,
        'default_hooks.gplq.activation_bits': 32,
        'default_hooks.gplq.validate_fp32': False,
    }
    run_tool(RUNS[1], 'train.py', GPLQ_CONFIG, '--work-dir', work / 'fp32_control', options=options | floating)
    run_tool(RUNS[2], 'train.py', GPLQ_CONFIG, '--work-dir', work / 'gplq', options=options)

    records = read_records(work / 'gplq')
    records['FP32']['minutes'] = minutes
    control = read_records(work / 'fp32_control')['FP32 control']
    steps = [
        Step('FP32', 'fp32', 32, 32, records['FP32']),
        Step('FP32 control', 'fp32_control', 32, 32, control),
        Step('W32A4', 'gplq', 32, 4, records['W32A4']),
        Step('W4A4', 'gplq', 4, 4, records['W4A4']),
    ]

    # The figures above are those of the hook; the pictures show what the saved checkpoints predict.
    predictions = {}
    for run, title, config, weights in (
        (RUNS[3], 'FP32', FP32_CONFIG, checkpoint),
        (RUNS[4], '4 bit', GPLQ_CONFIG, Path(records['W4A4']['checkpoint'])),
    ):
        prefix = work / title.replace(' ', '_').lower()
        options = {'data_root': data, 'test_evaluator.outfile_prefix': prefix}
        run_tool(run, 'test.py', config, weights, '--work-dir', work / 'test', options=options)
        predictions[title] = prefix.with_suffix('.segm.json')
    pictures = draw_pictures(work, data, predictions, args.pictures)
    write_rows(work / 'results.jsonl', steps, checkpoint, args.seed)
    print_table(steps)
    print(f'\npictures: {pictures}\nrows: {work / "results.jsonl"}')
    print(f'4-bit detector: {records["W4A4"]["artifact"]}')
    print(f'{(time.perf_counter() - start) / 60:.1f} minutes in all')


if __name__ == '__main__':
    exit_on_error(main)

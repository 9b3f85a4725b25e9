"""Write a quantized checkpoint as ONNX and see what ONNX Runtime and OpenVINO make of it.

The file's outputs are compared with the model's on images of the config's validation data: how many codes of
activations are equal, how many products the engine runs on integers by its own account, and, for a classifier, top-1.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import Runner
from torch import Tensor, nn

import gplq
from gplq.errors import CheckpointError, GPLQError
from gplq.exported import codes_of, exported_twin
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.plugins.engines import ENGINES, Engine, with_codes
from gplq.plugins.hooks.model import is_classifier, model_of
from gplq.plugins.hooks.restore_hook import RestoreHook
from gplq.plugins.preflight import preflight
from gplq.record import is_prepared

EXAMPLE = """example:
  python tools/export.py configs/vit-mini_objects100.py work_dirs/gplq_vit-mini_objects100/gplq_w4a4.pth vit.onnx
  python tools/export.py configs/mask_rcnn_vit-tiny_shapes.py work_dirs/demo/gplq/gplq_w4a4.pth vit.onnx \\
      --part backbone --cfg-options data_root=work_dirs/demo/data"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint', help='of the weight stage')
    parser.add_argument('output', type=Path, metavar='FILE.onnx')
    parser.add_argument('--part', default='', help="submodule to export, such as a detector's backbone; default: all")
    parser.add_argument('--images', type=int, default=256, help='to compare on (default: 256)')
    parser.add_argument('--engines', nargs='*', choices=ENGINES, default=list(ENGINES), help='default: both')
    add_run_arguments(parser)
    return parser.parse_args()


def load(args: argparse.Namespace) -> Runner:
    cfg = read_config(args)
    cfg.load_from = args.checkpoint
    preflight(cfg, splits=('val',))
    # A worker that outlives the loop ends the process with a segmentation fault once OpenVINO was there.
    cfg.val_dataloader.update(num_workers=0, persistent_workers=False)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(RestoreHook())
    runner.load_or_resume()
    if not is_prepared(model_of(runner)):
        raise CheckpointError(f'{args.checkpoint} is not quantized: train it with the hook, or name gplq_w4a4.pth')
    return runner


def batches(runner: Runner, count: int) -> list[tuple[Tensor, Tensor | None]]:
    """Images as the model takes them, with their labels where they are classes; alike in size or the first alone."""
    model, samples = model_of(runner), 0
    found: list[tuple[Tensor, Tensor | None]] = []
    for data in runner.val_dataloader:
        data = model.data_preprocessor(data, False)
        images = data['inputs']
        if found and found[0][0].shape[1:] != images.shape[1:]:
            continue
        found.append((images, labels_of(data)))
        samples += len(images)
        if samples >= count:
            break
    return found


def labels_of(batch: dict[str, Any]) -> Tensor | None:
    """Classes as this project's data sets give them, or mmpretrain's; None for other tasks."""
    if 'labels' in batch:
        return torch.as_tensor(batch['labels'])
    labels = [getattr(sample, 'gt_label', None) for sample in batch.get('data_samples') or []]
    known = [label.reshape(1) for label in labels if label is not None]
    return torch.cat(known) if known and len(known) == len(labels) else None


def report(engine: Engine, path: Path, twin: nn.Module, model: nn.Module, data: list[Any], open_engine: Any) -> None:
    right = theirs = equal = codes = labelled = 0
    with tempfile.TemporaryDirectory() as folder:
        seen_path = Path(folder, 'codes.onnx')
        count = with_codes(path, seen_path)
        watching = open_engine(seen_path)
        for images, labels in data:
            for own, found in zip(codes_of(twin, images), watching.run(images.numpy())[-count:], strict=True):
                equal += int((own == torch.from_numpy(found)).sum())
                codes += own.numel()
            if labels is not None:
                with torch.no_grad():
                    right += int((model(images).argmax(1) == labels).sum())
                theirs += int((torch.from_numpy(engine.run(images.numpy())[0]).argmax(1) == labels).sum())
                labelled += len(labels)
    print(f'{engine.name}: {engine.integer} products on integers, {engine.floating} in floating point')
    print(f'  codes equal to those in PyTorch: {100 * equal / codes:.4f} % of {codes:,}')
    if labelled:
        print(
            f'  top-1 {100 * theirs / labelled:.2f} %, in PyTorch {100 * right / labelled:.2f} %, on {labelled} images'
        )


def main() -> None:
    args = parse_args()
    if args.images < 1:
        raise GPLQError(f'--images {args.images} must be at least 1')
    runner = load(args)
    model = model_of(runner).cpu().eval()
    if not args.part and not is_classifier(model):
        raise GPLQError(
            f'{type(model).__name__} cannot be exported as a whole: name what takes images, --part backbone'
        )
    data = batches(runner, args.images)
    images = data[0][0]
    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    gplq.export(model, args.output, example, part=args.part)
    print(f'{args.output}: {args.output.stat().st_size / 1e6:.2f} MB')
    twin = exported_twin(model).get_submodule(args.part)
    for name in args.engines:
        open_engine = ENGINES[name]
        report(open_engine(args.output), args.output, twin, model.get_submodule(args.part), data, open_engine)


if __name__ == '__main__':
    exit_on_error(main)

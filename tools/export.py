"""Write a quantized checkpoint as ONNX and see what ONNX Runtime and OpenVINO make of it.

The file is compared with the model on images of the config's validation data: how many codes of activations are
equal, how far the outputs differ, how many products the engine runs on integers by its own account, and, for a
classifier, top-1.
With --rounds the file is timed against the FP32 model in the same engine, and in bfloat16 where the engine computes
that here, all in turn.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

import gplq
from gplq.errors import CheckpointError, GPLQError
from gplq.exported import exported_twin, outputs_and_codes
from gplq.files import check_writable
from gplq.onnx_graph import onnx_graph
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.plugins.engines import ENGINES, Engine, open_openvino, openvino_computes_bfloat16, with_codes
from gplq.plugins.hooks.checkpoints import check_source
from gplq.plugins.hooks.model import is_classifier, model_of
from gplq.plugins.hooks.restore_hook import RestoreHook
from gplq.plugins.paired_timing import WARM_UP, time_in_turn
from gplq.plugins.preflight import preflight
from gplq.plugins.results import ResultRow, append_figures, commit, file_sha256, repeat_command, versions
from gplq.record import is_prepared, record_of

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
    parser.add_argument('--rounds', type=int, default=0, help='of the timing (default: 0, none)')
    parser.add_argument('--batch', type=int, default=1, help='images at a time in the timing (default: 1)')
    parser.add_argument('--threads', type=int, default=1, help='of the engines (default: 1)')
    parser.add_argument(
        '--fixed-batch', action='store_true', help='for models that cannot be traced with a batch of any size: --batch'
    )
    parser.add_argument('--method', default='gplq', help='of the checkpoint, for the rows (default: gplq)')
    parser.add_argument('--seed', type=int, default=0, help='likewise (default: 0)')
    parser.add_argument('--rows', type=Path, metavar='FILE.jsonl', help='append the figures as result rows')
    add_run_arguments(parser)
    return parser.parse_args()


def load(args: argparse.Namespace) -> Runner:
    cfg = read_config(args)
    cfg.load_from = args.checkpoint
    if not cfg.get('val_dataloader'):
        raise GPLQError(f'{args.config} has no val_dataloader, on whose images the file is compared with the model')
    preflight(cfg, splits=('val',))
    # A worker that outlives the loop ends the process with a segmentation fault once OpenVINO was there.
    cfg.val_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.val_dataloader.pop('prefetch_factor', None)
    if args.fixed_batch:
        cfg.val_dataloader.batch_size = args.batch
    runner = Runner.from_cfg(cfg)
    runner.register_hook(RestoreHook())
    check_source(runner)
    runner.load_or_resume()
    if not is_prepared(model_of(runner)):
        raise CheckpointError(f'{args.checkpoint} is not quantized: train it with the hook, or name gplq_w4a4.pth')
    return runner


def batches(runner: Runner, count: int, part: str, fixed: bool) -> list[tuple[Tensor, Tensor | None]]:
    """Images as the model takes them, alike in size or the first alone; with labels where the file gives classes.

    Args:
        runner: of the model.
        count: of images, at least.
        part: what is exported; a backbone's features are no classes.
        fixed: only batches of as many images as the first.
    """
    model, samples = model_of(runner), 0
    found: list[tuple[Tensor, Tensor | None]] = []
    for data in runner.val_dataloader:
        data = model.data_preprocessor(data, False)
        images = data['inputs']
        if found and found[0][0].shape[1 - fixed :] != images.shape[1 - fixed :]:
            continue
        found.append((images, None if part else labels_of(data)))
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


def compare(
    engine: Engine, watching: Engine, sites: int, twin: nn.Module, model: nn.Module, data: list[Any]
) -> dict[str, float]:
    """What the engine makes of the file: shares in percent, and for a classifier top-1 here and in PyTorch.

    ``equal_images`` are those none of whose codes differ. ``output_error`` is the root mean square of the outputs'
    differences from those on codes in PyTorch, in percent of the outputs' own. ``top1_torch`` is of the model as it is
    tested, on rounded values, and ``top1_torch_codes`` on the codes. ``watching`` has the file with the codes of so
    many ``sites`` as its last outputs; an engine may run it otherwise than the file itself, whose outputs tell.

    Raises:
        GPLQError: if the file's sites are not those of the model.
    """
    right = ours_right = theirs = equal = codes = labelled = same = samples = 0
    error = size = 0.0
    for images, labels in data:
        with engine.reference():
            outputs, ours = outputs_and_codes(twin, images)
        differ = torch.zeros(len(images), dtype=torch.bool)
        if len(ours) != sites:
            raise GPLQError(f'the file rounds {sites} times and the model {len(ours)} times: codes cannot be compared')
        for mine, found in zip(ours, watching.run(images.numpy())[-sites:], strict=True):
            other = mine != torch.from_numpy(found)
            equal += mine.numel() - int(other.sum())
            codes += mine.numel()
            differ |= _by_image(other, len(images))
        same += int((~differ).sum())
        samples += len(images)
        given = [torch.from_numpy(found) for found in engine.run(images.numpy())]
        error += sum(float((found - mine).double().square().sum()) for found, mine in zip(given, outputs, strict=True))
        size += sum(float(mine.double().square().sum()) for mine in outputs)
        if labels is not None:
            with torch.no_grad():
                right += int((model(images).argmax(1) == labels).sum())
            ours_right += int((outputs[0].argmax(1) == labels).sum())
            theirs += int((given[0].argmax(1) == labels).sum())
            labelled += len(labels)
    figures = {
        'codes': codes,
        'equal_codes': 100 * equal / codes,
        'equal_images': 100 * same / samples,
        'output_error': 100 * math.sqrt(error / size) if size else 0.0,
        'integer_products': engine.integer,
        'float_products': engine.floating,
    }
    if labelled:
        correct = {'top1': theirs, 'top1_torch': right, 'top1_torch_codes': ours_right}
        figures |= {name: 100 * count / labelled for name, count in correct.items()}
    return figures


def _by_image(marked: Tensor, images: int) -> Tensor:
    """Which images have a marked element; one that is not computed for each of them is everyone's."""
    return marked.reshape(images, -1).any(1) if len(marked) % images == 0 else marked.any().expand(images)


def rivals(name: str, path: Path, threads: int) -> Iterator[tuple[str, Engine]]:
    """The FP32 model in an engine's floating-point precisions."""
    yield 'float32', ENGINES[name](path, threads)
    if name == 'openvino' and openvino_computes_bfloat16():
        yield 'bfloat16', open_openvino(path, threads, 'bf16')


def write_fp32(runner: Runner, part: str, example: Tensor, path: Path, fixed: bool) -> None:
    """The config's model, unquantized; how long it takes does not depend on its weights."""
    model = MODELS.build(copy.deepcopy(runner.cfg.model)).cpu().eval()
    path.write_bytes(onnx_graph(model.get_submodule(part), (example,), fixed).SerializeToString())


def measure(args: argparse.Namespace, runner: Runner, data: list[Any]) -> None:
    """Print what each engine makes of the file, and keep it where rows are asked for."""
    model = model_of(runner)
    twin = exported_twin(model).get_submodule(args.part)
    with tempfile.TemporaryDirectory() as folder:
        fp32, watched = Path(folder, 'fp32.onnx'), Path(folder, 'codes.onnx')
        sites = with_codes(args.output, watched)
        if args.rounds:
            write_fp32(runner, args.part, example_of(data, args.fixed_batch), fp32, args.fixed_batch)
        for name in args.engines:
            engine = ENGINES[name](args.output, args.threads)
            watching = ENGINES[name](watched, args.threads)
            figures = compare(engine, watching, sites, twin, model.get_submodule(args.part), data)
            print(f'{engine.name}: {engine.integer} products on integers, {engine.floating} in floating point')
            print(f'  codes equal to those in PyTorch: {figures["equal_codes"]:.4f} % of {figures["codes"]:,}')
            print(f'  images none of whose codes differ: {figures["equal_images"]:.2f} %')
            print(f'  outputs differ from those in PyTorch by {figures["output_error"]:.4f} % of their size')
            if 'top1' in figures:
                count = sum(len(images) for images, _ in data)
                print(
                    f'  top-1 {figures["top1"]:.2f} %, in PyTorch {figures["top1_torch"]:.2f} % and on codes there '
                    f'{figures["top1_torch_codes"]:.2f} %, on {count} images'
                )
            found = {'quantized': figures}
            if args.rounds:
                timed = {'quantized': engine, **dict(rivals(name, fp32, args.threads))}
                images = torch.cat([images for images, _ in data])[: args.batch]
                runs = {kind: rival.run for kind, rival in timed.items()}
                seconds = time_in_turn(runs, [images.numpy()] * (WARM_UP + args.rounds))
                for kind, figures in latencies(seconds).items():
                    found[kind] = {**found.get(kind, {}), **figures}
                    print(
                        f'  {kind}: {figures["latency_ms"]:.2f} ms for {len(images)} images, '
                        f'{figures["latency_ratio"]:.2f} of float32'
                    )
            if args.rows:
                for kind, figures in found.items():
                    append_figures(args.rows, _row(args, runner, kind, engine.name), figures)


def latencies(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median milliseconds, and the median over rounds of the ratio to float32."""
    floating = seconds['float32']
    return {
        kind: {
            'latency_ms': 1000 * statistics.median(own),
            'latency_ratio': statistics.median(a / b for a, b in zip(own, floating, strict=True)),
        }
        for kind, own in seconds.items()
    }


def _row(args: argparse.Namespace, runner: Runner, kind: str, engine: str) -> ResultRow:
    recipe = record_of(model_of(runner)).plan.recipe
    quantized = kind == 'quantized'
    return ResultRow(
        benchmark='export',
        split=runner.cfg.val_dataloader.dataset.get('split', 'val'),
        model=Path(args.config).stem.removeprefix('gplq_'),
        scope='backbone',
        checkpoint_sha256=file_sha256(args.checkpoint),
        method=args.method if quantized else 'fp32',
        weight_bits=recipe.weight_bits if quantized else 32,
        activation_bits=recipe.activation_bits if quantized else 32,
        effective_bits=None,
        seed=args.seed,
        metric='any',
        value=0.0,
        minutes=None,
        peak_memory_mb=None,
        artifact_bytes=args.output.stat().st_size if quantized else None,
        command=repeat_command(),
        commit=commit(),
        versions=versions(),
        variant=', '.join([engine, *([kind] if kind == 'bfloat16' else []), *_timed(args)]),
    )


def _timed(args: argparse.Namespace) -> list[str]:
    """What latencies depend on, so that tables keep them apart."""
    return [f'batch of {args.batch}', f'threads: {args.threads}'] if args.rounds else []


def main() -> None:
    args = parse_args()
    for name, least in (('images', 1), ('rounds', 0), ('batch', 1), ('threads', 1)):
        if getattr(args, name) < least:
            raise GPLQError(f'--{name} {getattr(args, name)} must be at least {least}')
    for path in filter(None, (args.output, args.rows)):
        check_writable(path)
    runner = load(args)
    model = model_of(runner).cpu().eval()
    if not args.part and not is_classifier(model):
        raise GPLQError(
            f'{type(model).__name__} cannot be exported as a whole: name what takes images, --part backbone'
        )
    data = batches(runner, max(args.images, args.batch if args.rounds else 1), args.part, args.fixed_batch)
    example = example_of(data, args.fixed_batch)
    gplq.export(model, args.output, example, part=args.part, fixed_batch=args.fixed_batch)
    print(f'{args.output}: {args.output.stat().st_size / 1e6:.2f} MB')
    measure(args, runner, data)


def example_of(data: list[Any], fixed: bool) -> Tensor:
    """Images to trace a model with: two, or a whole batch where its size is fixed."""
    images: Tensor = data[0][0]
    if fixed:
        return images
    return images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)


if __name__ == '__main__':
    exit_on_error(main)

"""Store what a classifier says of crops of its training images, for students to learn from (multi-crop distillation).

Every image of the config's training data gets crops as RandomResizedCrop draws them, half of them mirrored; of each the
likeliest classes are kept with their chances. `gplq.plugins.fgvc.MultiCropDataset` reads the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.utils import track_iter_progress
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from gplq.errors import DataError
from gplq.plugins.command_line import add_run_arguments, exit_on_error, read_config
from gplq.plugins.fgvc.multi_crop import cut, paths_of
from gplq.plugins.fgvc.soft_labels import PARTS, Crops, Seen, top_chances, write_soft_labels
from gplq.plugins.hooks.checkpoints import load_weights
from gplq.plugins.hooks.model import preprocess
from gplq.plugins.type_name import type_name

EXAMPLE = """example:
  python tools/store_soft_labels.py configs/swin-mini_objects100.py fp32.pth soft_labels.safetensors \\
      --crops 50 --cfg-options data_root=data/objects100"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help="the teacher's, whose training data is labeled")
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('output', help='.safetensors')
    parser.add_argument('--crops', type=int, default=50, help='of each image (default: %(default)s)')
    parser.add_argument('--top', type=int, default=5, help='classes kept of each crop (default: %(default)s)')
    parser.add_argument('--scale', nargs=2, type=float, default=[0.35, 1.0], help='share of the image (0.35 1.0)')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default: %(default)s')
    add_run_arguments(parser)
    return parser.parse_args()


def unwrapped(dataset: dict[str, Any]) -> dict[str, Any]:
    """The config of the data set inside wrappers such as RepeatDataset."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def normalization_of(cfg: Config) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels by which the config's evaluation normalizes; ImageNet's otherwise."""
    config = unwrapped((cfg.get('val_dataloader') or {}).get('dataset') or {})
    steps = [inner for step in config.get('pipeline') or () for inner in (step, *(step.get('transforms') or ()))]
    for step in steps:
        if step.get('mean') is not None and step.get('std') is not None:
            return list(step['mean']), list(step['std'])
    return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)


@torch.no_grad()
def main() -> None:
    args = parse_args()
    cfg = read_config(args)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = MODELS.build(cfg.model)
    load_weights(model, args.checkpoint, args.config)
    model.eval().to(args.device)
    num_classes = model.head.out_features
    if args.crops < 1 or not 1 <= args.top <= num_classes:
        raise DataError(f'--crops {args.crops} must be at least 1, --top {args.top} between 1 and {num_classes}')
    config = unwrapped(cfg.train_dataloader.dataset)
    reading = [step for step in config.get('pipeline') or () if type_name(step['type']) == 'LoadImage']
    dataset = DATASETS.build({**config, 'pipeline': reading or [dict(type='gplq.plugins.fgvc.LoadImage')]})
    mean, std = normalization_of(cfg)
    size = int(model.backbone.img_size[0])
    torch.manual_seed(args.seed)
    found = []
    for number in track_iter_progress(range(len(dataset))):
        picture = dataset[number]['img']
        draws = [RandomResizedCrop.get_params(picture, args.scale, (3 / 4, 4 / 3)) for _ in range(args.crops)]
        boxes = torch.tensor([[left, top, width, height] for top, left, height, width in draws], dtype=torch.int16)
        flips = torch.rand(args.crops) < 0.5
        crops = [cut(picture, box, bool(flip), size) for box, flip in zip(boxes.tolist(), flips, strict=True)]
        inputs = list(F.normalize(torch.stack(crops), mean, std))
        logits = model(preprocess(model, {'inputs': inputs})['inputs'])
        classes, chances = top_chances(logits.cpu(), args.top)
        found.append(Crops(boxes, flips, classes, chances))
    whole = Crops(*(torch.stack([getattr(one, part) for one in found]) for part in PARTS))
    seen = Seen(size, tuple(mean), tuple(std))
    write_soft_labels(args.output, whole, paths_of(dataset), num_classes, Path(args.config).stem, seen)
    print(f'\n{len(dataset)} images with {args.crops} crops each: {args.output}')


if __name__ == '__main__':
    exit_on_error(main)

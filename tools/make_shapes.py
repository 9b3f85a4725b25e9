"""Draw a small detection and segmentation data set in COCO's format: overlapping textured shapes."""

from __future__ import annotations

import argparse

from mmengine.utils import track_iter_progress

from gplq.plugins.command_line import exit_on_error
from gplq.plugins.detection.shapes import SPLITS, ShapesSettings, is_written, write_split

EXAMPLE = 'example: python tools/make_shapes.py work_dirs/shapes --train 2000 --val 256'


def parse_args() -> argparse.Namespace:
    defaults = ShapesSettings()
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument('root', help='folder to write: SPLIT/*.png and annotations/SPLIT.json')
    for split, images in zip(SPLITS, (2000, 256, 0), strict=True):
        parser.add_argument(f'--{split}', type=int, default=images, help=f'images, 0 for none (default: {images})')
    parser.add_argument('--size', type=int, default=defaults.size, help='side in pixels (default: %(default)s)')
    parser.add_argument(
        '--max-objects', type=int, default=defaults.max_objects, help='shapes an image (default: %(default)s)'
    )
    parser.add_argument('--seed', type=int, default=defaults.seed, help='default: %(default)s')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    settings = ShapesSettings(size=args.size, max_objects=args.max_objects, seed=args.seed)
    for split in SPLITS:
        images = getattr(args, split)
        if not images:
            continue
        if is_written(args.root, split, images, settings):
            print(f'{split}: {images} images are there already')
            continue
        path = write_split(args.root, split, images, settings, progress=track_iter_progress)
        print(f'\n{split}: {images} images, {path}')


if __name__ == '__main__':
    exit_on_error(main)

"""CUB-200-2011 and data sets laid out like it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, get_type_hints

from gplq.errors import DataError
from gplq.typecheck import check_types

from .image_dataset import ImageDataset

__all__ = ['CUBDataset']

HOW = (
    'CUB-200-2011 comes from https://www.vision.caltech.edu/datasets/cub_200_2011/ (CUB_200_2011.tgz); data_root is '
    'the unpacked folder with images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and images/'
)
# Of any number in the lists.
_DIGITS = 18


class CUBDataset(ImageDataset):
    """Images listed in `images.txt`, with their classes, splits and boxes in files of the same numbers.

    Args:
        data_root: the folder that holds these files.
        split: `train` and `test` are those of `train_test_split.txt`; other names are looked up in `split_file`.
        split_file: names a split for each image that is not for training, `NUMBER NAME` a line.
        crop: give the pipeline the birds' boxes, to which `LoadImage` cuts.

    Raises:
        DataError: a file is missing or damaged; the message says where the data comes from and how it must lie.
        RecipeError: a setting is of the wrong type.
    """

    def __init__(
        self,
        data_root: str | Path,
        split: str = 'train',
        split_file: str | None = None,
        crop: bool = False,
        **kwargs: Any,
    ) -> None:
        settings = dict(data_root=data_root, split=split, split_file=split_file, crop=crop)
        check_types(settings, get_type_hints(CUBDataset.__init__), 'CUBDataset: ')
        self.split = split
        self.split_file = split_file
        self.crop = crop
        kwargs['metainfo'] = {'classes': self._classes(Path(data_root)), **(kwargs.get('metainfo') or {})}
        super().__init__(data_root=data_root, **kwargs)

    @staticmethod
    def source(config: Mapping[str, Any]) -> str:
        """Where the data of a config comes from, and how it lies."""
        return HOW

    def load_data_list(self) -> list[dict[str, Any]]:
        """The split's images in the order of their numbers."""
        root = Path(self.data_root)
        paths = _table(root / 'images.txt')
        labels = _table(root / 'image_class_labels.txt')
        boxes = _table(root / 'bounding_boxes.txt') if self.crop else {}
        chosen = self._chosen(root, paths)
        samples = []
        for number in sorted(chosen, key=int):
            if number not in paths or number not in labels:
                raise DataError(f'{root}: image {number} of the split has no path or no class; {HOW}')
            path = root / 'images' / paths[number]
            if not path.is_file():
                raise DataError(f'{path} is missing; {HOW}')
            label = _label(root, number, labels[number], len(self.metainfo['classes']))
            sample: dict[str, Any] = {'img_path': str(path), 'gt_label': label}
            if self.crop:
                sample['box'] = _box(root, number, boxes.get(number, ''))
            samples.append(sample)
        return samples

    def _chosen(self, root: Path, paths: Mapping[str, str]) -> list[str]:
        held = _table(root / 'train_test_split.txt')
        wrong = [f'{number} {flag}' for number, flag in held.items() if flag not in ('0', '1')]
        if wrong:
            raise DataError(
                f'{root}: train_test_split.txt has {wrong[0]!r}, where the image is 1 for train or 0 for test'
            )
        without = sorted(set(paths) - set(held), key=int)
        if without:
            raise DataError(
                f'{root}: train_test_split.txt says nothing of {len(without)} of {len(paths)} images, such as number '
                f'{without[0]}; {HOW}'
            )
        named = self._named(root, held) if self.split_file else {}
        if self.split in named.values():
            return [number for number, name in named.items() if name == self.split]
        if named and self.split == 'test':
            raise DataError(f'{root}: {self.split_file} names no test image, only {sorted(set(named.values()))}')
        if self.split not in ('train', 'test'):
            known = sorted({'train', 'test', *named.values()})
            raise DataError(f'{root} has no split {self.split!r}, it has {known}')
        return [number for number, flag in held.items() if flag == str(int(self.split == 'train'))]

    def _named(self, root: Path, held: Mapping[str, str]) -> dict[str, str]:
        """The splits of what is held out, all of it and nothing else: a list that was cut off is still a list."""
        named = _table(root / str(self.split_file))
        out = {number for number, flag in held.items() if flag == '0'}
        for numbers, what in ((out - set(named), 'says nothing of'), (set(named) - out, 'has also')):
            if numbers:
                raise DataError(
                    f'{root}: {self.split_file} {what} {len(numbers)} images, such as number {min(numbers, key=int)}; '
                    f'it must name a split for each of the {len(out)} with 0 in train_test_split.txt, and for no other'
                )
        if 'train' in named.values():
            raise DataError(
                f'{root}: {self.split_file} has train, which train_test_split.txt says of other images; it must give '
                'images that are held out other names, such as dev and test'
            )
        return named

    @staticmethod
    def _classes(root: Path) -> tuple[str, ...]:
        names = _table(root / 'classes.txt')
        missing = sorted(set(range(1, len(names) + 1)) - {int(number) for number in names})
        if missing:
            raise DataError(
                f'{root}: classes.txt has {len(names)} classes and none of number {missing[0]}; it must number them '
                f'from 1 on without a gap; {HOW}'
            )
        return tuple(names[number].partition('.')[2] or names[number] for number in sorted(names, key=int))


def _label(root: Path, number: str, text: str, classes: int) -> int:
    # The number of digits first: Python reads no numbers of thousands.
    if not text.isdecimal() or len(text) > _DIGITS or not 1 <= int(text) <= classes:
        raise DataError(
            f'{root}: image_class_labels.txt has {text[:40]!r} for image {number}, no number from 1 to {classes} as '
            'classes.txt has them'
        )
    return int(text) - 1


def _box(root: Path, number: str, text: str) -> list[float]:
    try:
        x, y, width, height = map(float, text.split())
        if not all(map(isfinite, (x, y, width, height))) or min(width, height) <= 0:
            raise ValueError(text)
    except ValueError:
        raise DataError(f'{root}: bounding_boxes.txt has {text!r} for image {number}, not X Y WIDTH HEIGHT') from None
    return [x, y, width, height]


def _table(path: Path) -> dict[str, str]:
    """A file of `NUMBER REST` lines."""
    if not path.is_file():
        raise DataError(f'{path} is missing; {HOW}')
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f'{path} is no text in UTF-8 ({error}); {HOW}') from None
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    wrong = [pair for pair in pairs if len(pair) != 2 or not pair[0].isdecimal() or len(pair[0]) > _DIGITS]
    if wrong or not pairs:
        found = ' '.join(wrong[0])[:80] if wrong else 'nothing'
        raise DataError(f'{path} holds {found!r} where NUMBER REST is due; {HOW}')
    table = {number: rest.strip() for number, rest in pairs}
    if len(table) < len(pairs):
        twice = next(number for number, count in Counter(number for number, _ in pairs).items() if count > 1)
        raise DataError(f'{path} has image {twice} more than once; {HOW}')
    return table

"""Data sets that torchvision knows: FGVC-Aircraft, Food-101, Flowers-102, Oxford-IIIT Pet, Stanford Cars, ImageNet."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torchvision.datasets

from gplq.errors import DataError, GPLQError, RecipeError
from gplq.typecheck import check_types

from .image_dataset import ImageDataset

__all__ = ['SOURCES', 'TorchvisionDataset']

# Where the files come from and how they lie below data_root.
SOURCES = {
    'FGVCAircraft': (
        'https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/',
        'fgvc-aircraft-2013b/data/{images/, images_variant_SPLIT.txt, variants.txt}',
    ),
    'Food101': ('https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/', 'food-101/{images/, meta/}'),
    'Flowers102': (
        'https://www.robots.ox.ac.uk/~vgg/data/flowers/102/',
        'flowers-102/{jpg/, imagelabels.mat, setid.mat}',
    ),
    'OxfordIIITPet': (
        'https://www.robots.ox.ac.uk/~vgg/data/pets/',
        'oxford-iiit-pet/{images/, annotations/{trainval.txt, test.txt}}',
    ),
    'StanfordCars': (
        'https://github.com/pytorch/vision/issues/7545 (its own server is gone)',
        'stanford_cars/{cars_train/, cars_test/, cars_test_annos_withlabels.mat, devkit/cars_{meta,train_annos}.mat}',
    ),
    'ImageNet': ('https://image-net.org/download-images', '{train,val}/WNID/IMAGE.JPEG, meta.bin'),
    'ImageFolder': ('your own images', 'CLASS/IMAGE'),
}
FOLDERS = ('ImageNet', 'ImageFolder')


class TorchvisionDataset(ImageDataset):
    """The images and classes of one of torchvision's data sets, read by the pipeline.

    Args:
        name: the class in `torchvision.datasets`, one of `SOURCES`.
        data_root: what torchvision calls `root`.
        split: as torchvision names it; `ImageFolder` takes the folder of this name, where it is given.
        download: let torchvision fetch what it can.
        options: the class's other arguments, such as `dict(annotation_level='family')`; targets are one class each.

    Raises:
        DataError: the files are not there; the message says where they come from and how they must lie.
        RecipeError: a setting is of the wrong type or not supported.
    """

    def __init__(
        self,
        name: str,
        data_root: str | Path,
        split: str | None = None,
        download: bool = False,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        settings = dict(name=name, data_root=data_root, split=split, download=download, options=options)
        check_types(settings, get_type_hints(TorchvisionDataset.__init__), 'TorchvisionDataset: ')
        if name not in SOURCES:
            raise DataError(f'TorchvisionDataset: {name!r} is none of {sorted(SOURCES)}')
        self.name = name
        self.listing = self._listing(Path(data_root), split, download, options or {})
        classes = getattr(self.listing, 'classes', None)
        if classes is not None:
            # ImageNet has several names for a class.
            names = tuple(entry if isinstance(entry, str) else str(entry[0]) for entry in classes)
            kwargs.setdefault('metainfo', {'classes': names})
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Every image of the split with its class."""
        if self.name == 'OxfordIIITPet':
            # The one class without `loader`, by which the others say what they would open.
            pairs = list(zip(self.listing._images, self.listing._labels, strict=True))
        else:
            pairs = [self.listing[index] for index in range(len(self.listing))]
        # Those of folders were found by looking.
        missing = [path for path, _ in pairs if not Path(path).is_file()] if self.name not in FOLDERS else []
        if missing:
            raise DataError(f'{self.name}: {missing[0]} is missing; {_how(self.name, self.data_root)}')
        return [{'img_path': str(path), 'gt_label': int(label)} for path, label in pairs]

    @staticmethod
    def source(config: Mapping[str, Any]) -> str:
        """Where the data of a config comes from, and how it lies."""
        return _how(config['name'], config['data_root']) if config.get('name') in SOURCES else ''

    def _listing(self, root: Path, split: str | None, download: bool, options: dict[str, Any]) -> Any:
        kind = getattr(torchvision.datasets, self.name)
        arguments = dict(options)
        known = inspect.signature(kind).parameters
        if options.get('target_types', 'category') not in ('category', ['category'], ('category',)):
            raise RecipeError(
                f"TorchvisionDataset: {self.name} is read with target_types='category', the breeds, not with "
                f'{options["target_types"]!r}: leave target_types out'
            )
        if self.name == 'ImageFolder':
            train, root = root / 'train', root / split if split else root
            if split and train.is_dir() and root.is_dir():
                # torchvision numbers the classes of each folder by itself.
                differing = sorted(_folders(train) ^ _folders(root))
                if differing:
                    raise DataError(
                        f'{root} and {train} do not have the same classes, such as {differing[:3]}, which would number '
                        'them differently: make empty folders for those without images'
                    )
            _check_hidden(root)
            arguments.setdefault('allow_empty', True)
        elif split is not None:
            arguments['split'] = split
        free = set(known) - {'root', 'split', 'download', 'loader', 'transform', 'target_transform', 'transforms'}
        foreign = sorted(set(options) - free)
        if foreign:
            raise RecipeError(f'TorchvisionDataset: {self.name} has no option {foreign}; known are {sorted(free)}')
        if 'download' in known:
            arguments['download'] = download
        if self.name != 'OxfordIIITPet':
            arguments['loader'] = str
        try:
            if self.name != 'ImageNet':
                return kind(root, **arguments)
            _check_wnids(root, split or 'train')
            listing = kind(root, **arguments)
            # It may have unpacked archives just now.
            _check_wnids(root, split or 'train')
            return listing
        except GPLQError:
            raise
        except Exception as error:  # its readers of lists raise anything
            reason = ' '.join(str(error).split())
            if isinstance(error, ValueError) and 'split' in reason:
                raise DataError(f'TorchvisionDataset: {self.name} has no split {split!r}: {reason}') from error
            if not isinstance(error, (RuntimeError, OSError, ValueError)):
                # A key, an index, a pickle: says nothing to who has a damaged file.
                reason = f'a list in it is damaged, {type(error).__name__}'
            raise DataError(f'{self.name} cannot be read from {root} ({reason}): {_how(self.name, root)}') from error


def _how(name: str, root: str | Path) -> str:
    where, how = SOURCES[name]
    return f'get it from {where} and lay it out as {root}/{how}'


def _check_hidden(root: Path) -> None:
    """Refuse what an editor or a system left there: torchvision counts it as a class, before all others."""
    hidden = sorted(name for name in (_folders(root) if root.is_dir() else ()) if name.startswith('.'))
    if hidden:
        raise DataError(f'{root} holds the hidden folder {hidden[0]}, which torchvision counts as a class: remove it')


def _check_wnids(root: Path, split: str) -> None:
    """Refuse folders other than those of the list: torchvision numbers the classes of each split by itself."""
    folder = root / split
    if not folder.is_dir() or not (root / 'meta.bin').is_file():
        return
    listed = set(torchvision.datasets.imagenet.load_meta_file(root)[0])
    differing = sorted(listed ^ _folders(folder))
    if differing:
        raise DataError(
            f'{folder} has {len(_folders(folder))} folders and {root}/meta.bin {len(listed)} classes; they differ in '
            f'{differing[:3]}, which would number the others anew: complete or clear the folder, or read some of '
            "ImageNet's classes with name='ImageFolder'"
        )


def _folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}

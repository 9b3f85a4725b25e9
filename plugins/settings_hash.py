"""What a run's config said, and of which data, in one number."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmengine.config import Config

from gplq.plugins.results import file_sha256

__all__ = ['settings_hash']

# Of lists, annotations and splits, in a data set's folder and one below.
_LISTS = ('*.txt', '*.json', '*.csv', '*.mat', 'annotations/*')
# A teacher's, say.
_WEIGHTS = ('.pth', '.safetensors')


def settings_hash(cfg: Config, data_root: str) -> str:
    """A hash of a config as it was resolved, of the weights that it names and of the data set's lists.

    It is the same wherever the data lies. A comment or another order of settings changes nothing. ``load_from`` stands
    for itself: runs are given another checkpoint, whose hash rows have as well.

    Args:
        cfg: with what it takes from the environment filled in.
        data_root: folder of the data, ``''`` for none.
    """
    root = Path(data_root)
    lists = sorted({file for pattern in _LISTS for file in root.glob(pattern) if file.is_file()}) if data_root else []
    contents = [(str(file.relative_to(root)), file_sha256(file)) for file in lists]
    settings = cfg.to_dict()
    load_from = settings.pop('load_from', None)
    text = json.dumps([_resolved(settings, data_root.rstrip('/')), load_from, contents], sort_keys=True, default=_name)
    return hashlib.sha256(text.encode()).hexdigest()


def _resolved(value: Any, root: str) -> Any:
    if isinstance(value, dict):
        return {str(key): _resolved(item, root) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolved(item, root) for item in value]
    if isinstance(value, str) and root and (value == root or value.startswith(f'{root}/')):
        return f'<data>{value.removeprefix(root)}'.rstrip('/')
    if isinstance(value, str) and value.endswith(_WEIGHTS) and Path(value).is_file():
        return [value, file_sha256(value)]
    return value


def _name(value: Any) -> str:
    """Of a class or function, whose ``repr`` has an address; else the ``repr``."""
    return f'{value.__module__}.{value.__qualname__}' if hasattr(value, '__qualname__') else repr(value)

"""What a run's config said, and of which data, in one number."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmengine.config import Config

__all__ = ['settings_hash']

# Of lists, annotations and splits, in a data set's folder and one below.
_LISTS = ('*.txt', '*.json', '*.csv', '*.mat', 'annotations/*')


def settings_hash(cfg: Config, data_root: str) -> str:
    """A hash of a config as it was resolved and of the data set's lists; the same wherever the data lies.

    Names and sizes stand for the lists themselves. A comment or another order of settings changes nothing.

    Args:
        cfg: with what it takes from the environment filled in.
        data_root: folder of the data, ``''`` for none.
    """
    root = Path(data_root)
    lists = sorted({file for pattern in _LISTS for file in root.glob(pattern) if file.is_file()}) if data_root else []
    sizes = [(str(file.relative_to(root)), file.stat().st_size) for file in lists]
    text = json.dumps([_without_root(cfg.to_dict(), data_root.rstrip('/')), sizes], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_root(value: Any, root: str) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_root(item, root) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_root(item, root) for item in value]
    if isinstance(value, str) and root and (value == root or value.startswith(f'{root}/')):
        return f'<data>{value.removeprefix(root)}'
    return value

"""A config whose hook a tool drives itself."""

from __future__ import annotations

import copy
from pathlib import Path

from mmengine.config import Config

from gplq.errors import GPLQError
from gplq.plugins.hook_of_config import hook_of
from gplq.plugins.preflight import preflight

__all__ = ['without_hook']


def without_hook(cfg: Config, config: str, name: str) -> Config:
    """A copy for a Runner whose hook is not there: its settings are in ``gplq_settings``, without its type.

    Data is loaded by the process itself, and files are written to the folder ``name`` in the config's.

    Args:
        cfg: with the two lines.
        config: its name.
        name: of the folder.

    Raises:
        ResultError: the config has no hook.
        GPLQError: it names no checkpoint, or nothing can come of it.
    """
    hook = hook_of(cfg, config)
    preflight(cfg)
    if not cfg.get('load_from'):
        raise GPLQError(f'{config} names no FP32 checkpoint: --cfg-options load_from=PATH')
    copied = copy.deepcopy(cfg)
    copied.default_hooks.pop('gplq')
    copied.work_dir = str(Path(copied.work_dir, name))
    copied.gplq_settings = hook
    copied.train_dataloader.persistent_workers = False
    copied.train_dataloader.num_workers = 0
    return copied

"""Find out before a run whether what its config names is there: files, and a GPU where one is needed."""

import copy
import difflib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.utils import get_object_from_string

from gplq.errors import GPLQError
from gplq.plugins.type_name import pretrained_source, type_name

__all__ = ['PreflightError', 'preflight']

# Hooks that start from a whole model and skip its initialization.
_STAGES = {'ActivationQATHook', 'GPLQHook', 'PTQ4ViTHook', 'VariationAwareQATHook', 'WeightPTQHook'}
# How the types of our own classes begin.
_OURS = 'gplq.plugins.'
# What mmengine itself takes out of any of its configs.
_ANYWHERE = {'type', 'priority', 'constructor', 'paramwise_cfg', '_scope_', '_delete_', '_base_'}


class PreflightError(GPLQError):
    """Something that the run needs is missing; the message names it and what to do."""


def preflight(cfg: Config, splits: tuple[str, ...] = ('train', 'val')) -> None:
    """Check a config: our hooks' settings, data sets, annotation files, image folders, checkpoints, precision, GPUs.

    Remote addresses and data sets behind another storage backend are left alone. Loaders without workers lose the
    settings of workers.

    Raises:
        PreflightError: the first thing that is missing.
        RecipeError: a setting of a hook is not supported.
    """
    _check_settings(cfg._cfg_dict.to_dict(), '')
    if cfg.get('launcher') == 'pytorch':
        _check_launcher()
    for hook in _hooks(cfg):
        _check_hook(hook)
    for name in ('train', 'val', 'test'):
        _drop_settings_of_workers(cfg.get(f'{name}_dataloader'), f'{name}_dataloader')
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in _datasets(loader.dataset) if loader else ():
            _check_dataset(dataset, f'{split}_dataloader')
        for evaluator in _listed(cfg.get(f'{split}_evaluator')):
            if evaluator.get('ann_file') and _is_local(evaluator['ann_file'], evaluator):
                _check_data(Path(evaluator['ann_file']), 'annotation file', f'{split}_evaluator')
    if cfg.get('load_from') and _is_local(cfg.load_from) and not Path(cfg.load_from).is_file():
        raise PreflightError(f'checkpoint {cfg.load_from} (load_from) does not exist; give the path of one that does')
    if 'train' in splits:
        _check_best(cfg)
    if 'train' in splits and not torch.cuda.is_available():
        _check_precision(cfg.get('optim_wrapper') or {})
    # Read even where a checkpoint is loaded over them, but not by a test, and not where a stage begins.
    if 'train' not in splits or _has_stages(cfg):
        return
    for path, place in _initial_checkpoints(cfg.get('model', {}), 'model'):
        if _is_local(path) and not Path(path).is_file():
            remedy = f'give one with --cfg-options {place}=PATH'
            raise PreflightError(f'initial weights {path} ({place}) do not exist; {remedy}')


def _check_launcher() -> None:
    """Refuse what mmengine's launcher cannot start: it gives every process a GPU, whatever the backend."""
    if 'RANK' not in os.environ:
        raise PreflightError(
            '--launcher pytorch is for processes that torchrun has started: torchrun --nproc-per-node=N tools/train.py '
            'CONFIG --launcher pytorch; leave it out for one process'
        )
    if get_device() in ('cpu', 'mps'):
        raise PreflightError(
            '--launcher pytorch gives a GPU to every process, and there is none here: start one process without '
            'torchrun and --launcher'
        )
    rank, count = int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
    if torch.cuda.is_available() and rank >= count:
        raise PreflightError(
            f'--launcher pytorch gives a GPU to every process: this is process {rank} of this machine, counted from 0, '
            f'which has {count}; start torchrun with --nproc-per-node={count}'
        )


def _drop_settings_of_workers(loader: Any, place: str) -> None:
    """PyTorch refuses them where there are none, and a config's base has them."""
    if not isinstance(loader, dict) or loader.get('num_workers', 0) != 0:
        return
    for name, harmless in (('persistent_workers', False), ('prefetch_factor', None)):
        if loader.get(name, harmless) != harmless:
            print_log(f'{place}.{name}={loader[name]} is dropped: num_workers=0', logger='current')
            del loader[name]


def _check_best(cfg: Config) -> None:
    """Refuse to keep the best checkpoint by a figure that validation will not give, where its metrics tell."""
    wanted = [hook.get('save_best') for hook in _hooks(cfg) if type_name(hook.get('type')) == 'CheckpointHook']
    kinds = [(_kind(evaluator), evaluator) for evaluator in _listed(cfg.get('val_evaluator'))]
    if not kinds or not all(hasattr(kind, 'figures') for kind, _ in kinds):
        return
    known = [name for kind, evaluator in kinds for name in kind.figures(evaluator)]
    for best in wanted:
        for name in [best] if isinstance(best, str) else best or ():
            if name != 'auto' and name not in known:
                raise PreflightError(
                    f'default_hooks.checkpoint.save_best={name!r} is no figure of val_evaluator: it gives {known}'
                )


def _check_precision(wrapper: dict) -> None:
    if type_name(wrapper.get('type')) == 'AmpOptimWrapper':
        raise PreflightError(
            'optim_wrapper.type=AmpOptimWrapper needs a GPU, and there is none: train in bfloat16 by --amp, or in '
            'float32 by --cfg-options optim_wrapper.type=OptimWrapper (and without loss_scale and dtype)'
        )


def _hooks(cfg: Config) -> list[dict]:
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or ())]
    return [hook for hook in hooks if isinstance(hook, dict)]


def _check_settings(node: Any, place: str) -> None:
    """Refuse names of classes and of settings that there are not, wherever a config names one of our classes."""
    if isinstance(node, (list, tuple)):
        for index, entry in enumerate(node):
            _check_settings(entry, f'{place}[{index}]')
    if not isinstance(node, dict):
        return
    kind = node.get('type')
    if isinstance(kind, str) and kind.startswith(_OURS):
        kind = _class_of(kind, place)
    if isinstance(kind, type) and kind.__module__.startswith(_OURS):
        _check_names(kind, set(node) - _ANYWHERE, place)
    for name, value in node.items():
        _check_settings(value, f'{place}.{name}' if place else name)


def _class_of(name: str, place: str) -> Any:
    found = get_object_from_string(name)
    if found is None:
        module, _, last = name.rpartition('.')
        near = difflib.get_close_matches(last, getattr(get_object_from_string(module), '__all__', ()), n=1, cutoff=0)
        meant = f'; did you mean {module}.{near[0]}?' if near else ''
        raise PreflightError(f'there is no {name} ({place}.type){meant}')
    return found


def _check_names(kind: type, names: set[str], place: str) -> None:
    known: set[str] = set()
    for base in kind.__mro__:
        own = vars(base).get('__init__')
        parameters = inspect.signature(own).parameters.values() if own else ()
        known |= {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {'self'}
        # What it does not pass on ends there.
        if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    else:
        # The first of all takes anything.
        return
    for name in sorted(names - known):
        near = difflib.get_close_matches(name, known, n=1)
        meant = f'; did you mean {near[0]}?' if near else f'; it has {sorted(known)}'
        raise PreflightError(f'{kind.__name__} has no setting {name} ({place}){meant}')


def _check_hook(hook: dict) -> None:
    """Make one of ours for trial: the Runner would refuse its settings only after it has logged the whole config."""
    kind, settings = _kind(hook), {name: value for name, value in hook.items() if name not in ('type', 'priority')}
    if type_name(kind) in _STAGES and callable(kind):
        kind(**copy.deepcopy(settings))


def _check_dataset(dataset: dict, place: str) -> None:
    root = str(dataset.get('data_root') or '')
    if root and not _is_local(root, dataset):
        return
    if root and not dataset.get('download'):
        _check_data(Path(root), 'data root', place, _source(dataset))
    if dataset.get('ann_file') and _is_local(dataset['ann_file'], dataset):
        _check_data(Path(root, dataset['ann_file']), 'annotation file', place)
    for prefix in (dataset.get('data_prefix') or {}).values():
        if isinstance(prefix, str) and _is_local(prefix, dataset):
            _check_data(Path(root, prefix), 'image folder', place)


def _kind(config: dict) -> Any:
    """The class of a config, if it is one of ours."""
    kind = config.get('type')
    return get_object_from_string(kind) if isinstance(kind, str) and kind.startswith(_OURS) else kind


def _source(dataset: dict) -> str:
    """Where the data comes from and how it lies, if its class knows."""
    tell = getattr(_kind(dataset), 'source', None)
    return str(tell(dataset)) if tell else ''


def _check_data(path: Path, what: str, place: str, source: str = '') -> None:
    if not path.exists():
        remedy = 'say where the data is with --cfg-options data_root=PATH' + (f'. {source}' if source else '')
        raise PreflightError(f'{what} {path} ({place}) does not exist; {remedy}')


def _datasets(node: Any) -> Iterator[dict]:
    """Yield data sets, also from within wrappers such as RepeatDataset and ConcatDataset."""
    for dataset in _listed(node):
        inner = dataset.get('dataset') or dataset.get('datasets')
        if inner:
            yield from _datasets(inner)
        else:
            yield dataset


def _listed(node: Any) -> list[dict]:
    if node is None:
        return []
    return [entry for entry in (node if isinstance(node, list | tuple) else [node]) if isinstance(entry, dict)]


def _initial_checkpoints(node: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield every `init_cfg` of type Pretrained in a model's config, with its dotted place."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        here = f'{place}.{key}'
        if key == 'init_cfg' and (source := pretrained_source(value)) is not None:
            yield source, f'{here}.checkpoint'
        else:
            yield from _initial_checkpoints(value, here)


def _has_stages(cfg: Config) -> bool:
    return any(type_name(hook.get('type')) in _STAGES for hook in _hooks(cfg))


def _is_local(path: str, owner: dict | None = None) -> bool:
    """Say whether a path is a file of this machine: no URL, no storage backend beside the local one."""
    backend = ((owner or {}).get('backend_args') or {}).get('backend', 'local')
    return '://' not in str(path) and backend in ('local', 'disk', 'LocalBackend', 'HardDiskBackend')

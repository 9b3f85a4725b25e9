"""Move a config's data to another folder."""

from typing import Any

from mmengine.config import Config

__all__ = ['apply_options']


def apply_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Merge command-line options into a config; `data_root` reaches every data set and metric.

    mm's text configs copy `data_root` into each of them while the file is read, so merging alone would change
    a name that nobody reads any more. A path that began with the old root begins with the new one afterwards.
    """
    old = cfg.get('data_root')
    cfg.merge_from_dict(options or {})
    if not options or 'data_root' not in options or not old:
        return
    new = str(options['data_root'])
    for key in ('train', 'val', 'test'):
        for part in ('dataloader', 'evaluator'):
            name = f'{key}_{part}'
            if cfg.get(name) is not None:
                cfg[name] = _moved(cfg[name], str(old).rstrip('/'), new.rstrip('/'))


def _moved(node: Any, old: str, new: str) -> Any:
    if isinstance(node, dict):
        return type(node)({key: _moved(value, old, new) for key, value in node.items()})
    if isinstance(node, list | tuple):
        return type(node)(_moved(value, old, new) for value in node)
    if isinstance(node, str) and (node.rstrip('/') == old or node.startswith(old + '/')):
        return new + node[len(old) :]
    return node

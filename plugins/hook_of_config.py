"""The hook in a config with the two lines."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from gplq.plugins.benchmark import HOOK
from gplq.plugins.command_line import option_value
from gplq.plugins.hooks.settings import HookSettings
from gplq.plugins.methods import METHODS, VARIANTS
from gplq.plugins.results import ResultError
from gplq.plugins.type_name import type_name

__all__ = ['hook_of', 'settings_of_run']


def hook_of(cfg: Config, config: str) -> dict[str, Any]:
    """The arguments of the config's GPLQHook; what concerns its registry and its turn among hooks is left out.

    Args:
        cfg: any config.
        config: its name.

    Raises:
        ResultError: it has no GPLQHook.
    """
    hook = (cfg.get('default_hooks') or {}).get('gplq')
    if not isinstance(hook, dict) or type_name(hook.get('type')) != 'GPLQHook':
        raise ResultError(
            f"config {config} has no default_hooks = dict(gplq=dict(type='gplq.plugins.GPLQHook', …)), which is what "
            'this program sets: add it'
        )
    arguments = cfg.to_dict()['default_hooks']['gplq']
    return {name: value for name, value in arguments.items() if name not in ('type', 'priority')}


def settings_of_run(
    cfg: Config, config: str, method: str, variant: str = '', options: Mapping[str, str] | None = None
) -> HookSettings:
    """The settings that the hook has in a run of a method.

    Args:
        cfg: with the two lines; it is left as it is.
        config: its name.
        method: a name in :data:`gplq.plugins.methods.METHODS`.
        variant: a name in :data:`gplq.plugins.methods.VARIANTS`.
        options: the user's, as text.

    Raises:
        RecipeError: the hook has a setting that there is not, or one with a value that it cannot have.
        ResultError: there is no such hook, or a setting is to be set inside of what is no dict.
    """
    own = METHODS[method] | VARIANTS[variant]
    chosen = copy.deepcopy(cfg)
    given = {key: option_value(text) for key, text in (options or {}).items()}
    try:
        chosen.merge_from_dict({**given, **{f'{HOOK}{name}': value for name, value in own.items()}})
    except (TypeError, AttributeError) as error:
        # Where a setting is no dict, such as recipe='w4a4', none inside it can be set.
        raise ResultError(
            f'{config} and --options do not take {sorted(own) or sorted(given)}: {error}; write such a setting as '
            'dict(…)'
        ) from error
    return HookSettings.from_config(**hook_of(chosen, f'{config} with --options' if given else config))

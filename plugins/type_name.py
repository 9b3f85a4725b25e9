"""Classes in configs, by whichever way they are given."""

from __future__ import annotations

from typing import Any

from gplq.errors import RecipeError

__all__ = ['pretrained_source', 'type_name']


def type_name(of: Any) -> str:
    """The class's bare name in a `type` of a config: registered, dotted, or the class itself in a config in Python."""
    return str(getattr(of, '__name__', of)).rpartition('.')[2]


def pretrained_source(init_cfg: Any) -> str | None:
    """The file of initial weights that an `init_cfg` names; None where it is of another type.

    Raises:
        RecipeError: it is of this type and names none.
    """
    if isinstance(init_cfg, dict) and type_name(init_cfg.get('type')) in ('Pretrained', 'PretrainedInit'):
        if not init_cfg.get('checkpoint'):
            raise RecipeError("init_cfg=dict(type='Pretrained') names no file; add checkpoint=PATH")
        return str(init_cfg['checkpoint'])
    return None

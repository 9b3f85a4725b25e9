"""GPLQ for mmengine: hooks, detection and fine-grained classification, installed as `gplq.plugins`."""

from typing import Any

__all__ = [
    'ActivationQATHook',
    'FeatureDistillationHook',
    'GPLQHook',
    'HeadDistillationHook',
    'PTQ4ViTHook',
    'SoftLabelHook',
    'VariationAwareQATHook',
    'WeightPTQHook',
]


def __getattr__(name: str) -> Any:
    # Configs name the hooks as gplq.plugins.GPLQHook; parts that need no mmengine stay importable without it.
    if name in __all__:
        from gplq.plugins import hooks

        return getattr(hooks, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

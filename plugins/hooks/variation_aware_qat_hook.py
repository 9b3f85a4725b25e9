"""Variation-aware quantization-aware training inside a Runner."""

from __future__ import annotations

from typing import Any

from mmengine.registry import HOOKS

from gplq.plugins.hooks.gplq_hook import GPLQHook

__all__ = ['VariationAwareQATHook']


@HOOKS.register_module()
class VariationAwareQATHook(GPLQHook):
    """Trains rounded weights and activations together, as variation-aware quantization does (VVTQ).

    Example:
        >>> default_hooks = dict(
        ...     gplq=dict(
        ...         type='gplq.plugins.VariationAwareQATHook',
        ...         weight_bits=2,
        ...         activation_bits=2,
        ...         keep_schedule=True,
        ...     )
        ... )

    Arguments are those of :meth:`gplq.plugins.hooks.settings.HookSettings.from_config`, with `method='vvtq'`. It takes
    many epochs, so that `keep_schedule=True` and the config's own schedule suit it.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__(**{'method': 'vvtq', **config})

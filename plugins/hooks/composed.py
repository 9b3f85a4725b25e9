"""A hook made of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

__all__ = ['ComposedHook']


class ComposedHook(Hook):
    """Hands every callback that a stage listens to on to :attr:`parts`, in their order."""

    parts: Sequence[Hook] = ()

    def before_run(self, runner: Runner) -> None:
        self._hand_on('before_run', runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._hand_on('after_load_checkpoint', runner, checkpoint)

    def before_train(self, runner: Runner) -> None:
        self._hand_on('before_train', runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._hand_on('before_train_iter', runner, batch_idx, data_batch)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        self._hand_on('after_train_iter', runner, batch_idx, data_batch, outputs)

    def before_val_epoch(self, runner: Runner) -> None:
        self._hand_on('before_val_epoch', runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._hand_on('after_val_epoch', runner, metrics)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._hand_on('before_save_checkpoint', runner, checkpoint)

    def after_train(self, runner: Runner) -> None:
        self._hand_on('after_train', runner)

    def _hand_on(self, name: str, *args: Any) -> None:
        for part in self.parts:
            getattr(part, name)(*args)

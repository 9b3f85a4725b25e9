"""mmengine's training loops, entered exactly where a run was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from gplq.plugins.hooks.replay_data import ReplayBatchSampler, can_replay, replay_loader

__all__ = ['ReplayEpochLoop', 'ReplayIterLoop', 'make_replayable']


class ReplayEpochLoop(EpochBasedTrainLoop):
    """Starts inside an epoch where the checkpoint was written inside one; mmengine's starts that epoch anew."""

    def run_epoch(self) -> None:
        """Run what is left of the epoch."""
        self.runner.call_hook('before_train_epoch')
        consumed = self._iter - self._epoch * len(self.dataloader)
        _batches(self).start(self._epoch, consumed)
        self.runner.model.train()
        for number, batch in enumerate(self.dataloader, start=consumed):
            self.run_iter(number, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


class ReplayIterLoop(IterBasedTrainLoop):
    """Skips consumed batches by their indices; mmengine's loads and augments each of them."""

    def run(self) -> Any:
        """Run what is left of the training."""
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')
        batches = self._endless()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(batches))
            self._decide_current_val_interval()
            validates = self._iter % self.val_interval == 0 or self._iter == self._max_iters
            if self.runner.val_loop is not None and self._iter >= self.val_begin and validates:
                self.runner.val_loop.run()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def _endless(self) -> Iterator[Any]:
        consumed = self._iter
        epoch = 0
        while True:
            _batches(self).start(epoch, consumed)
            yield from self.dataloader
            consumed = max(0, consumed - _batches(self).passed)
            epoch += 1


REPLAY = {EpochBasedTrainLoop: ReplayEpochLoop, IterBasedTrainLoop: ReplayIterLoop}


def make_replayable(runner: Runner) -> bool:
    """Turn the run's training loop and its loader into ones that can be entered in the middle.

    Returns:
        Whether that was possible: a loop of another class, or a stream of data, is left as it is.
    """
    loop = runner.train_loop
    if type(loop) not in REPLAY or not can_replay(loop.dataloader):
        return False
    loop.__class__ = REPLAY[type(loop)]
    # Its workers have started and its first batches are drawn.
    loop.__dict__.pop('dataloader_iterator', None)
    loop.dataloader = replay_loader(loop.dataloader)
    return True


def _batches(loop: EpochBasedTrainLoop | IterBasedTrainLoop) -> ReplayBatchSampler:
    batches = loop.dataloader.batch_sampler
    assert isinstance(batches, ReplayBatchSampler)
    return batches

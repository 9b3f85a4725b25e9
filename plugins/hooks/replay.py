"""Data and random numbers of a run as functions of its seed, epoch and iteration, so that it can be interrupted."""

from __future__ import annotations

from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.runner import Runner

from gplq.plugins.hooks.randomness import seed_all
from gplq.plugins.hooks.replay_data import ReplayBatchSampler, ReplayDataset
from gplq.plugins.hooks.replay_loops import make_replayable

__all__ = ['Replay']


class Replay:
    """Makes the run's training replayable; `seed` may be set until it starts.

    Args:
        runner: its training loop is built.
    """

    def __init__(self, runner: Runner) -> None:
        self._loop = runner.train_loop
        sampler = getattr(self._loop.dataloader.batch_sampler, 'sampler', None)
        # Where every rank has a seed of its own, that of the sampler is still common to all.
        seed = getattr(sampler, 'seed', None)
        self.seed = int(runner.seed if seed is None else seed)
        if not make_replayable(runner):
            runner.logger.warning(
                f'GPLQ: data of a {type(self._loop).__name__} over {type(self._loop.dataloader.dataset).__name__} '
                'cannot be entered in the middle; a run that is resumed will see other samples'
            )

    def start(self) -> None:
        """Hand the seed to sampler and data set, before the first batch is drawn."""
        loader = self._loop.dataloader
        if isinstance(loader.batch_sampler, ReplayBatchSampler) and isinstance(loader.dataset, ReplayDataset):
            loader.dataset.seed(self.seed)
            sampler = loader.batch_sampler.sampler
            if hasattr(sampler, 'seed'):
                sampler.seed = self.seed
            if isinstance(sampler, InfiniteSampler):
                # Its one stream of indices began with another seed, and the workers of mmengine's loop, which are gone,
                # have taken some of it.
                sampler.indices = sampler._indices_of_rank()

    def seed_step(self, iteration: int) -> None:
        """Fix what the model draws in this iteration on this rank: dropout, samples of proposals, noise."""
        seed_all(self.seed, get_rank(), iteration)

"""Training data that a resumed run sees exactly as an undisturbed one would have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mmengine.dist import get_world_size
from torch.utils.data import DataLoader, Dataset, IterableDataset

from gplq.errors import DataError
from gplq.plugins.hooks.randomness import seeded

__all__ = ['Draw', 'ReplayBatchSampler', 'ReplayDataset', 'can_replay', 'replay_loader']


class Draw(NamedTuple):
    """A sample in one pass over the data; it travels to the workers as the index."""

    epoch: int
    sample: int


class ReplayDataset(Dataset):
    """Augments a sample by random numbers of (seed, epoch, sample): the same in any worker, batch and run."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._seed = 0

    def seed(self, seed: int) -> None:
        """Set the run's seed; workers that run already keep theirs."""
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, draw: Draw) -> Any:
        try:
            with seeded(self._seed, *draw):
                return self._dataset[draw.sample]
        except Exception as error:  # whatever a pipeline raises
            raise DataError(self._told(draw.sample, error)) from error

    def _told(self, sample: int, error: Exception) -> str:
        try:
            name = str(self._dataset.get_data_info(sample)['img_path'])
        except Exception:  # not every data set is mmengine's
            name = type(self._dataset).__name__
        return (
            f'sample {sample} ({name}) cannot be read: {type(error).__name__}: {error}; mend it or take it out of the '
            'annotations'
        )

    def __getattr__(self, name: str) -> Any:
        # Hooks and samplers ask the data set for its metainfo, its groups, its switches. While a worker unpickles
        # this, the data set is not there yet.
        if name.startswith('_'):
            raise AttributeError(name)
        return getattr(self._dataset, name)


class ReplayBatchSampler:
    """Batches of draws, from a batch on: those before it were consumed by the run that is resumed."""

    def __init__(self, batches: Any, samples: int) -> None:
        self.batches = batches
        self.samples = samples
        self.epoch = 0
        self.consumed = 0
        # Batches of the latest pass, the consumed ones included; final once it has come to its end.
        self.passed = 0

    @property
    def sampler(self) -> Any:
        """What orders the samples; mmengine tells it the epoch."""
        return self.batches.sampler

    @property
    def batch_size(self) -> int:
        """Samples of a batch."""
        return int(self.batches.batch_size)

    def start(self, epoch: int, consumed: int = 0) -> None:
        """Make the next pass that of an epoch, without its first batches."""
        self.epoch, self.consumed = epoch, consumed
        if hasattr(self.sampler, 'set_epoch'):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        consumed, self.consumed = self.consumed, 0
        drawn = self.passed = 0
        for number, batch in enumerate(self.batches):
            # An infinite sampler goes through the data again and again without an end of its epoch.
            passes = drawn * get_world_size() // self.samples
            drawn += len(batch)
            self.passed += 1
            if number >= consumed:
                yield [Draw(self.epoch + passes, index) for index in batch]


def can_replay(loader: DataLoader) -> bool:
    """Whether the loader draws samples by batches of indices; streams cannot be entered in the middle."""
    batches = loader.batch_sampler
    return (
        not isinstance(loader.dataset, IterableDataset)
        and batches is not None
        and hasattr(batches, 'sampler')
        and not isinstance(batches, ReplayBatchSampler)
    )


def replay_loader(loader: DataLoader) -> DataLoader:
    """The same loader over the same samples, replayable."""
    assert loader.batch_sampler is not None
    dataset: Sequence[Any] = loader.dataset  # type: ignore[assignment]
    options: dict[str, Any] = {}
    if loader.num_workers:
        options = dict(
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
        )
    return DataLoader(
        ReplayDataset(dataset),
        batch_sampler=ReplayBatchSampler(loader.batch_sampler, len(dataset)),  # type: ignore[arg-type]
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        **options,
    )

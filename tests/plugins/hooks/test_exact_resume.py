"""A run that was killed and resumed ends at the very weights of one that was not."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from gplq.errors import CheckpointError, WriteError
from gplq.plugins.hooks.randomness import seed_all
from gplq.plugins.hooks.replay_data import Draw, ReplayBatchSampler, ReplayDataset

INTERVAL = 2


class Killed(Exception):
    pass


class Kill(Hook):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        if runner.iter == self.iteration:
            raise Killed


def by_epochs(config: Config) -> None:
    """Two epochs of eight iterations."""


def by_iterations(config: Config) -> None:
    config.default_hooks.gplq.iterations = 13


def endless(config: Config) -> None:
    config.default_hooks.gplq.iterations = 13
    config.train_cfg = dict(by_epoch=False, max_iters=400)
    config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)


def with_workers(config: Config) -> None:
    config.train_dataloader.num_workers = 2
    config.train_dataloader.persistent_workers = True


def averaged(config: Config) -> None:
    config.custom_hooks = [dict(type='EMAHook', momentum=0.1)]


def accumulated(config: Config) -> None:
    config.optim_wrapper.accumulative_counts = 3
    config.optim_wrapper.clip_grad = dict(max_norm=1.0)


def bfloat16(config: Config) -> None:
    config.optim_wrapper.type = 'gplq.plugins.amp.BFloat16OptimWrapper'
    config.optim_wrapper.emulate = True


def own_schedule(config: Config) -> None:
    config.default_hooks.gplq.keep_schedule = True
    config.default_hooks.gplq.iterations = None
    config.train_cfg.max_epochs = 2


def without_seed(config: Config) -> None:
    config.randomness = dict(seed=None)


def endless_with_workers_and_without_seed(config: Config) -> None:
    endless(config)
    with_workers(config)
    without_seed(config)


@pytest.fixture
def run(make_config: Callable[..., Config]) -> Callable[..., Runner]:
    """Trains the toy under random augmentation and dropout, killed before an iteration or resumed."""

    def train(
        name: str, change: Callable[[Config], None], kill: int | None = None, resume: bool = False, seed: Any = None
    ) -> Runner:
        config = make_config(name, iterations=16, resume_interval=INTERVAL)
        config.model.dropout = 0.3
        config.train_dataloader.dataset.augment = True
        change(config)
        if seed is not None:
            config.randomness = dict(seed=seed)
        if resume:
            config.resume, config.load_from = True, None
        # What a fresh process starts from must not matter.
        seed_all(random.SystemRandom().getrandbits(32))
        runner = Runner.from_cfg(config)
        if kill is not None:
            runner.register_hook(Kill(kill))
            with pytest.raises(Killed):
                runner.train()
        else:
            runner.train()
        return runner

    return train


def assert_same_end(one: Runner, other: Runner) -> None:
    for name in ('gplq_w32a4.pth', 'gplq_w4a4.pth'):
        first, second = (
            torch.load(Path(runner.work_dir) / name, weights_only=True)['state_dict'] for runner in (one, other)
        )
        assert list(first) == list(second)
        different = [key for key in first if not torch.equal(first[key], second[key])]
        assert not different, f'{name}: {different}'


@pytest.mark.parametrize(
    'change',
    [
        by_epochs,
        by_iterations,
        endless,
        with_workers,
        averaged,
        accumulated,
        bfloat16,
        own_schedule,
        without_seed,
        endless_with_workers_and_without_seed,
    ],
)
def test_a_resumed_run_ends_as_an_undisturbed_one(
    run: Callable[..., Runner], steps_of: Callable[[Runner], list[dict[str, Any]]], change: Callable[[Config], None]
) -> None:
    whole = run('whole', change)
    # Killed inside the first epoch, resumed and killed inside the second, resumed.
    run('broken', change, kill=5, seed=whole.seed)
    run('broken', change, kill=11, resume=True)
    resumed = run('broken', change, resume=True)
    assert_same_end(whole, resumed)
    assert [step['step'] for step in steps_of(resumed)] == [step['step'] for step in steps_of(whole)]
    assert steps_of(resumed)[-1]['metrics'] == steps_of(whole)[-1]['metrics']


def test_another_number_of_workers_changes_nothing(run: Callable[..., Runner]) -> None:
    def with_some(workers: int) -> Callable[[Config], None]:
        def change(config: Config) -> None:
            endless(config)
            config.train_dataloader.num_workers = workers

        return change

    assert_same_end(run('none', with_some(0), seed=3), run('two', with_some(2), seed=3))


def test_the_resume_point_of_an_earlier_run_is_refused(
    run: Callable[..., Runner], make_config: Callable[..., Config]
) -> None:
    class KillBefore(Hook):
        def before_train(self, runner: Runner) -> None:
            raise Killed

    run('folder', by_iterations, kill=5)
    (work_dir,) = {Path(make_config('folder').work_dir)}
    unfinished = work_dir / '.gplq_resume.pth.abc.gplq-tmp'
    unfinished.write_bytes(b'half')
    # Another run begins there, and is killed before it has a resume point of its own.
    runner = Runner.from_cfg(make_config('folder', iterations=16, resume_interval=INTERVAL))
    runner.register_hook(KillBefore())
    with pytest.raises(Killed):
        runner.train()
    assert not unfinished.exists()
    with pytest.raises(CheckpointError, match=r'gplq_resume.pth was left by an earlier run.*without --resume'):
        run('folder', by_iterations, resume=True)


def test_a_full_disk_leaves_the_last_resume_point(run: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run('whole', by_iterations)
    written = []

    def until_full(path: str) -> None:
        written.append(path)
        if len(written) > 12:
            raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr('gplq.files._force_to_disk', until_full)
        with pytest.raises(WriteError, match=r'cannot be written .*No space left.*is kept'):
            run('full', by_iterations)
    assert_same_end(whole, run('full', by_iterations, resume=True))


def test_killed_in_the_weight_stage_training_is_not_repeated(
    run: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run('whole', by_iterations)
    with monkeypatch.context() as patch:

        def killed(*args: Any, **kwargs: Any) -> None:
            raise Killed

        patch.setattr('gplq.plugins.hooks.weight_ptq_hook.quantize_weights', killed)
        with pytest.raises(Killed):
            run('broken', by_iterations)
    seen = []

    class Watch(Hook):
        def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
            seen.append(runner.iter)

    def watched(config: Config) -> None:
        by_iterations(config)
        config.custom_hooks = [dict(type=Watch)]

    assert_same_end(whole, run('broken', watched, resume=True))
    assert not seen


def test_every_sample_has_random_numbers_of_its_own_wherever_it_is_drawn() -> None:
    class Random:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[float, float, float]:
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    data = ReplayDataset(Random())
    data.seed(1)
    state = torch.get_rng_state()
    first = data[Draw(0, 2)]
    assert torch.equal(torch.get_rng_state(), state), 'the random state of training is left alone'
    others = [data[Draw(0, 1)], data[Draw(1, 2)]]
    assert data[Draw(0, 2)] == first
    assert all(a != b for other in others for a, b in zip(first, other, strict=True))
    data.seed(2)
    assert data[Draw(0, 2)] != first


def test_consumed_batches_are_skipped_and_passes_of_an_endless_sampler_counted() -> None:
    class Endless:
        sampler = iter(())
        batch_size = 2

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            for _ in range(3):
                yield from ([0, 1], [2, 3])

    batches = ReplayBatchSampler(Endless(), samples=4)
    everything = list(batches)
    assert everything[0] == [Draw(0, 0), Draw(0, 1)]
    assert everything[3] == [Draw(1, 2), Draw(1, 3)]
    batches.start(0, consumed=3)
    assert list(batches) == everything[3:]
    assert batches.passed == 6
    assert list(batches) == everything, 'only the pass that is entered is shortened'


def test_forked_workers_leave_a_gpu_alone_that_their_parent_has_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda._is_in_bad_fork', lambda: os.getpid() != parent)
    monkeypatch.setattr('torch.cuda.is_initialized', lambda: os.getpid() == parent)
    data = ReplayDataset([torch.tensor(4.0)])
    batches = [[Draw(0, 0)]]
    loader = DataLoader(data, batch_sampler=batches, num_workers=1, multiprocessing_context='fork')
    assert [float(batch) for batch in loader] == [4.0]

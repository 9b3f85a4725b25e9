"""Who decides about length, optimizer and learning rates."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from gplq.record import named_quantizers

Train = Callable[..., Runner]


class Rates(Hook):
    """Notes the learning rates of all groups at every iteration, and the rate of stochastic depth."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.drop_path: set[float] = set()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        self.rates.append([group['lr'] for group in runner.optim_wrapper.param_groups])
        self.drop_path |= {block.drop_path.drop_prob for block in runner.model.backbone.blocks}


@pytest.fixture
def rates(make_config: Callable[..., Config]) -> Callable[..., tuple[Runner, Rates]]:
    def run(change: Callable[[Config], None] | None = None, **hook: object) -> tuple[Runner, Rates]:
        config = make_config(**hook)
        if change is not None:
            change(config)
        runner = Runner.from_cfg(config)
        watch = Rates()
        runner.register_hook(watch)
        runner.train()
        return runner, watch

    return run


def test_the_hook_owns_the_schedule(rates: Callable, log_of: Callable[[Runner], str]) -> None:
    runner, watch = rates(iterations=3)
    # Weights, then scales; constant from the first iteration to the last, whatever the config's warm-up says.
    # Ten times the rates of a long stage, which is the most that a short one gets.
    assert watch.rates == [[5e-5, 5e-3]] * 3
    assert watch.drop_path == {0.0}
    optimizer = runner.optim_wrapper.optimizer
    assert type(optimizer) is torch.optim.AdamW
    scales = {id(p) for _, q in named_quantizers(runner.model) for p in q.parameters()}
    assert {id(p) for p in optimizer.param_groups[1]['params']} == scales
    assert len(optimizer.param_groups[0]['params']) + len(scales) == len(list(runner.model.parameters()))
    assert [group['weight_decay'] for group in optimizer.param_groups] == [0.0, 0.0]
    table = log_of(runner).partition('GPLQ changed the schedule')[2].partition('\n')[2]
    rows = [re.split(r'\s{2,}', line.strip()) for line in table.splitlines()[:12]]
    assert rows == [
        ['setting', 'config', 'activation stage'],
        ['length', '320 iterations', '3 iterations (0.38 epochs)'],
        ['train_cfg', 'EpochBasedTrainLoop', 'IterBasedTrainLoop'],
        ['log_processor.by_epoch', 'True', 'False'],
        ['validation', 'every 1 epochs', 'at the end'],
        ['optimizer', 'SGD', 'AdamW'],
        ['lr', '0.02', '5e-05'],
        ['weight_decay', '0.1', '0'],
        ['lr of scales', '0.005'],
        ['param_scheduler', 'LinearLR', 'constant'],
        ['drop_path', 'up to 0.2', '0'],
        ['init_weights', 'run', 'skipped, the checkpoint brings every weight'],
    ]


@pytest.mark.parametrize(
    ('epochs', 'minimum', 'length'),
    [
        (40, 1000, 32),  # 8 iterations an epoch: the minimum, but at most a tenth of 320
        (200, 24, 24),  # more than an epoch
        (200, 2, 8),  # never less than an epoch
    ],
)
def test_length(epochs: int, minimum: int, length: int, rates: Callable) -> None:
    def change(config: Config) -> None:
        config.train_cfg.max_epochs = epochs

    runner, watch = rates(change, iterations=None, minimum_iterations=minimum)
    assert runner.iter == len(watch.rates) == length
    assert isinstance(runner.train_loop, EpochBasedTrainLoop)


def test_iteration_based_training(rates: Callable) -> None:
    def change(config: Config) -> None:
        config.pop('train_cfg')
        config.train_cfg = dict(by_epoch=False, max_iters=50, val_interval=10)

    runner, watch = rates(change, iterations=None)
    assert isinstance(runner.train_loop, IterBasedTrainLoop)
    assert runner.iter == len(watch.rates) == 5, 'a tenth of 50'


@pytest.mark.parametrize(('ranks', 'length'), [(1, 8), (4, 2)])
def test_an_epoch_of_an_infinite_sampler_is_one_pass_over_the_data_by_all_ranks(
    ranks: int, length: int, rates: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(config: Config) -> None:
        config.pop('train_cfg')
        config.train_cfg = dict(by_epoch=False, max_iters=5000, val_interval=1000)
        config.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)

    # 16 images in batches of 2.
    monkeypatch.setattr('gplq.plugins.hooks.schedule.get_world_size', lambda: ranks)
    runner, _ = rates(change, iterations=None, minimum_iterations=1)
    assert runner.iter == length


def test_iterations_that_share_a_step_count_as_one_for_the_rates(rates: Callable) -> None:
    def change(config: Config) -> None:
        config.train_cfg.max_epochs = 1000
        config.optim_wrapper.accumulative_counts = 8

    # 8 steps of the optimizer, as few as 8 iterations without accumulation.
    _, watch = rates(change, iterations=64)
    assert watch.rates == [[5e-5, 5e-3]] * 64


def test_lost_differences_between_layers_are_listed(rates: Callable, log_of: Callable[[Runner], str]) -> None:
    def change(config: Config) -> None:
        config.optim_wrapper.optimizer = dict(type='AdamW', lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        config.optim_wrapper.paramwise_cfg = dict(custom_keys=dict(backbone=dict(lr_mult=0.1)))

    runner, watch = rates(change, iterations=1)
    # mmengine lists the base rate as a third.
    assert watch.rates == [[5e-5, 5e-3, 5e-5]]
    log = log_of(runner)
    assert re.search(r'^rates of layers +2 different +all alike', log, re.M)
    assert re.search(r'^betas +\(0.9, 0.95\) +\(0.9, 0.999\)', log, re.M)
    assert not re.search(r'^weight_decay', log, re.M), 'it is 0 before and after'


def test_rates_can_be_set(rates: Callable) -> None:
    runner, watch = rates(iterations=1, stage=dict(lr=1e-4, scale_lr=3e-3, weight_decay=0.05, rank=8))
    assert watch.rates == [[1e-4, 3e-3]]
    assert [group['weight_decay'] for group in runner.optim_wrapper.param_groups] == [0.05, 0.0]


def test_a_kept_schedule_has_the_scales_in_its_warm_up(rates: Callable) -> None:
    def change(config: Config) -> None:
        config.train_cfg.max_epochs = 1

    runner, watch = rates(change, keep_schedule=True, iterations=None)
    assert runner.iter == 8
    assert type(runner.optim_wrapper.optimizer) is torch.optim.SGD
    # mmengine's LinearLR from 0.001 to 1 in the 7 steps that 8 iterations have, for both groups alike.
    factors = [0.001 + 0.999 * i / 7 for i in range(8)]
    assert watch.rates == [pytest.approx([0.02 * f, 5e-3 * f]) for f in factors]
    assert watch.drop_path == {0.2}


def test_a_kept_schedule_has_the_momentum_of_the_config(rates: Callable) -> None:
    def change(config: Config) -> None:
        config.train_cfg.max_epochs = 1
        config.param_scheduler = [dict(type='LinearMomentum', start_factor=0.5, by_epoch=False, begin=0, end=8)]

    runner, _ = rates(change, keep_schedule=True, iterations=None)
    assert [group['momentum'] for group in runner.optim_wrapper.param_groups] == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize('hook', ['GPLQHook', 'WeightPTQHook'])
def test_without_iterations_a_kept_schedule_is_not_run(hook: str, rates: Callable) -> None:
    def change(config: Config) -> None:
        config.train_cfg.max_epochs = 1
        config.default_hooks.gplq.type = f'gplq.plugins.{hook}'

    runner, watch = rates(change, keep_schedule=True, iterations=0)
    assert runner.iter == len(watch.rates) == 0


def test_gradient_clipping_and_accumulation_stay(rates: Callable) -> None:
    def change(config: Config) -> None:
        config.optim_wrapper.accumulative_counts = 2
        config.optim_wrapper.clip_grad = dict(max_norm=1e-12)

    runner, watch = rates(change, iterations=4)
    assert runner.optim_wrapper._accumulative_counts == 2
    steps = {float(state['step']) for state in runner.optim_wrapper.optimizer.state.values()}
    assert steps == {2.0}, 'four iterations are two steps'
    assert runner.optim_wrapper.clip_grad_kwargs == {'max_norm': 1e-12}


def test_mixed_precision_on_the_cpu(train: Train, log_of: Callable[[Runner], str]) -> None:
    def change(config: Config) -> None:
        config.optim_wrapper.type = 'gplq.plugins.amp.BFloat16OptimWrapper'
        config.optim_wrapper.emulate = True

    runner = train(change=change)
    assert type(runner.optim_wrapper).__name__ == 'BFloat16OptimWrapper'
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in runner.model.parameters())
    assert len(re.findall(r'Iter\(train\).*loss_mimicking: \d', log_of(runner))) == 4


def test_several_optimizers_are_refused() -> None:
    from mmengine.optim import OptimWrapperDict

    from gplq.errors import RecipeError
    from gplq.plugins.hooks.schedule import _wrapper

    class Stub:
        optim_wrapper = OptimWrapperDict()

    with pytest.raises(RecipeError, match='several optimizers'):
        _wrapper(Stub())  # type: ignore[arg-type]


@pytest.mark.parametrize('begin', [dict(begin_epoch=5), dict(begin_iter=100)])
def test_averaging_begins_with_the_stage(
    make_config: Callable[..., Config], log_of: Callable[[Runner], str], begin: dict[str, int]
) -> None:
    config = make_config()
    config.custom_hooks = [dict(type='EMAHook', **begin)]
    runner = Runner.from_cfg(config)
    runner.train()
    ((name, value),) = begin.items()
    assert re.search(rf'EMAHook\.{name} +{value} +0', log_of(runner))


def test_scales_in_frozen_stages_are_told(
    make_config: Callable[..., Config],
    log_of: Callable[[Runner], str],
    monkeypatch: pytest.MonkeyPatch,
    toy: ModuleType,
) -> None:
    def train(self: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
        torch.nn.Module.train(self, mode)
        # As mmdet's backbones do it.
        self.blocks[0].requires_grad_(False)
        return self

    monkeypatch.setattr(toy.ToyBackbone, 'train', train)
    runner = Runner.from_cfg(make_config())
    runner.train()
    every = [name for name, q in named_quantizers(runner.model) for _ in q.parameters()]
    frozen = [name for name in every if name.startswith('backbone.blocks.0.')]
    assert f'{len(every) - len(frozen)} of {len(every)}, the others are frozen' in log_of(runner)

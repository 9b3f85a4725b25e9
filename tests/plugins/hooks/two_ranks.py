"""One of several processes that train the toy together; started as torchrun does, writes what it ends with."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import toy
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from gplq.errors import GPLQError

# Few enough samples that every observer keeps all of them, whoever sees them. The config's SGD: Adam takes a whole step
# in the direction of a gradient that is zero but for rounding, such as a key bias's.
JOINT: dict[str, Any] = dict(
    iterations=None, keep_schedule=True, stage=dict(scale_lr=0.02), recipe=dict(calibration_samples=16)
)


class Spoil(Hook):
    """Gives the second process alone a broken image in its second iteration."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.rank == 1 and runner.iter == 1:
            data_batch['inputs'][0].fill_(float('nan'))


class Trajectory(Hook):
    """Keeps all parameters after every iteration."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        model = getattr(runner.model, 'module', runner.model)
        averages = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
        parameters = [p.detach() for m in (model, *averages) for p in m.parameters()]
        self.states.append(torch.cat([p.flatten() for p in parameters]))


def change(config: Config, what: str, share: int) -> None:
    """Settings of a run whose loss is a mean over images, so that ranks together take the steps of one process."""
    config.model.update(norm=False, drop_path=0.0)
    config.train_cfg.max_epochs = 1
    config.param_scheduler = []
    config.train_dataloader.batch_size = 4 // share
    config.train_dataloader.dataset.augment = True
    if what == 'averaged':
        config.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    if what == 'mixed':
        config.optim_wrapper.type = 'gplq.plugins.amp.BFloat16OptimWrapper'
        config.optim_wrapper.emulate = True
    if what == 'accumulated':
        config.optim_wrapper.update(accumulative_counts=2, clip_grad=dict(max_norm=0.1))


class Calibrated(Hook):
    """Keeps the state before the first iteration."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == 0:
            self.state = {name: t.clone() for name, t in runner.model.module.state_dict().items()}
            self.images = torch.stack(data_batch['inputs'])


def main(folder: str, checkpoint: str, what: str) -> None:
    # Not left to mmengine, which asks for a GPU first.
    rank, count = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    torch.distributed.init_process_group('gloo', f'file://{folder}/rendezvous', rank=rank, world_size=count)
    arguments: dict[str, Any] = dict(iterations=2, stage=dict(lr=1e-3, scale_lr=0.05))
    if what == 'spoil':
        # Heads that are frozen after the model was wrapped must not be waited for.
        arguments['label_free'] = True
    joint = what not in ('train', 'spoil')
    if joint:
        arguments = JOINT
    config = Config(toy.toy_config(f'{folder}/run', checkpoint, **arguments))
    if joint:
        change(config, what, count)
    config.launcher = 'pytorch'
    # The default names a GPU.
    config.model_wrapper_cfg = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
    runner = Runner.from_cfg(config)
    watch = Calibrated()
    runner.register_hook(watch)
    trajectory = Trajectory()
    runner.register_hook(trajectory)
    if what == 'spoil':
        runner.register_hook(Spoil())
    error = ''
    try:
        runner.train()
    except GPLQError as raised:
        error = f'{type(raised).__name__}: {raised}'
    result = {
        'error': error,
        'calibrated': watch.state,
        'images': watch.images,
        'trajectory': trajectory.states,
        'state': runner.model.module.state_dict(),
        'wrapper': type(runner.model).__name__,
    }
    torch.save(result, f'{folder}/rank{runner.rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])

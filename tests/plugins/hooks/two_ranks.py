"""One of several processes that train the toy together; started as torchrun does, writes what it ends with."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import toy
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from gplq.errors import GPLQError


class Spoil(Hook):
    """Gives the second process alone a broken image in its second iteration."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.rank == 1 and runner.iter == 1:
            data_batch['inputs'][0].fill_(float('nan'))


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
    config = Config(toy.toy_config(f'{folder}/run', checkpoint, **arguments))
    config.launcher = 'pytorch'
    # The default names a GPU.
    config.model_wrapper_cfg = dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)
    runner = Runner.from_cfg(config)
    watch = Calibrated()
    runner.register_hook(watch)
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
        'state': runner.model.module.state_dict(),
        'wrapper': type(runner.model).__name__,
    }
    torch.save(result, f'{folder}/rank{runner.rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])

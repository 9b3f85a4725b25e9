"""Put the activation stage's schedule in place of the config's, and say what was changed."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn

from gplq.activation_stage import learning_rates, parameter_groups, stage_iterations
from gplq.errors import RecipeError
from gplq.plugins.hooks.data_hook import check_batches
from gplq.plugins.hooks.model import model_of
from gplq.plugins.hooks.settings import HookSettings
from gplq.record import scale_parameters

__all__ = ['Change', 'keep_schedule', 'table', 'take_over']

# Setting, value in the config, value now.
Change = tuple[str, str, str]


def take_over(runner: Runner, settings: HookSettings) -> list[Change]:
    """Set length, optimizer, learning rates, constant schedule and drop-path of the activation stage.

    Returns:
        Every value that was changed.
    """
    changes = _set_length(runner, settings)
    changes += _set_optimizer(runner, settings)
    if runner.param_schedulers:
        before = ', '.join(type(s).__name__ for s in _listed(runner.param_schedulers))
        runner.param_schedulers = []
        changes.append(('param_scheduler', before, 'constant'))
    changes += _average_from_the_start(runner)
    highest = _silence_drop_path(model_of(runner))
    if highest:
        changes.append(('drop_path', f'up to {highest:g}', '0'))
    return changes


def keep_schedule(runner: Runner, settings: HookSettings) -> list[Change]:
    """Keep the config's schedule and give the scales a group of their own in its optimizer."""
    optimizer = _wrapper(runner).optimizer
    scales = scale_parameters(model_of(runner))
    if scales:
        _, rate = learning_rates(settings.stage, _updates(runner))
        optimizer.add_param_group({'params': scales, 'lr': rate, 'weight_decay': 0.0})
    if runner.param_schedulers is not None:
        # Those that are there know nothing of the new group: a warm-up would drive it from its first factor to 1.
        # They have scaled the other groups already, which must start from their own values again.
        for group in optimizer.param_groups:
            for key in [key for key in group if key.startswith('initial_')]:
                group[key.removeprefix('initial_')] = group.pop(key)
        if 'param_scheduler' not in runner.cfg:
            raise RecipeError(
                'keep_schedule=True builds the schedulers anew from the config, which a Runner without Runner.from_cfg '
                'does not have: make it by Runner.from_cfg, or leave keep_schedule out'
            )
        runner.param_schedulers = runner.build_param_scheduler(runner.cfg.param_scheduler)
    return [('param_groups', 'config', f'+ 1 group of {len(scales)} scales and offsets')] if scales else []


def table(changes: list[Change]) -> str:
    """The changes as text."""
    rows = [('setting', 'config', 'activation stage'), *changes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _set_length(runner: Runner, settings: HookSettings) -> list[Change]:
    loop = runner.train_loop
    epoch = len(loop.dataloader)
    if isinstance(getattr(loop.dataloader.batch_sampler, 'sampler', None), InfiniteSampler):
        # Its length is that of all the data; a rank reads its share.
        epoch = math.ceil(epoch / get_world_size())
    check_batches(loop.dataloader)
    before = f'{loop.max_iters} iterations'
    by_epoch = not isinstance(loop, IterBasedTrainLoop)
    validation = f'every {loop.val_interval} {"epochs" if by_epoch else "iterations"}'
    length = settings.iterations
    if length is None:
        length = stage_iterations(epoch, loop.max_iters, settings.minimum_iterations)
    changes = [('length', before, f'{length} iterations ({length / epoch:.2f} epochs)')]
    if not by_epoch:
        loop._max_iters = length
        loop.val_interval = max(1, length)
        loop.dynamic_milestones, loop.dynamic_intervals = [0], [loop.val_interval]
    elif length % epoch == 0:
        loop._max_epochs, loop._max_iters = length // epoch, length
        loop.val_interval = max(1, length // epoch)
        loop.dynamic_milestones, loop.dynamic_intervals = [0], [loop.val_interval]
    else:
        runner._train_loop = IterBasedTrainLoop(runner, loop.dataloader, max_iters=length, val_interval=max(1, length))
        changes.append(('train_cfg', type(loop).__name__, IterBasedTrainLoop.__name__))
        if runner.log_processor.by_epoch:
            runner.log_processor.by_epoch = False
            changes.append(('log_processor.by_epoch', 'True', 'False'))
    return [*changes, ('validation', validation, 'at the end')] if runner.val_loop is not None else changes


def _average_from_the_start(runner: Runner) -> list[Change]:
    """Let hooks that average begin with the stage: the config's later begin is one of a longer training."""
    changes = []
    for hook in runner.hooks:
        if isinstance(hook, EMAHook) and (hook.begin_epoch or hook.begin_iter):
            begin = 'begin_epoch' if hook.begin_epoch else 'begin_iter'
            changes.append((f'{type(hook).__name__}.{begin}', str(getattr(hook, begin)), '0'))
            hook.begin_epoch = hook.begin_iter = 0
            hook.enabled_by_epoch = False
    return changes


def _set_optimizer(runner: Runner, settings: HookSettings) -> list[Change]:
    wrapper = _wrapper(runner)
    old = wrapper.optimizer
    stage, length = settings.stage, _updates(runner)
    lr, scale_lr = learning_rates(stage, length)
    changes = [
        ('optimizer', type(old).__name__, 'AdamW'),
        ('lr', f'{old.defaults["lr"]:g}', f'{lr:g}'),
        ('weight_decay', f'{old.defaults.get("weight_decay", 0):g}', f'{stage.weight_decay:g}'),
    ]
    if 'betas' in old.defaults:
        changes.append(('betas', str(tuple(old.defaults['betas'])), '(0.9, 0.999)'))
    rates = {(group.get('initial_lr', group['lr']), group.get('weight_decay')) for group in old.param_groups}
    if len(rates) > 1:
        changes.append(('rates of layers', f'{len(rates)} different', 'all alike'))
    groups = parameter_groups(model_of(runner), stage, length)
    wrapper.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=stage.weight_decay)
    if wrapper.base_param_settings is not None:
        wrapper.base_param_settings.update(wrapper.optimizer.defaults)
    if len(groups) > 1:
        changes.append(('lr of scales', '', f'{scale_lr:g}'))
    # A backbone that freezes its first stages freezes what was inserted into them.
    scales = scale_parameters(model_of(runner))
    frozen = sum(not scale.requires_grad for scale in scales)
    if frozen:
        changes.append(('scales that learn', '', f'{len(scales) - frozen} of {len(scales)}, the others are frozen'))
    return [change for change in changes if change[1] != change[2]]


def _wrapper(runner: Runner) -> OptimWrapper:
    if isinstance(runner.optim_wrapper, OptimWrapperDict):
        raise RecipeError('several optimizers (OptimWrapperDict) are not supported: use one optim_wrapper')
    return runner.optim_wrapper


def _updates(runner: Runner) -> int:
    """Steps of the optimizer, which decide how far a rate moves the weights: several iterations may share one."""
    return math.ceil(runner.train_loop.max_iters / _wrapper(runner)._accumulative_counts)


def _silence_drop_path(model: nn.Module) -> float:
    """Set every stochastic depth to 0 and return the highest that was there."""
    highest = 0.0
    for module in model.modules():
        rate: Any = getattr(module, 'drop_prob', None)
        if 'DropPath' in type(module).__name__ and isinstance(rate, float):
            highest = max(highest, rate)
            module.drop_prob = 0.0  # type: ignore[assignment]
    return highest


def _listed(schedulers: Any) -> list[Any]:
    if isinstance(schedulers, dict):
        return [s for group in schedulers.values() for s in group]
    return list(schedulers)

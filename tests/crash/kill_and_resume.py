"""Kill a run by SIGKILL at random moments of either stage, resume it, and compare it bit by bit with a whole one.

A classifier and a detector, random augmentation on, workers on. After every kill the checkpoint that the run names
must be readable.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

import gplq.plugins.detection  # noqa: F401
from gplq.plugins.detection.shapes import ShapesSettings, write_split
from gplq.plugins.hooks import weight_ptq_hook
from gplq.plugins.hooks.resume import find_resume_point
from gplq.plugins.safe_load import allow_mmengine_objects

ROOT = Path(__file__).parents[2]
EXAMPLE = 'example: OMP_NUM_THREADS=1 python tests/crash/kill_and_resume.py --moments 10'
RESULTS = ('gplq_w32a4.pth', 'gplq_w4a4.pth')
STAGES = ('activations', 'weights')
PATIENCE = 600

MakeConfig = Callable[[Path], Config]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--moments', type=int, default=10, help='of each model and stage (default: 10)')
    parser.add_argument('--models', nargs='+', choices=list(MODELS_HERE), default=list(MODELS_HERE))
    parser.add_argument('--seed', type=int, default=0, help='of the moments (default: 0)')
    return parser.parse_args()


class Marks(Hook):
    """Notes when a stage begins, so that the parent knows when to kill."""

    priority = 'LOWEST'

    def before_train_epoch(self, runner: Runner) -> None:
        mark(runner.work_dir, 'activations')


def mark(work_dir: str, stage: str) -> None:
    with open(Path(work_dir, 'marks'), 'a') as file:
        file.write(f'{stage} {time.time()}\n')


def marks(work: Path) -> dict[str, float]:
    """The latest time of each mark."""
    path = work / 'marks'
    lines = path.read_text().splitlines() if path.is_file() else []
    return {stage: float(when) for stage, when in (line.split() for line in lines if line.count(' ') == 1)}


def make_classifier(folder: Path) -> MakeConfig:
    toy = _toy()
    torch.manual_seed(0)
    torch.save({'state_dict': toy.ToyClassifier().state_dict()}, folder / 'fp32.pth')

    def make(work: Path) -> Config:
        settings = dict(iterations=60, resume_interval=7, recipe=dict(calibration_samples=64))
        config = Config(toy.toy_config(str(work), str(folder / 'fp32.pth'), work.name, **settings))
        config.model.dropout = 0.2
        config.train_dataloader.update(num_workers=2, persistent_workers=True, batch_size=8)
        config.train_dataloader.dataset.update(augment=True, length=64)
        config.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=10, max_keep_ckpts=1)
        config.default_hooks.logger.interval = 50
        return config

    return make


def _toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location('toy', ROOT / 'tests/plugins/hooks/toy.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules['toy'] = module
    spec.loader.exec_module(module)
    return module


def make_detector(folder: Path) -> MakeConfig:
    for split, images in (('train', 12), ('val', 2)):
        write_split(folder / 'data', split, images, ShapesSettings(size=64, max_radius=16))
    os.environ['GPLQ_DATA_ROOT'] = str(folder / 'data')

    def make(work: Path) -> Config:
        config = Config.fromfile(ROOT / 'configs/gplq_mask_rcnn_vit-tiny_shapes.py')
        config.merge_from_dict(
            {
                'model.backbone.img_size': 64,
                'model.backbone.pretrain_img_size': 64,
                'model.backbone.depth': 2,
                'model.backbone.window_block_indexes': [0],
                'train_dataloader.batch_size': 2,
                'default_hooks.gplq.iterations': 15,
                'default_hooks.gplq.resume_interval': 2,
                'default_hooks.gplq.validate_fp32': False,
                'default_hooks.gplq.recipe': dict(calibration_samples=12),
                'default_hooks.checkpoint.by_epoch': False,
                'default_hooks.checkpoint.interval': 4,
                'load_from': str(folder / 'fp32.pth'),
                'work_dir': str(work),
                'experiment_name': work.name,
            }
        )
        return config

    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(make(folder).model)
    model.init_weights()
    torch.save({'state_dict': model.state_dict()}, folder / 'fp32.pth')
    return make


MODELS_HERE: dict[str, Callable[[Path], MakeConfig]] = {'classifier': make_classifier, 'detector': make_detector}


def start(make: MakeConfig, work: Path) -> int:
    """Run in a process of its own, from the resume point where there is one; give its number."""
    work.mkdir(exist_ok=True)
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    log = os.open(work / 'log.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        config = make(work)
        # What a process starts from must not matter.
        torch.manual_seed(random.SystemRandom().getrandbits(32))
        if find_resume_point(str(work)):
            config.resume, config.load_from = True, None
        runner = Runner.from_cfg(config)
        runner.register_hook(Marks())
        quantize = weight_ptq_hook.quantize_weights

        def marked(*args: Any, **kwargs: Any) -> None:
            mark(str(work), 'weights')
            quantize(*args, **kwargs)

        weight_ptq_hook.quantize_weights = marked
        runner.train()
        mark(str(work), 'end')
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finish(pid: int, work: Path) -> None:
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f'the run in {work} failed:\n{(work / "log.txt").read_text()[-3000:]}')


def kill(pid: int, work: Path, stage: str, delay: float) -> bool:
    """Kill so many seconds after the stage began; False where the run had ended before."""
    started = time.time()
    while stage not in marks(work):
        if time.time() - started > PATIENCE:
            sys.exit(f'{work} did not reach the stage of {stage}')
        if os.waitpid(pid, os.WNOHANG)[0]:
            sys.exit(f'the run in {work} ended too early:\n{(work / "log.txt").read_text()[-3000:]}')
        time.sleep(0.001)
    time.sleep(max(0.0, marks(work)[stage] + delay - time.time()))
    os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def check_checkpoint(work: Path) -> str:
    """Read the checkpoint that the killed run would be resumed from."""
    point = find_resume_point(str(work))
    if point is None:
        return 'nothing yet'
    content = torch.load(point, weights_only=True, map_location='cpu')
    return f'iteration {content["meta"]["iter"]}'


def states(work: Path) -> dict[str, torch.Tensor]:
    return {
        f'{name}: {key}': tensor
        for name in RESULTS
        for key, tensor in torch.load(work / name, weights_only=True)['state_dict'].items()
    }


def try_moments(name: str, make: MakeConfig, folder: Path, count: int, generator: random.Random) -> tuple[int, int]:
    """How many runs ended at the same bits, and how many were killed."""
    whole = folder / 'whole'
    finish(start(make, whole), whole)
    expected, times = states(whole), marks(whole)
    lengths = {
        'activations': times['weights'] - times['activations'],
        'weights': times['end'] - times['weights'],
    }
    same = 0
    for stage in STAGES:
        for number in range(count):
            work = folder / f'{stage}{number}'
            delay = kill_within(make, work, stage, lengths[stage], generator)
            point = check_checkpoint(work)
            finish(start(make, work), work)
            found = states(work)
            different = [key for key in expected if not torch.equal(expected[key], found[key])]
            same += not different
            verdict = f'{len(different)} tensors differ, such as {different[:2]}' if different else 'same bits'
            print(f'{name} {stage} {number}: killed after {delay:.2f} s, {point}, then {verdict}', flush=True)
    return same, len(STAGES) * count


def kill_within(make: MakeConfig, work: Path, stage: str, length: float, generator: random.Random) -> float:
    """Start a run and kill it at a random moment of a stage; the seconds since that began."""
    while True:
        delay = generator.uniform(0, length)
        if kill(start(make, work), work, stage, delay):
            return delay
        # It was faster than the one whose stages were timed.
        shutil.rmtree(work)


def main() -> None:
    args = parse_args()
    allow_mmengine_objects()
    generator = random.Random(args.seed)
    totals = [0, 0]
    for name in args.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make = MODELS_HERE[name](folder)
            for index, value in enumerate(try_moments(name, make, folder, args.moments, generator)):
                totals[index] += value
    print(f'{totals[0]} of {totals[1]} killed runs ended at the same bits')
    sys.exit(totals[0] != totals[1])


if __name__ == '__main__':
    main()

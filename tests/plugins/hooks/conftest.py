"""A toy classifier in a Runner, as fixtures."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

_numbers = itertools.count()


@pytest.fixture(scope='session')
def toy() -> ModuleType:
    """The module with the toy, registered once; programs that a test starts import it by its path."""
    if 'toy' not in sys.modules:
        spec = importlib.util.spec_from_file_location('toy', Path(__file__).with_name('toy.py'))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules['toy'] = module
        spec.loader.exec_module(module)
    return sys.modules['toy']


@pytest.fixture(scope='session')
def checkpoint(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP32 weights of the toy: good enough to have something to lose."""
    torch.manual_seed(0)
    model = toy.ToyClassifier()
    data = toy.ToyImages(length=64, seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(data.images, list(data.labels))['loss_cls'].backward()
        optimizer.step()
    path = tmp_path_factory.mktemp('fp32') / 'fp32.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return path


@pytest.fixture
def make_config(toy: ModuleType, checkpoint: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes the config; keyword arguments are the hook's. Every one has a name of its own: loggers are global."""

    def make(work_dir: str = 'run', **hook: Any) -> Config:
        name = f'toy{next(_numbers)}'
        return Config(toy.toy_config(str(tmp_path / work_dir), str(checkpoint), name, **hook))

    return make


@pytest.fixture
def train(make_config: Callable[..., Config]) -> Callable[..., Runner]:
    """Trains with the given arguments of the hook; `change` edits the config first."""

    def run(work_dir: str = 'run', change: Callable[[Config], None] | None = None, **hook: Any) -> Runner:
        config = make_config(work_dir, **hook)
        if change is not None:
            change(config)
        runner = Runner.from_cfg(config)
        runner.train()
        return runner

    return run


@pytest.fixture
def log_of() -> Callable[[Runner], str]:
    """The text log of a run."""

    def read(runner: Runner) -> str:
        return (Path(runner.log_dir) / f'{runner.timestamp}.log').read_text(encoding='utf-8')

    return read


@pytest.fixture
def steps_of() -> Callable[[Runner], list[dict[str, Any]]]:
    """What the run reported, step by step."""

    def read(runner: Runner) -> list[dict[str, Any]]:
        return json.loads((Path(runner.work_dir) / 'gplq.json').read_text(encoding='utf-8'))

    return read


@pytest.fixture(autouse=True)
def plain_config_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the layout of dumped configs, which takes mmengine longer than all else that is tested here."""
    monkeypatch.setattr('mmengine.config.config.FormatCode', lambda text, **options: (text, True))


@pytest.fixture
def detector(tiny_detector_config: Path, tmp_path: Path) -> Callable[..., Runner]:
    """Makes a Runner of a tiny Mask R-CNN on a ViT, with the two lines; other arguments are the hook's."""
    import gplq.plugins.detection  # noqa: F401  isort: skip
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    torch.manual_seed(0)
    plain = Config.fromfile(tiny_detector_config)
    init_default_scope('mmdet')
    torch.save({'state_dict': MODELS.build(plain.model).state_dict()}, tmp_path / 'fp32.pth')

    def make(
        name: str = 'run',
        load_from: str | None = None,
        change: Callable[[Config], None] | None = None,
        **hook: Any,
    ) -> Runner:
        cfg = Config.fromfile(tiny_detector_config)
        arguments = dict(type='gplq.plugins.GPLQHook', weight_bits=4, activation_bits=4, iterations=2)
        few = dict(calibration_samples=4, exponents=(0.0, 1.0), clips=(1.0,))
        stage = dict(pca_samples=4, lr=1e-3)
        cfg.default_hooks.gplq = {**arguments, 'recipe': few, 'stage': stage, **hook}
        cfg.load_from = load_from or str(tmp_path / 'fp32.pth')
        cfg.work_dir, cfg.experiment_name = str(tmp_path / name), f'{tmp_path.name}{name}'
        if change is not None:
            change(cfg)
        return Runner.from_cfg(cfg)

    return make

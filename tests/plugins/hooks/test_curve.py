"""The points of a learning curve, from a Runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from gplq.plugins.hooks.curve import CURVE, Curve


def points_of(runner: Runner) -> list[dict[str, Any]]:
    path = Path(runner.work_dir) / CURVE
    return json.loads(path.read_text()) if path.is_file() else []


def test_every_validation_of_a_training_is_a_point(
    train: Callable[..., Runner], steps_of: Callable[[Runner], list[dict[str, Any]]]
) -> None:
    def short(config: Config) -> None:
        config.train_cfg.max_epochs = 3

    runner = train(
        change=short, method='lsq', mimicking=0, iterations=None, keep_schedule=True, weight_bits=2, activation_bits=2
    )
    points = points_of(runner)
    assert [point['iteration'] for point in points] == [8, 16, 24]
    minutes = [point['minutes'] for point in points]
    assert 0 < minutes[0] < minutes[1] < minutes[2]
    last = steps_of(runner)[-2]
    assert last['step'] == 'W2A2 trained'
    assert points[-1]['metrics'] == {**last['metrics'], 'oscillating': points[-1]['metrics']['oscillating']}
    assert 0 <= points[0]['metrics']['oscillating'] <= 100


def test_what_trains_nothing_has_no_points(train: Callable[..., Runner]) -> None:
    assert points_of(train(method='rtn', iterations=0)) == []


def test_points_behind_the_point_of_resumption_are_measured_again(tmp_path: Path) -> None:
    runner: Any = SimpleNamespace(work_dir=str(tmp_path), iter=0)
    curve = Curve()
    curve.resume(runner)
    for iteration in (8, 16, 24):
        runner.iter = iteration
        curve.add(runner, {'top1': float(iteration)}, iteration / 8)
    runner.iter = 16
    resumed = Curve()
    resumed.resume(runner)
    runner.iter = 24
    resumed.add(runner, {'top1': 0.0}, 9.0)
    assert [(p['iteration'], p['minutes'], p['metrics']['top1']) for p in points_of(runner)] == [
        (8, 1.0, 8.0),
        (16, 2.0, 16.0),
        (24, 9.0, 0.0),
    ]

"""Fixtures that several tests of the plugins share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gplq.plugins.benchmark import Run, plan_runs
from gplq.plugins.methods import ROW


@pytest.fixture
def make_runs(tmp_path: Path) -> Callable[..., list[Run]]:
    checkpoint = tmp_path / 'fp32.pth'
    checkpoint.write_bytes(b'weights')

    def make(methods=ROW, bits=(4, 3), seeds=(0, 1), variants=('', 'folded'), options=None, **more) -> list[Run]:
        return list(
            plan_runs(
                'cells',
                'configs/a.py',
                str(checkpoint),
                'dev',
                methods,
                [(width, width) if isinstance(width, int) else width for width in bits],
                seeds,
                variants,
                options or {},
                tmp_path / 'work',
                **more,
            )
        )

    return make

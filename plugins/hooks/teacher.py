"""The frozen FP32 twin of the quantized part and the PCA of its features, kept beside the checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.runner import Runner
from torch import nn

from gplq.batches import bounded
from gplq.errors import CheckpointError
from gplq.independent_copy import independent_copy
from gplq.mimicking import FeatureTap, Mimicking, MimickingLoss, fit_mimicking_loss
from gplq.pca import PCABasis
from gplq.plugins.checkpoint_file import read_checkpoint, write_checkpoint
from gplq.plugins.hooks.model import model_of, part_of, preprocess
from gplq.plugins.hooks.settings import HookSettings
from gplq.plugins.results import file_sha256

__all__ = ['LabelFreeLoss', 'make_mimicking', 'resume_mimicking', 'teacher_hash']

FILE = 'gplq_teacher.pth'


def make_mimicking(runner: Runner, settings: HookSettings, loader: Iterable[Any]) -> Mimicking:
    """Copy the part as it is now, fit the PCA of its outputs and keep both in the working directory."""
    model = model_of(runner)
    part = part_of(model, settings)
    teacher = independent_copy(part)
    stage = settings.stage
    loss = fit_mimicking_loss(
        teacher,
        FeatureTap(teacher, '', 'output'),
        bounded(loader, stage.pca_samples),
        lambda twin, batch: twin(preprocess(model, batch)['inputs']),
        explained_variance=stage.explained_variance,
        multiple=stage.rank_multiple,
        rank=stage.rank,
        reduction=stage.reduction,
    )
    for number, basis in enumerate(loss.bases):
        runner.logger.info(
            f'GPLQ mimicking: output {number}, {basis.rank} of {len(basis.mean)} directions '
            f'explain {basis.explained:.1%}'
        )
    if is_main_process():
        bases = [vars(basis) for basis in loss.bases]
        write_checkpoint(Path(runner.work_dir) / FILE, {'state_dict': teacher.state_dict(), 'bases': bases})
    barrier()
    return Mimicking(part, teacher, loss, stage.mimicking_weight)


def teacher_hash(runner: Runner) -> str | None:
    """Content of the file that holds twin and PCA, hashed, for the checkpoints beside it."""
    path = Path(runner.work_dir) / FILE
    return file_sha256(path) if path.is_file() else None


def resume_mimicking(runner: Runner, settings: HookSettings, sha256: str | None) -> Mimicking:
    """The twin and PCA of the run that is resumed; the checkpoint's own weights have moved on since.

    Raises:
        CheckpointError: if they are no longer there, or are not those of that run.
    """
    path = Path(runner.work_dir) / FILE
    if not path.is_file():
        raise CheckpointError(
            f'{path} is missing: it holds the FP32 teacher of the run to resume; start anew from the FP32 checkpoint'
        )
    if sha256 != file_sha256(path):
        raise CheckpointError(
            f'{path} is not the FP32 teacher of the run to resume: another run has written into this folder; '
            'start anew from the FP32 checkpoint'
        )
    kept = read_checkpoint(str(path))
    part = part_of(model_of(runner), settings)
    teacher = independent_copy(part)
    for module in teacher.modules():
        if hasattr(module, 'enabled'):
            module.enabled = False  # type: ignore[assignment]
    teacher.load_state_dict(kept['state_dict'])
    device = next(part.parameters()).device
    loss = MimickingLoss([PCABasis(**basis) for basis in kept['bases']], settings.stage.reduction).to(device)
    return Mimicking(part, teacher, loss, settings.stage.mimicking_weight)


class LabelFreeLoss:
    """Stands in for the model's `loss`: runs the part alone, so heads and labels are never touched."""

    def __init__(self, part: nn.Module, mimicking: Mimicking) -> None:
        self.part = part
        self.mimicking = mimicking

    def __call__(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        self.part(inputs)
        return {'loss_mimicking': self.mimicking()}

"""Feature mimicking: the student's features follow the teacher's along the teacher's principal directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gplq.errors import RecipeError, StageError
from gplq.pca import PCABasis, fit_pca_maps, vectors
from gplq.trace import evaluating

__all__ = ['FeatureTap', 'Mimicking', 'MimickingLoss', 'Reduction', 'fit_mimicking_loss']

Reduction = Literal['sum', 'mean', 'relative']


class MimickingLoss(nn.Module):
    """``L_PCA = 1/N sum_i || (f_s,i - mu) V - (f_t,i - mu) V ||^2`` (GPLQ eq. 2); the mean mu cancels.

    Args:
        bases: one for each feature map.
        reduction: over the rank: ``'sum'`` as the formula is printed, ``'mean'`` as the paper's prose says, or
            ``'relative'``, divided by the variance that the basis covers, which has no unit.
    """

    def __init__(self, bases: PCABasis | Sequence[PCABasis], reduction: Reduction = 'sum') -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise RecipeError(f'reduction={reduction!r} is not one of {get_args(Reduction)}')
        self.reduction = reduction
        self.bases = [bases] if isinstance(bases, PCABasis) else list(bases)
        for number, basis in enumerate(self.bases):
            self.register_buffer(f'components{number}', basis.components)

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """Features of the same images, shapes as :func:`gplq.pca.vectors` takes them -> scalar, a mean over maps."""
        students = [student] if isinstance(student, Tensor) else list(student)
        teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        losses = []
        for number, basis in enumerate(self.bases):
            difference = vectors(students[number] - teachers[number].detach())
            components = self.get_buffer(f'components{number}')
            loss = (difference.float() @ components).square().sum(dim=1).mean()
            if self.reduction == 'mean':
                loss = loss / basis.rank
            elif self.reduction == 'relative':
                loss = loss / max(basis.variance, torch.finfo(torch.float32).tiny)
            losses.append(loss)
        return torch.stack(losses).mean()


class FeatureTap:
    """Keeps the input or output of one module of the latest forward pass.

    Args:
        model: the root.
        name: the module, ``''`` for the root itself.
        side: which end.
    """

    def __init__(self, model: nn.Module, name: str, side: Literal['input', 'output']) -> None:
        self.module = model.get_submodule(name)
        self.side = side
        self.features: list[Tensor] = []
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @contextmanager
    def attached(self) -> Iterator[FeatureTap]:
        """Watch until the context ends."""
        handle = self.module.register_forward_hook(self._keep, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()
            self.features, self.arguments = [], ((), {})

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.arguments = (args, kwargs)
        self.features = _tensors(args if self.side == 'input' else output)

    def take(self) -> list[Tensor]:
        """The features, once; what the module was called with is let go, too.

        Raises:
            StageError: if the module did not run.
        """
        if not self.features:
            raise StageError(f'{type(self.module).__name__} did not run: there are no features to mimic')
        features, self.features, self.arguments = self.features, [], ((), {})
        return features

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureTap:
        # A copy of the model (an average, say) keeps no features of the original.
        tap = object.__new__(FeatureTap)
        memo[id(self)] = tap
        tap.module, tap.side = self.module, self.side
        tap.features, tap.arguments = [], ((), {})
        return tap


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in _tensors(item)]
    return []


def fit_mimicking_loss(
    teacher: nn.Module,
    tap: FeatureTap,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    *,
    explained_variance: float = 0.6,
    multiple: int = 32,
    rank: int | None = None,
    reduction: Reduction = 'sum',
) -> MimickingLoss:
    """PCA of the teacher's features on a calibration subset, as a loss (GPLQ sec. 3.2.1)."""

    def features() -> Iterator[list[Tensor]]:
        for batch in batches:
            run(teacher, batch)
            yield tap.take()

    with evaluating(teacher), tap.attached():
        bases = fit_pca_maps(features(), explained_variance, multiple, rank)
    return MimickingLoss(bases, reduction).to(bases[0].components.device)


class Mimicking:
    """Student tap, teacher and loss together; computes the loss of the student's latest forward pass.

    Args:
        student: the module whose features are watched while it trains.
        teacher: its frozen FP32 twin; run in inference mode on the very inputs the student saw.
        loss: with a basis for each feature.
        weight: factor of the loss.
        side: whether features are the modules' outputs or their inputs.
        feature: name of the watched module in both.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        loss: MimickingLoss,
        weight: float = 1.0,
        feature: str = '',
        side: Literal['input', 'output'] = 'output',
    ) -> None:
        # Apart: some backbones' train() returns nothing.
        teacher.eval()
        self.teacher = teacher.requires_grad_(False)
        self.loss = loss
        self.weight = weight
        self._inputs = FeatureTap(student, '', 'input')
        self._student = FeatureTap(student, feature, side)
        self._teacher = FeatureTap(teacher, feature, side)

    @contextmanager
    def attached(self) -> Iterator[Mimicking]:
        """Watch student and teacher until the context ends."""
        handle = self._inputs.module.register_forward_pre_hook(self._run_teacher, with_kwargs=True)
        try:
            with self._inputs.attached(), self._student.attached(), self._teacher.attached():
                yield self
        finally:
            handle.remove()

    def __call__(self) -> Tensor:
        """Weighted loss of the student's latest forward pass."""
        if not self._teacher.features:
            args, kwargs = self._inputs.arguments
            with torch.no_grad():
                self.teacher(*args, **kwargs)
        loss: Tensor = self.loss(self._student.take(), self._teacher.take())
        return self.weight * loss

    def _run_teacher(self, student: nn.Module, args: Any, kwargs: Any) -> None:
        # Before the student, whose activations are kept: what the teacher needs meanwhile adds nothing to the peak.
        if student.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.teacher(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Mimicking:
        # Belongs to the training of one model; copies share it and never copy the teacher.
        return self

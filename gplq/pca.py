"""Principal components of teacher features, from running sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gplq.distributed import failing_together, total
from gplq.errors import CalibrationError, RecipeError

__all__ = ['PCABasis', 'fit_pca', 'fit_pca_maps', 'vectors']


@dataclass(frozen=True)
class PCABasis:
    """Directions that mimicking compares: ``components`` ``(channels, rank)``, orthonormal, largest first.

    ``mean`` ``(channels,)`` is kept for inspection; it cancels in the loss (GPLQ eq. 2). ``explained`` is the
    share of the variance that the rank covers, ``variance`` its absolute value.
    """

    mean: Tensor
    components: Tensor
    explained: float
    variance: float

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.components.shape[1])


def vectors(features: Tensor) -> Tensor:
    """Features as a set of vectors ``(n, channels)``.

    ``(batch, channels)`` as it is; a map ``(batch, channels, height, width)`` one vector a position; tokens
    ``(batch, n, channels)`` one a token.
    """
    if features.dim() == 4:
        return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    return features.reshape(-1, features.shape[-1])


def fit_pca(
    features: Iterable[Tensor],
    explained_variance: float = 0.6,
    multiple: int = 32,
    rank: int | None = None,
) -> PCABasis:
    """PCA of all vectors in ``features``; see :func:`fit_pca_maps`, of which this is the single-map form."""
    return fit_pca_maps(([feature] for feature in features), explained_variance, multiple, rank)[0]


def fit_pca_maps(
    batches: Iterable[list[Tensor]],
    explained_variance: float = 0.6,
    multiple: int = 32,
    rank: int | None = None,
) -> list[PCABasis]:
    """A PCA for each of several feature maps, over all batches.

    The rank is the smallest that explains ``explained_variance``, rounded to the nearest multiple (but at least
    one multiple and at most the width), or ``rank`` where given (GPLQ sec. 3.2.1).

    Raises:
        RecipeError: for a share outside (0, 1], a rank or multiple below 1.
        CalibrationError: if there are no features or they are not finite.
    """
    if not 0 < explained_variance <= 1:
        raise RecipeError(f'explained_variance={explained_variance} is not in (0, 1]')
    if multiple < 1 or (rank is not None and rank < 1):
        raise RecipeError(f'rank={rank} and multiple={multiple} must be at least 1')
    sums: list[_Moments] = []
    with failing_together():
        for features in batches:
            sums = sums or [_Moments(vectors(feature).shape[1], feature.device) for feature in features]
            for moments, feature in zip(sums, features, strict=True):
                moments.add(vectors(feature))
        if not sums:
            raise CalibrationError('there are no teacher features to fit a PCA on: the data set or loader is empty')
    for moments in sums:
        moments.pool()
    return [moments.basis(explained_variance, multiple, rank) for moments in sums]


class _Moments:
    """Count, sum and outer products of vectors."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.outer = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        x = x.detach().float()
        self.count += x.shape[0]
        self.sum += x.sum(0).double()
        self.outer += (x.t() @ x).double()

    def pool(self) -> None:
        """Take in what the other ranks have summed."""
        self.count = int(total(torch.tensor(self.count, dtype=torch.long, device=self.sum.device)))
        total(self.sum)
        total(self.outer)

    def basis(self, explained_variance: float, multiple: int, rank: int | None) -> PCABasis:
        if not bool(torch.isfinite(self.outer).all()):
            raise CalibrationError('teacher features are not finite: the FP32 checkpoint is damaged')
        mean = self.sum / max(self.count, 1)
        covariance = self.outer / max(self.count, 1) - torch.outer(mean, mean)
        values, directions = torch.linalg.eigh(covariance)
        values, directions = values.flip(0).clamp(min=0), directions.flip(1)
        shares = values.cumsum(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
        width = len(values)
        if rank is None:
            needed = int((shares < explained_variance).sum()) + 1
            rank = max(multiple, multiple * ((needed + multiple // 2) // multiple))
        rank = min(rank, width)
        return PCABasis(
            mean.float(),
            directions[:, :rank].float().contiguous(),
            float(shares[rank - 1]),
            float(values[:rank].sum()),
        )

"""PCA from running sums against a singular value decomposition; ranks by hand."""

from __future__ import annotations

import pytest
import torch

from gplq.errors import CalibrationError, RecipeError
from gplq.pca import fit_pca, fit_pca_maps, vectors


def test_vectors() -> None:
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    found = vectors(maps)
    assert found.shape == (12, 2)
    assert found[1].tolist() == [1.0, 13.0]
    assert vectors(torch.zeros(2, 5, 7)).shape == (10, 7)
    assert vectors(torch.zeros(4, 7)).shape == (4, 7)


def test_basis_is_that_of_a_singular_value_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1]) + 4
    basis = fit_pca([x[:100], x[100:]], rank=3)
    centered = (x - x.mean(0)).double()
    _, singular, directions = torch.linalg.svd(centered, full_matrices=False)
    overlap = (basis.components.double().t() @ directions[:3].t()).abs()
    assert torch.allclose(overlap, torch.eye(3, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(basis.mean, x.mean(0), atol=1e-5)
    variances = singular.square() / len(x)
    assert basis.variance == pytest.approx(float(variances[:3].sum()), rel=1e-4)
    assert basis.explained == pytest.approx(float(variances[:3].sum() / variances.sum()), rel=1e-4)


def equal_variances(width: int) -> torch.Tensor:
    return torch.cat([torch.eye(width), -torch.eye(width)])


@pytest.mark.parametrize(
    ('width', 'share', 'multiple', 'rank'),
    [
        # Every direction explains 1 / width.
        (10, 0.55, 1, 6),
        (10, 0.55, 4, 8),
        (10, 0.44, 4, 4),
        (10, 0.05, 4, 4),
        (10, 1.0, 4, 10),
        (6, 0.5, 32, 6),
    ],
)
def test_rank_is_rounded_to_a_multiple(width: int, share: float, multiple: int, rank: int) -> None:
    assert fit_pca([equal_variances(width)], share, multiple).rank == rank


def test_given_rank_is_taken_as_it_is() -> None:
    assert fit_pca([equal_variances(10)], rank=7).rank == 7
    assert fit_pca([equal_variances(10)], rank=70).rank == 10


def test_a_basis_for_each_map() -> None:
    batches = [[torch.randn(2, 4, 3, 3), torch.randn(2, 6, 2, 2)] for _ in range(3)]
    bases = fit_pca_maps(batches, multiple=1)
    assert [b.components.shape[0] for b in bases] == [4, 6]
    for basis in bases:
        gram = basis.components.t() @ basis.components
        assert torch.allclose(gram, torch.eye(basis.rank), atol=1e-5)


@pytest.mark.parametrize(
    'wrong', [{'explained_variance': 0.0}, {'explained_variance': 1.1}, {'rank': 0}, {'multiple': 0}]
)
def test_wrong_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        fit_pca([torch.randn(4, 3)], **wrong)  # type: ignore[arg-type]


def test_no_features_and_broken_features() -> None:
    with pytest.raises(CalibrationError, match='empty'):
        fit_pca([])
    with pytest.raises(CalibrationError, match='not finite'):
        fit_pca([torch.full((3, 2), float('nan'))])

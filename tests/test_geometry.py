"""Figures of the report: against scikit-learn, on planted groups, and honest where there is nothing to find."""

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, silhouette_score

from bruno_ray.residuals.geometry import auroc, effect_size, point_geometry, principal_plane, silhouette

N, M, L, D = 40, 30, 3, 256


def groups(shift: float, n_points: int = L) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples; the target's is moved along one coordinate, more at later points."""
    generator = torch.Generator().manual_seed(4)
    target, baseline = (
        torch.randn(N, n_points, D, generator=generator),
        torch.randn(M, n_points, D, generator=generator),
    )
    target[:, :, 0] += shift * torch.arange(n_points)
    return target + 3, baseline + 3


def test_no_difference_is_reported_as_none():
    """In-sample, the difference-in-means of 70 prompts in 256 dimensions separates them nearly always."""
    target, baseline = groups(shift=0.0, n_points=24)
    direction = (target.mean(dim=0) - baseline.mean(dim=0))[0]
    assert auroc(target[:, 0] @ direction, baseline[:, 0] @ direction) > 0.95
    rows = point_geometry(target, baseline)
    assert abs(sum(row.effect_size for row in rows) / 24) < 0.25
    assert 0.42 < sum(row.auroc for row in rows) / 24 < 0.58
    assert max(abs(row.silhouette) for row in rows) < 0.02


def test_separation_grows_with_the_planted_shift():
    rows = point_geometry(*groups(shift=8.0))
    assert [row.point for row in rows] == [0, 1, 2]
    assert rows[1].effect_size < rows[2].effect_size and rows[2].auroc > 0.999
    assert rows[0].silhouette < rows[1].silhouette < rows[2].silhouette
    assert rows[0].cosine > rows[1].cosine > rows[2].cosine
    assert rows[2].difference_norm == pytest.approx(16, rel=0.1)
    assert rows[2].target_norm > rows[2].baseline_norm


def test_the_same_figures_as_scikit_learn():
    target, baseline = groups(shift=2.0)
    labels = [1] * N + [0] * M
    line = torch.cat([target[:, 2, 0], baseline[:, 2, 0]]).round(decimals=1)  # with ties
    assert auroc(line[:N], line[N:]) == pytest.approx(roc_auc_score(labels, line))
    points = torch.cat([target[:, 2], baseline[:, 2]])
    assert silhouette(target[:, 2], baseline[:, 2]) == pytest.approx(silhouette_score(points, labels), abs=1e-6)

    plane = principal_plane(target, baseline)
    expected = PCA(2).fit(points)
    found = torch.cat([plane.target_NL2[:, 2], plane.baseline_ML2[:, 2]]).double()
    torch.testing.assert_close(
        found.abs(), torch.as_tensor(expected.transform(points)).double().abs(), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(
        plane.explained_L2[2].double(), torch.as_tensor(expected.explained_variance_ratio_).double(), rtol=1e-4, atol=0
    )
    assert (plane.target_NL2.mean(dim=0) >= 0).all()


def test_effect_size_is_cohens_d():
    assert effect_size(torch.tensor([3.0, 5.0]), torch.tensor([0.0, 2.0])) == pytest.approx(3 / 2**0.5)


def test_identical_or_single_prompts_give_numbers():
    same = torch.ones(6, L, D)
    for target, baseline in ((same, same), (same[:1], same[:1]), (same, 2 * same[:1])):
        plane = principal_plane(target, baseline)
        assert torch.isfinite(plane.target_NL2).all() and torch.isfinite(plane.explained_L2).all()
        for row in point_geometry(target, baseline):
            assert (row.effect_size, row.auroc, row.silhouette) == (0.0, 0.5, 0.0)

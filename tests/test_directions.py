"""Planted directions and subspaces are found; options do what their names say; degenerate input is harmless."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bruno_ray.directions import METHODS, build_bank, mean, project_out, winsorize
from bruno_ray.directions.basis import orthonormalise
from bruno_ray.directions.contrastive_pca import contrastive_pca
from bruno_ray.directions.difference_in_means import difference_in_means
from bruno_ray.directions.geometric_median import median
from bruno_ray.directions.probe_pca_ensemble import probe_pca_ensemble
from bruno_ray.directions.subspace import subspace
from bruno_ray.directions.supervised_probe import PENALTIES, fit, supervised_probe
from bruno_ray.errors import ModelError, PromptError, SettingsError

N, L, D = 60, 4, 48

LEAST_OVERLAP = {"self_organising_map": 0.97}
"""With a planted direction, where not 0.98: the first neuron is the mean of a part of the prompts."""

FEWER_ROWS = {"contrastive_pca", "concept_cones"}
"""What gives only as many directions as there are; the rest of its rows is zero."""


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(seed: int, n_points: int = L) -> torch.Tensor:
    return torch.nn.functional.normalize(noise(n_points, D, seed=seed), dim=-1)


def planted(shift: float = 4.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target and baseline residuals (N, L, D) that differ by `shift` along a direction (L, D) of each point."""
    direction_LD = unit(seed=1)
    common_LD = 10 * unit(seed=2)
    target = common_LD + shift * direction_LD + 0.3 * noise(N, L, D, seed=3)
    baseline = common_LD + 0.3 * noise(N, L, D, seed=4)
    return target, baseline, direction_LD


def planted_subspace(content: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Targets vary in 3 directions (L, 3, D) that baselines do not know; both vary in 6 directions of content."""
    n_prompts = 300
    bases = torch.linalg.qr(noise(L, D, 9, seed=1))[0].mT
    behaviour_L3D, content_L6D = bases[:, :3], bases[:, 3:]

    def side(seed: int) -> torch.Tensor:
        coordinates = content * noise(n_prompts, L, 6, seed=seed)
        return torch.einsum("nlk,lkd->nld", coordinates, content_L6D) + 0.3 * noise(n_prompts, L, D, seed=seed + 1)

    behaviour = torch.tensor([4.0, 0.0, 0.0]) + torch.tensor([0.3, 2.0, 1.5]) * noise(n_prompts, L, 3, seed=9)
    return side(5) + torch.einsum("nlk,lkd->nld", behaviour, behaviour_L3D), side(7), behaviour_L3D


def captured(found_LRD: torch.Tensor, planted_LRD: torch.Tensor) -> torch.Tensor:
    """Share of each planted direction that lies in the span of the found ones, (L, R)."""
    return torch.einsum("lrd,lpd->lpr", found_LRD, planted_LRD).square().sum(dim=-1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_finds_a_planted_direction_and_obeys_the_contract(name):
    target, baseline, direction_LD = planted()
    for rank in (1, 3):
        found = METHODS[name](target, baseline, rank)
        assert found.dtype == torch.float32
        assert found.shape[0] == L and found.shape[1] <= rank and found.shape[2] == D
        there_LR = found.norm(dim=-1) > 0.5  # rows that are not zero
        torch.testing.assert_close(found @ found.mT, torch.diag_embed(there_LR.float()), atol=1e-5, rtol=0)
        assert name in FEWER_ROWS or there_LR.all()
        assert (found[:, 0] * direction_LD).sum(dim=-1).min() > LEAST_OVERLAP.get(name, 0.98)  # towards the target


def test_float64_means_keep_a_direction_under_a_large_common_component():
    # The direction is far below one float32 step of a running sum of numbers like 4000.
    direction = torch.nn.functional.normalize(noise(1, D, seed=1), dim=-1)
    common = 4000.0 + noise(1, D, seed=2)
    baseline = common + 0.01 * noise(4000, 1, D, seed=3)
    target = baseline + 0.01 * direction
    exact = (target.double() - baseline.double()).mean(dim=0)
    exact = exact / exact.norm(dim=-1, keepdim=True)

    found = difference_in_means(target, baseline)[:, 0].double()
    sequential = torch.zeros(2, 1, D)
    for i in range(len(target)):
        sequential += torch.stack([target[i], baseline[i]])
    single = torch.nn.functional.normalize((sequential[0] - sequential[1]).double(), dim=-1)

    assert (found * exact).sum() > 0.999999
    assert (single * exact).sum() < 0.9


def test_the_subspace_begins_with_the_difference_in_means():
    target, baseline, _ = planted_subspace(content=1.0)
    torch.testing.assert_close(subspace(target, baseline, 4)[:, :1], difference_in_means(target, baseline))


@pytest.mark.parametrize("content", [0.0, 1.0, 2.0])
def test_a_planted_subspace_is_found_among_shared_content(content):
    target, baseline, behaviour_L3D = planted_subspace(content)
    assert captured(subspace(target, baseline, 3), behaviour_L3D).min() > 0.9
    one = captured(difference_in_means(target, baseline), behaviour_L3D)
    assert one[:, 1:].max() < 0.1  # one direction cannot


def test_contrast_finds_what_principal_directions_of_the_target_miss():
    target, baseline, behaviour_L3D = planted_subspace(content=3.0)
    centred = (target - baseline.mean(dim=0)).transpose(0, 1)
    principal = torch.linalg.svd(centred, full_matrices=False)[2][:, :3]
    assert captured(subspace(target, baseline, 3), behaviour_L3D)[:, 1:].min() > 0.85
    assert captured(principal, behaviour_L3D)[:, 1:].max() < 0.3


def test_the_scale_of_residuals_does_not_matter():
    target, baseline, _ = planted_subspace(content=1.0)
    torch.testing.assert_close(
        subspace(1e-4 * target, 1e-4 * baseline, 3), subspace(target, baseline, 3), atol=1e-4, rtol=0
    )


def test_projected_directions_are_orthogonal_to_the_baseline_mean_and_to_each_other():
    target, baseline, _ = planted_subspace(content=1.0)
    target, baseline = target + 5, baseline + 5
    plain = build_bank(target[:, None], baseline[:, None], ["subspace"], rank=3, projected=False)["subspace@0"]
    projected = build_bank(target[:, None], baseline[:, None], ["subspace"], rank=3, projected=True)["subspace@0"]
    mean_LD = torch.nn.functional.normalize(mean(baseline).float(), dim=-1)
    assert torch.einsum("lrd,ld->lr", plain, mean_LD).abs().max() > 0.02
    assert torch.einsum("lrd,ld->lr", projected, mean_LD).abs().max() < 1e-6
    torch.testing.assert_close(projected @ projected.mT, torch.eye(3).expand(L, -1, -1), atol=1e-5, rtol=0)
    # the first is the normalised remainder of the first, not a rotation of it
    remainder = plain[:, 0] - (plain[:, 0] * mean_LD).sum(dim=-1, keepdim=True) * mean_LD
    torch.testing.assert_close(projected[:, 0], torch.nn.functional.normalize(remainder, dim=-1), atol=1e-5, rtol=0)


def test_a_direction_parallel_to_the_mean_projects_to_zero():
    mean_LD = unit(seed=1)
    assert not project_out(-mean_LD[:, None], 3 * mean_LD).any()


def test_winsorize_clamps_each_vector_to_its_own_quantile():
    residuals = noise(5, L, 101, seed=1)
    residuals[0, 0, 7], residuals[1, 2, 9] = 1000.0, -50.0
    clamped = winsorize(residuals, 0.9)
    sorted_magnitudes = residuals.abs().sort(dim=-1).values
    assert torch.allclose(clamped.abs().amax(dim=-1), sorted_magnitudes[..., 90])  # element 0.9 * 100 of each
    assert clamped[0, 0, 7] > 0 and clamped[1, 2, 9] < 0
    inside = residuals.abs() <= sorted_magnitudes[..., 90:91]
    assert torch.equal(clamped[inside], residuals[inside])
    assert winsorize(residuals, 1.0) is residuals


def test_winsorize_is_the_same_in_pieces(monkeypatch):
    residuals = noise(7, L, 20, seed=1)
    whole = winsorize(residuals, 0.95)
    monkeypatch.setattr("bruno_ray.directions.QUANTILE_LIMIT", 1)
    assert torch.equal(winsorize(residuals, 0.95), whole)


def test_winsorize_rescues_a_direction_from_one_massive_coordinate():
    target, baseline, direction_LD = planted()
    target[::7, :, 5] += 3000.0  # in some prompts only
    found = {
        quantile: build_bank(target[:, None], baseline[:, None], projected=False, winsorize_quantile=quantile)
        for quantile in (1.0, 0.95)
    }
    overlap = {q: (bank["difference_in_means@0"][:, 0] * direction_LD).sum(dim=-1) for q, bank in found.items()}
    assert overlap[1.0].abs().max() < 0.5
    assert overlap[0.95].min() > 0.8


def test_the_bank_has_every_method_at_every_position():
    target, baseline, direction_LD = planted()
    flat = noise(N, L, D, seed=8)
    bank = build_bank(
        torch.stack([flat, target], dim=1),
        torch.stack([flat.flip(0) + 0.1 * noise(N, L, D, seed=6), baseline], dim=1),
        ["difference_in_means", "subspace"],
        positions=[0, 1],
        rank=2,
        projected=False,
    )
    assert {name: tuple(rows.shape) for name, rows in bank.items()} == {
        "difference_in_means@0": (L, 1, D),
        "subspace@0": (L, 2, D),
        "difference_in_means@1": (L, 1, D),
        "subspace@1": (L, 2, D),
    }
    assert (bank["difference_in_means@1"][:, 0] * direction_LD).sum(dim=-1).min() > 0.98
    assert (bank["difference_in_means@0"][:, 0] * direction_LD).sum(dim=-1).max() < 0.7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("projected", [True, False])
def test_a_point_where_all_prompts_agree_is_zero_and_nothing_is_nan(method, projected):
    target, baseline, _ = planted()
    target[:, 0] = baseline[:, 0] = noise(D, seed=5)  # the embedding of the last token
    bank = build_bank(target[:, None], baseline[:, None], [method], rank=3, projected=projected)
    directions = bank[f"{method}@0"]
    assert torch.isfinite(directions).all()
    assert not directions[0].any()
    assert (directions[1:, 0].norm(dim=-1) - 1).abs().max() < 1e-5


def test_more_directions_than_prompts_determine_are_zero_rows():
    target, baseline, _ = planted()
    directions = subspace(target[:3], baseline[:1], 6)
    lengths = directions.norm(dim=-1)
    assert torch.isfinite(directions).all()
    assert (lengths[:, :3] - 1).abs().max() < 1e-5  # the difference, and two differences among three targets
    assert not lengths[:, 3:].any()


def test_one_prompt_a_side_still_has_a_difference():
    target, baseline, direction_LD = planted()
    directions = subspace(target[:1], baseline[:1], 3)
    assert (directions[:, 0] * direction_LD).sum(dim=-1).min() > 0.7
    assert not directions[:, 1:].any()


def test_positions_can_be_joined_into_one_subspace():
    first, second = planted(), planted(shift=-3.0)
    target, baseline = (torch.stack([first[side], second[side].roll(1, dims=-1)], dim=1) for side in (0, 1))
    bank = build_bank(target, baseline, positions=(0, 1), joined=True, projected=False)
    assert list(bank) == ["difference_in_means@0", "difference_in_means@1", "difference_in_means@0+1"]
    both = bank["difference_in_means@0+1"]
    assert both.shape == (L, 2, D)
    torch.testing.assert_close(both @ both.mT, torch.eye(2).expand(L, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[:, :1], bank["difference_in_means@0"])
    assert captured(both, bank["difference_in_means@1"]).min() > 0.999
    assert len(build_bank(target, baseline, joined=True)) == 1, "one position has nothing to join"


def test_positions_have_names_of_their_own_where_they_are_given():
    """A behaviour that lies along another direction once the answer has begun: the joint subspace holds both."""
    before, behind = planted(), planted(shift=-3.0)
    target, baseline = (torch.stack([before[side], behind[side].roll(1, dims=-1)], dim=1) for side in (0, 1))
    bank = build_bank(target, baseline, positions={"0": 0, "opened2": 1}, joined=True, projected=False)
    assert list(bank) == ["difference_in_means@0", "difference_in_means@opened2", "difference_in_means@0+opened2"]
    planted_LRD = torch.stack([before[2], behind[2].roll(1, dims=-1)], dim=1)
    assert captured(bank["difference_in_means@0+opened2"], planted_LRD).min() > 0.95
    assert captured(bank["difference_in_means@0"], planted_LRD)[:, 1].max() < 0.5
    with pytest.raises(SettingsError, match="position 2 of 2"):
        build_bank(target, baseline, positions={"opened3": 2})


def test_orthonormalise_keeps_order_and_signs_and_drops_dependent_rows():
    first, second = noise(2, 1, D, seed=1).double()
    basis = orthonormalise(torch.stack([-first, -2 * first, second], dim=1))
    torch.testing.assert_close(basis[0, 0], -first[0] / first.norm())
    assert not basis[0, 1].any()
    assert basis[0, 2] @ second[0] > 0 and abs(basis[0, 2] @ first[0]) < 1e-12


def test_what_cannot_work_says_what_to_do():
    target, baseline, _ = planted()
    target, baseline = target[:, None], baseline[:, None]
    with pytest.raises(SettingsError, match=r"choose from difference_in_means, subspace, .*, or give FILE"):
        build_bank(target, baseline, ["pca"])
    with pytest.raises(SettingsError, match=r"raise residuals\.answer_tokens"):
        build_bank(target, baseline, positions=[1])
    with pytest.raises(PromptError, match="no baseline prompts"):
        build_bank(target, baseline[:0])
    with pytest.raises(PromptError, match="same residuals at every layer"):
        build_bank(target, target)
    target[3, 0, 2, 1] = float("nan")
    with pytest.raises(ModelError, match="target prompts are not finite"):
        build_bank(target, baseline)


def overlap(found_LRD: torch.Tensor, direction_LD: torch.Tensor) -> torch.Tensor:
    """Of the first row with what was planted, (L,)."""
    return (found_LRD[:, 0] * direction_LD).sum(dim=-1)


@pytest.mark.parametrize("name", ["geometric_median", "coordinate_median"])
def test_medians_do_not_follow_a_few_odd_prompts(name):
    target, baseline, direction_LD = planted()
    target[::6] += 60 * unit(seed=6)
    baseline[::6] -= 60 * unit(seed=7)
    assert overlap(difference_in_means(target, baseline), direction_LD).max() < 0.6
    assert overlap(METHODS[name](target, baseline, 1), direction_LD).min() > 0.9


def test_the_geometric_median_has_the_least_sum_of_distances():
    points_NLD = noise(31, L, 5, seed=1) + 3 * noise(31, 1, 1, seed=2).relu()
    found_LD = median(points_NLD)
    least_L = (points_NLD - found_LD).norm(dim=-1).sum(dim=0)
    for seed in range(20):
        moved_LD = found_LD + 0.01 * noise(L, 5, seed=seed)
        assert ((points_NLD - moved_LD).norm(dim=-1).sum(dim=0) > least_L).all()


def planted_in_content(axes: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Few prompts that vary far more along 6 directions (``axes``: 6 coordinates) of content than the sides differ."""
    target, baseline, direction_LD = planted(shift=2.0)
    content_LKD = torch.eye(D)[:6].expand(L, -1, -1) if axes else torch.linalg.qr(noise(L, D, 6, seed=11))[0].mT
    inside_LD = torch.einsum("lkd,lk->ld", content_LKD, torch.einsum("lkd,ld->lk", content_LKD, direction_LD))
    outside_LD = torch.nn.functional.normalize(direction_LD - inside_LD, dim=-1)
    sides = []
    for seed, side in ((12, target), (13, baseline)):
        sides.append(side + torch.einsum("nlk,lkd->nld", 12 * noise(N, L, 6, seed=seed), content_LKD))
    sides[0] = sides[0] + 2 * (outside_LD - direction_LD)
    return sides[0], sides[1], outside_LD


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("variance_normalised", True),
        ("whitened_difference", True),
        ("whitened_difference", False),
        ("supervised_probe", False),
    ],
)
def test_content_that_varies_more_than_the_behaviour_does_not_turn_the_direction(name, axes):
    target, baseline, direction_LD = planted_in_content(axes)
    mean_overlap_L = overlap(difference_in_means(target, baseline), direction_LD)
    found_L = overlap(METHODS[name](target, baseline, 1), direction_LD)
    assert mean_overlap_L.mean() < 0.75
    assert (found_L > mean_overlap_L + 0.1).all() and found_L.min() > 0.85


def test_a_probe_that_cannot_tell_the_sides_apart_gives_no_direction(caplog):
    target, baseline, direction_LD = planted()
    target[:, 1], baseline[:, 1] = noise(N, D, seed=21), noise(N, D, seed=22)
    with caplog.at_level("WARNING"):
        found = supervised_probe(target, baseline)
    assert not found[1].any() and "no direction" in caplog.text and "[1]" in caplog.text
    assert overlap(found, direction_LD)[[0, 2, 3]].min() > 0.98
    accuracy_L = fit(target, baseline).accuracy_L
    assert accuracy_L[[0, 2, 3]].min() > 0.99 and accuracy_L[1] < 0.65
    with pytest.raises(PromptError, match="two prompts a side"):
        supervised_probe(target[:1], baseline)


def test_the_probe_is_the_logistic_regression_of_scikit_learn():
    """Up to scale. scikit-learn's C counts the sum of losses, our penalty their mean over balanced sides."""
    target, baseline = (side[:, :1] for side in planted_in_content(axes=False)[:2])
    inputs, labels = torch.cat([target, baseline])[:, 0].double(), [1] * N + [0] * N
    inputs = inputs - baseline[:, 0].double().mean(dim=0)
    inputs = inputs / inputs.square().sum(dim=-1).mean().sqrt()
    theirs = [
        torch.from_numpy(LogisticRegression(C=1 / (penalty * 2 * N), max_iter=5000, tol=1e-8).fit(inputs, labels).coef_)
        for penalty in PENALTIES
    ]
    ours = supervised_probe(target, baseline)[0, 0].double()
    assert max(torch.nn.functional.cosine_similarity(ours, weights[0], dim=0) for weights in theirs) > 0.9999


def test_contrastive_pca_keeps_the_shift_of_the_means_and_leaves_shared_content_out():
    target, baseline, behaviour_L3D = planted_subspace(content=1.0)
    found = contrastive_pca(target, baseline, 3)
    assert captured(found, behaviour_L3D).min() > 0.85
    assert captured(found[:, :1], behaviour_L3D)[:, 0].min() > 0.9, "the shift is the most pronounced"
    torch.testing.assert_close(contrastive_pca(1e-4 * target, 1e-4 * baseline, 3), found, atol=1e-4, rtol=0)


def test_probe_and_pca_agree_on_a_sign():
    target, baseline, direction_LD = planted()
    for swapped in (False, True):
        sides = (baseline, target) if swapped else (target, baseline)
        found, sign = probe_pca_ensemble(*sides), -1 if swapped else 1
        assert (sign * overlap(found, direction_LD)).min() > 0.98


@pytest.mark.parametrize("name", ["concept_cones", "self_organising_map"])
def test_several_kinds_of_the_behaviour_are_all_found(name):
    """Three kinds of targets: the difference in means is a mixture that leaves two thirds of each."""
    kinds_L3D = torch.linalg.qr(noise(L, D, 3, seed=31))[0].mT
    kind_N = torch.arange(90) % 3
    target = 8 * kinds_L3D[:, kind_N].transpose(0, 1) + 0.3 * noise(90, L, D, seed=32)
    baseline = 0.3 * noise(90, L, D, seed=33)
    assert captured(METHODS[name](target, baseline, 3), kinds_L3D).min() > 0.95
    assert captured(difference_in_means(target, baseline), kinds_L3D).max() < 0.5


def test_two_methods_of_the_same_short_name_are_refused(tmp_path):
    target, baseline, _ = planted()
    own = tmp_path / "own.py"
    own.write_text("def subspace(target, baseline, rank):\n    return target[:1, :, None].squeeze(0)\n")
    with pytest.raises(SettingsError, match="two methods are called subspace"):
        build_bank(target[:, None], baseline[:, None], ["subspace", f"{own}:subspace"])


def test_contrastive_pca_finds_behaviours_that_cancel_in_the_mean():
    target, baseline, direction_LD = planted(shift=0.0)
    target += 4 * torch.tensor([1.0, -1.0]).repeat(N // 2)[:, None, None] * direction_LD
    assert overlap(contrastive_pca(target, baseline, 1), direction_LD).abs().min() > 0.98
    assert overlap(difference_in_means(target, baseline), direction_LD).abs().max() < 0.7


def test_each_side_about_its_own_mean_loses_the_shift_that_contrastive_pca_keeps():
    target, baseline, behaviour_L3D = planted_subspace(content=1.0)
    own_LDD, other_LDD = (
        torch.einsum("nld,nle->lde", side - side.mean(dim=0), side - side.mean(dim=0)) / len(side)
        for side in (target, baseline)
    )
    first_LD = torch.linalg.eigh(own_LDD - other_LDD)[1][..., -1]
    assert captured(first_LD[:, None], behaviour_L3D)[:, 0].max() < 0.1
    assert captured(contrastive_pca(target, baseline, 1), behaviour_L3D)[:, 0].min() > 0.9


def test_without_clear_clusters_there_is_one_cone():
    target, baseline, _ = planted()
    found = METHODS["concept_cones"](target, baseline, 3)
    torch.testing.assert_close(found[:, :1], difference_in_means(target, baseline), atol=1e-5, rtol=0)
    assert not found[:, 1:].any()


@pytest.mark.parametrize("name", ["concept_cones", "self_organising_map"])
def test_kinds_are_the_same_at_any_scale_and_clusters_span_no_more_than_there_are(name):
    kinds_L3D = torch.linalg.qr(noise(L, D, 3, seed=31))[0].mT
    target = 4 * kinds_L3D[:, torch.arange(90) % 3].transpose(0, 1) + 0.3 * noise(90, L, D, seed=32)
    baseline = 0.3 * noise(90, L, D, seed=33)
    found = METHODS[name](target, baseline, 6)
    assert found[:, :3].norm(dim=-1).min() > 0.99
    if name == "concept_cones":  # neurons of one kind differ from each other as well
        assert not found[:, 3:].any()
    torch.testing.assert_close(METHODS[name](1000 * target, 1000 * baseline, 6), found, atol=1e-4, rtol=0)

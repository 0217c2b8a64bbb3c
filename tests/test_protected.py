"""Directions are cleaned of what is protected: planted subspaces, the formula by hand, and what is refused."""

from pathlib import Path

import pytest
import torch

from bruno_ray.ablation.closed_forms import apply_to_weight, factors
from bruno_ray.directions import build_bank
from bruno_ray.directions.protected import clean, components, overlap, protect
from bruno_ray.errors import PromptError, SettingsError
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.publishing.plots import point_name
from bruno_ray.publishing.report import protected_rows
from bruno_ray.publishing.wording import direction_phrase
from bruno_ray.settings import Settings
from bruno_ray.settings.sources import load

N, L, D = 60, 4, 48


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS = torch.linalg.qr(noise(L, D, 4, seed=1))[0].mT
COMMON, BEHAVIOUR, KEPT, CODE = ROWS.unbind(dim=1)
"""Orthonormal directions at each point: what all prompts share, the behaviour, and two that have to stay."""


def side(*shifts: torch.Tensor, seed: int) -> torch.Tensor:
    return (10 * COMMON + sum(shifts, torch.zeros(L, D)) + 0.1 * noise(N, L, D, seed=seed))[:, None]


BASELINE = side(seed=2)
TARGET = side(4 * BEHAVIOUR, 3 * KEPT, 2 * CODE, seed=3)
PROTECTED = {"declined": side(4 * KEPT, seed=4), "code": side(5 * CODE, seed=5)}


def along(directions_LRD: torch.Tensor, planted_LD: torch.Tensor) -> torch.Tensor:
    return torch.einsum("lrd,ld->l", directions_LRD.float(), planted_LD).abs()


def cleaned(strengths: tuple[float, ...] = (0.0, 0.5, 1.0), **protected: torch.Tensor):
    bank = build_bank(TARGET, BASELINE)
    return protect(bank, protected or PROTECTED, BASELINE, strengths, rank=2, ridge=0.01, projected=True)


def test_a_direction_that_overlaps_planted_protected_ones_leaves_them_alone_and_still_removes_the_behaviour():
    bank, _ = cleaned()
    plain, half, whole = (bank[f"difference_in_means@0{mark}"] for mark in ("", "|protect0.5", "|protect1"))
    assert (along(plain, KEPT) > 0.5).all() and (along(plain, CODE) > 0.35).all()
    assert (along(whole, KEPT) < 0.03).all() and (along(whole, CODE) < 0.03).all()
    assert (along(whole, BEHAVIOUR) > 0.98).all()
    assert (along(whole, KEPT) < along(half, KEPT)).all() and (along(half, KEPT) < along(plain, KEPT)).all()
    assert torch.allclose(whole.norm(dim=-1), torch.ones(L, 1))
    weight = noise(D, 20, seed=6)
    for point in range(L):
        edited = apply_to_weight(weight, factors([weight], whole[point], 1.0, "none"))
        kept = KEPT[point] @ weight
        assert (KEPT[point] @ edited - kept).norm() < 0.05 * kept.norm(), "what writes it is as it was"
        assert (BEHAVIOUR[point] @ edited).norm() < 0.25 * (BEHAVIOUR[point] @ weight).norm()


def test_the_overlap_with_each_set_is_the_share_of_the_squared_length():
    """The difference is 4, 3, 2 along three orthonormal directions: of its 29, 9 and 4 are protected."""
    _, overlaps = cleaned()
    assert overlaps["declined"]["difference_in_means@0"] == pytest.approx([9 / 29] * L, abs=0.03)
    assert overlaps["code"]["difference_in_means@0"] == pytest.approx([4 / 29] * L, abs=0.03)


def test_one_row_by_hand():
    """d = (3, 4)/5, c = (2, 0): with ridge 1, c (c.d) / (4 + 1) = (0.48, 0); with lambda 0.5, (0.36, 0.8) is left."""
    d, c = torch.tensor([[[0.6, 0.8]]]), torch.tensor([[[2.0, 0.0]]])
    expected = torch.nn.functional.normalize(torch.tensor([0.36, 0.8]), dim=0)
    torch.testing.assert_close(clean(d, c, strength=0.5, ridge=1.0)[0, 0], expected)
    assert overlap(d, c, ridge=1.0).item() == pytest.approx(0.6 * 0.48)


def test_the_shift_of_the_means_is_a_component_and_what_is_projected_stays_so():
    rows = components(PROTECTED["declined"][:, 0], BASELINE[:, 0], rank=2, projected=True)
    assert (along(rows[:, :1], KEPT) > 0.98).all()
    assert (rows[:, 1].norm(dim=-1) < 0.2).all(), "noise counts for little"
    bank, _ = cleaned()
    middle = torch.nn.functional.normalize(BASELINE[:, 0].mean(dim=0), dim=-1)
    assert all((along(rows_LRD, middle) < 1e-5).all() for rows_LRD in bank.values())


def test_a_direction_that_lies_in_what_is_protected_is_refused():
    with pytest.raises(PromptError, match=r"difference_in_means@0 lie in what is protected \(same\): less than 20%"):
        cleaned(strengths=(1.0,), same=side(4 * BEHAVIOUR, 3 * KEPT, 2 * CODE, seed=9))


def test_where_nothing_is_left_at_one_layer_that_layer_is_not_edited():
    same = side(4 * BEHAVIOUR, 3 * KEPT, 2 * CODE, seed=9)
    other = side(4 * KEPT, seed=4)
    mixed = torch.cat([same[:, :, :2], other[:, :, 2:]], dim=2)
    bank, _ = cleaned(strengths=(1.0,), mixed=mixed)
    (rows,) = bank.values()
    assert not rows[:2].any() and (rows[2:].norm(dim=-1) > 0.99).all()


# ----- settings and prompts -----


def settings_with(folder: Path, protect: str, *more: str) -> Settings:
    for name in ("target", "baseline", "declined"):
        (folder / f"{name}.txt").write_text("\n".join(f"{name} question {i}" for i in range(12)))
    sides = [f"--{side}={folder / side}.txt" for side in ("target", "baseline")]
    return load([*sides, "--protect", protect, *more], environ={}, config=None).settings


def test_protected_sets_are_named_on_the_command_line_or_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    by_flag = settings_with(tmp_path, f"declined={tmp_path / 'declined.txt'}")
    (tmp_path / "config.toml").write_text(f'[prompts.protect.declined]\nsource = "{tmp_path / "declined.txt"}"\n')
    in_file = load(environ={}).settings
    assert by_flag.prompts.protect == in_file.prompts.protect and list(by_flag.prompts.protect) == ["declined"]
    again = Settings.model_validate_json(by_flag.model_dump_json())
    assert again == by_flag, "run.json has the same"


def test_protected_prompts_are_read_and_are_part_of_what_a_study_depends_on(tmp_path: Path):
    prompts = load_prompts(settings_with(tmp_path, f"declined={tmp_path / 'declined.txt'}"))
    assert [prompt.user for prompt in prompts.protect["declined"]] == [f"declined question {i}" for i in range(12)]
    without = load_prompts(settings_with(tmp_path, ""))
    assert without.protect == {} and without.fingerprint != prompts.fingerprint


def test_a_prompt_cannot_be_protected_and_be_a_target(tmp_path: Path):
    with pytest.raises(PromptError, match=r"prompts\.target\.train and prompts\.protect\.mine share"):
        load_prompts(settings_with(tmp_path, f"mine={tmp_path / 'target.txt'}"))
    baseline = f"mine={tmp_path / 'baseline.txt'},same={tmp_path / 'baseline.txt'}"
    assert len(load_prompts(settings_with(tmp_path, baseline)).protect) == 2, "baseline prompts may be"


def test_a_protected_set_that_is_written_wrong_is_one_line(tmp_path: Path):
    with pytest.raises(SettingsError, match="is not a list of key=value pairs"):
        settings_with(tmp_path, "declined.txt")
    with pytest.raises(SettingsError, match="less than or equal to 1"):
        settings_with(tmp_path, "", "--directions.protect-strengths", "2")


def test_the_report_has_a_row_per_set_and_direction_and_the_card_says_what_was_cleaned():
    geometry = {"protected": {"declined": {"difference_in_means@0": [0.9, 0.1, 0.3, 0.2]}}}
    assert protected_rows(geometry) == [("declined", "difference_in_means@0", "20.0 %", "30.0 %", point_name(2))]
    assert protected_rows({"points": []}) == [] and protected_rows(None) == []
    edit = {"direction_set": "difference_in_means@0|protect0.5", "direction_index": None}
    assert "the last prompt token, protected subspaces removed with strength 0.5;" in direction_phrase(edit)

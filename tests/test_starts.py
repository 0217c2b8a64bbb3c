"""Edits that are tried before any is sampled: what they are, and that they move no other trial."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch

from bruno_ray.ablation.closed_forms import apply_to_weight, directions_for, factors
from bruno_ray.ablation.edit import AblationParameters, Edit, StrengthTable
from bruno_ray.errors import StudyError
from bruno_ray.settings import SearchSettings
from bruno_ray.study.selection import load_trials
from bruno_ray.study.space import edit_from_params, search_space
from bruno_ray.study.starts import LITERATURE, Start, each_once, fitted, kept_starts, literature_edit, nearest_params
from bruno_ray.study.tables import front_lines
from tests.support.fakes import fake_scores
from tests.support.schedules import OBJECTIVES, SPACE, memory_folder, opened, params
from tests.test_schedule import Driver

__all__ = ["memory_folder"]

_, SETS, LAYERS, COMPONENTS = SPACE
LITERATURES = Start(literature_edit(SETS, LAYERS, COMPONENTS), LITERATURE)


def test_the_literatures_edit_leaves_nothing_along_one_direction_in_any_weight():
    """Arditi et al.: W - r r^T W with the same r in every layer and component."""
    edit = literature_edit(("subspace@0", "difference_in_means@0"), LAYERS, COMPONENTS)
    assert edit.direction_set == "difference_in_means@0" and edit.direction_index == 4.0  # 0.6 of the last layer, 7
    bank = {edit.direction_set: torch.nn.functional.normalize(torch.randn(LAYERS + 1, 1, 6), dim=-1)}
    r = bank[edit.direction_set][5, 0]  # the point after block 4
    for layer, rows in enumerate(directions_for(edit, bank)):
        assert torch.equal(rows[0], r)
        for component in COMPONENTS:
            weight = torch.randn(6, 9)
            found = factors([weight], rows, edit.strength(component, layer), edit.norm_mode)
            torch.testing.assert_close(apply_to_weight(weight, found), weight - torch.outer(r, r) @ weight)


@pytest.mark.parametrize("n_layers", [1, 2, 80])
def test_the_literatures_edit_fits_every_depth_and_is_a_point_of_the_default_space(n_layers: int):
    edit = literature_edit(SETS, n_layers, COMPONENTS)
    assert {edit.strength(c, layer) for c in COMPONENTS for layer in range(n_layers)} == {1.0}
    point = nearest_params(edit, search_space(SearchSettings(), SETS, n_layers, COMPONENTS))
    again = edit_from_params(point, SearchSettings(norm_mode="none"), SETS)
    assert (again.components, again.direction_index) == (edit.components, edit.direction_index)


def test_a_sampled_edit_is_its_own_nearest_point_and_one_outside_is_moved_to_the_edge(memory_folder: Path):
    driver = Driver(memory_folder, target=12)
    driver.run()
    space = search_space(*SPACE)
    for trial in load_trials(driver.leave()):
        assert (
            edit_from_params(nearest_params(Edit.from_dict(trial.edit), space), SPACE[0], SETS).to_dict() == trial.edit
        )
    outside = Edit({"mlp": AblationParameters(9.0, 99.0, 0.5, 2.0)}, "c", 3.0, "none")
    point = nearest_params(outside, space)
    assert (point["mlp.max_weight"], point["mlp.max_weight_position"], point["direction_set"]) == (1.5, 7.0, "a")
    assert point["attention.max_weight"] == 0.8  # the lowest there is, for a component that is not edited


def test_a_start_is_trial_0_and_every_other_startup_trial_keeps_its_parameters(memory_folder: Path):
    plain, given = Driver(memory_folder / "a", target=8), Driver(memory_folder / "b", target=8, starts=[LITERATURES])
    plain.run()
    given.run()
    before, study = params(plain.leave()), given.leave()
    assert params(study)[1:] == before[1:] and params(study)[0] != before[0]
    first, second, *_ = load_trials(study)
    assert first.edit == LITERATURES.edit.to_dict() and first.origin == LITERATURE and not second.origin
    assert first.values == fake_scores(LITERATURES.edit)
    assert LITERATURE in front_lines([first, second], OBJECTIVES)[1]


@pytest.mark.parametrize("batches", [0, 4])
def test_killed_and_resumed_with_other_starts_in_the_settings_is_the_same_study(batches: int, memory_folder: Path):
    starts = [LITERATURES, Start(Edit({"mlp": AblationParameters(1.0, 2.0, 0.5, 2.0)}, "b", 3.0, "full"), "RUN:7")]
    whole = Driver(memory_folder / "whole", starts=starts)
    whole.run()
    expected = whole.leave()
    driver = Driver(memory_folder / "cut", starts=starts)
    driver.run(batches)
    driver.leave()
    again = Driver(memory_folder / "cut", starts=[])
    again.run()
    study = again.leave()
    assert params(study) == params(expected)
    assert [trial.origin for trial in load_trials(study)] == [LITERATURE, "RUN:7"] + [""] * 28


def test_killed_at_any_write_the_start_stays_trial_0(memory_folder: Path):
    driver = Driver(memory_folder / "whole", target=12, starts=[LITERATURES])
    driver.run()
    expected = params(driver.leave())
    lines = (memory_folder / "whole" / "study.journal").read_bytes().splitlines(keepends=True)
    for cut in range(4, 40, 5):
        folder = memory_folder / str(cut)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(lines[:cut]))
        again = Driver(folder, target=12, starts=[LITERATURES])
        again.run()
        study = again.leave()
        assert params(study) == expected, f"cut at record {cut}"
        assert load_trials(study)[0].edit == LITERATURES.edit.to_dict()


def test_a_study_of_an_older_version_gets_no_start(memory_folder: Path):
    with opened(memory_folder) as study:
        study.ask()
    with opened(memory_folder) as study:
        assert kept_starts(study, [LITERATURES]) == []


def test_an_edit_that_is_given_twice_is_tried_once():
    again = Start(LITERATURES.edit, "RUN:0")
    other = Start(Edit({}, "a", None, "none"), "RUN:1")
    assert each_once([LITERATURES, again, other]) == [LITERATURES, other]


def test_a_trained_edit_is_no_start():
    trained = Start(Edit({"mlp": StrengthTable((0.5, 1.0))}, "learned:1", None, "none"), "RUN:7")
    with pytest.raises(StudyError, match="RUN:7 was trained"):
        kept_starts(optuna.create_study(directions=["minimize"]), [trained])


def test_experts_of_a_model_of_other_depth_are_not_taken_over() -> None:
    parts = {"mlp": ((0,), (1,), None)}
    start = Start(replace(literature_edit(("x",), 3, ("mlp",)), parts=parts), "mine", n_layers=3)
    assert fitted(start, ("x",), 3, ("mlp",)).edit.parts == parts
    assert fitted(start, ("x",), 6, ("mlp",)).edit.parts == {}

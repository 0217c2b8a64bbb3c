"""Several seeds: what is run, what is gone on with, and that their spread is what they have come to."""

from pathlib import Path

import pytest

from bruno_ray.cli.main import main
from bruno_ray.errors import SettingsError
from bruno_ray.pipeline.repeating import Repeat, lowest, repeat, spread_table, state_of
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord, ScoresRecord, SelectedRecord
from bruno_ray.settings import ScoringSettings, SelectionSettings, Settings
from bruno_ray.study.selection import TrialRecord


def trial(rate: float, kl: float) -> TrialRecord:
    return TrialRecord(0, "COMPLETE", None, {"behaviour_rate": rate, "kl_divergence": kl, "incoherence": 0.5})


def selected(rate: float, kl: float) -> ScoresRecord:
    return ScoresRecord(values={"behaviour_rate": rate, "kl_divergence": kl})


REPEATS = [
    Repeat("a-seed3", 3, (trial(0.0, 0.04), trial(0.25, 0.02), trial(0.75, 0.001)), selected(0.02, 0.04)),
    Repeat("a-seed4", 4, (trial(0.125, 0.09), trial(0.5, 0.015)), selected(0.06, 0.08)),
    Repeat("a-seed5", 5, (trial(0.0, 0.2),), None),
]


def rows(settings: Settings) -> list[list[str]]:
    table = spread_table(REPEATS, settings)
    return [list(column.cells) for column in table.columns]


def test_the_spread_is_of_the_fronts_at_three_kl_and_of_what_was_selected():
    seeds, quarter, half, whole, rate, kl = rows(Settings(selection=SelectionSettings(max_kl=0.1)))
    assert seeds == ["3", "4", "5", "median", "lowest", "highest"]
    assert quarter == ["0.25", "0.5", "-", "0.375", "0.25", "0.5"]
    assert half == ["0", "0.5", "-", "0.25", "0", "0.5"]
    assert whole == ["0", "0.125", "-", "0.0625", "0", "0.125"]
    assert rate == ["0.02", "0.06", "-", "0.04", "0.02", "0.06"] and kl == ["0.04", "0.08", "-", "0.06", "0.04", "0.08"]


def test_with_other_objectives_it_is_of_the_lowest_of_each():
    scoring = ScoringSettings(objectives=("incoherence", "kl_divergence"))
    _, incoherence, kl, *_ = rows(Settings(scoring=scoring))
    assert incoherence[:3] == ["0.5"] * 3 and kl[:3] == ["0.001", "0.015", "0.2"]
    assert lowest((), "behaviour_rate", 1.0) is None


def test_nobody_is_asked_to_pick(tmp_path: Path):
    with pytest.raises(SettingsError, match="add --auto-select"):
        repeat(Settings(), 2)


@pytest.mark.parametrize(("chosen", "state"), [(None, "begun"), (selected(0.1, 0.1), "finished")])
def test_a_run_that_is_there_is_gone_on_with_or_left(chosen: ScoresRecord | None, state: str, tmp_path: Path):
    assert state_of(tmp_path / "mine-seed7") == "new"
    picked = None if chosen is None else SelectedRecord(number=0, edit={}, validation=chosen)
    RunDirectory.create(tmp_path / "mine-seed7", RunRecord(settings=Settings(), selected=picked))
    assert state_of(tmp_path / "mine-seed7") == state


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_seeds_of_the_organism_are_two_runs_and_given_again_nothing_is_run(
    organism: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    options = ["--trials", "6", "--study.n-startup-trials", "4", "--prompts.n-test", "12", "--output", str(tmp_path)]
    options += ["--ray.object-store-memory", "100000000"]
    command = ["run", str(organism / "model"), "--behaviour", "organism", "--auto-select", "--repeats", "2", *options]
    for _ in range(2):
        assert main([*command, "--study-name", "mine", "--seed", "4"]) == 0
        printed = capfd.readouterr().out
        assert "2 seeds" in printed and str(tmp_path / "mine-seed5") in printed.replace("\n", "")
    runs = [RunDirectory.open(tmp_path / f"mine-seed{seed}").read() for seed in (4, 5)]
    assert [record.settings.study.seed for record in runs] == [4, 5]
    assert all(record.selected and record.n_trials == {"COMPLETE": 6} for record in runs)

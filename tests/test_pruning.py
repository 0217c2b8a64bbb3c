"""Pruning is exact: what is left half-way would be on no front, in every schedule and in a study that was killed."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import StudyError
from bruno_ray.scoring.racing import BLOCKS, is_dominated
from bruno_ray.settings import ScoringSettings, Settings, StudySettings
from bruno_ray.study.pruning import can_prune, rivals
from bruno_ray.study.selection import TrialRecord, auto_select, find_trial, load_trials, pareto_front
from bruno_ray.workers.messages import EditOutcome, Scored
from tests.support.fakes import fake_scores
from tests.support.schedules import OBJECTIVES, memory_folder, params
from tests.test_schedule import Driver

__all__ = ["memory_folder"]

N_PROMPTS = 100


def raced(edit: Edit, given: Sequence[tuple[float, float]]) -> EditOutcome:
    """What a worker makes of an edit whose full scores are known: blocks of prompts until a rival dominates it."""
    full = fake_scores(edit)
    shown = [p * 37 % N_PROMPTS < round(full["behaviour_rate"] * N_PROMPTS) for p in range(N_PROMPTS)]
    marked = asked = 0
    for first in range(BLOCKS):
        if is_dominated(marked / N_PROMPTS, full["kl_divergence"], given):
            values = {**full, "behaviour_rate": marked / max(1, asked)}
            return EditOutcome(values, {"behaviour_rate": (marked, asked)}, pruned=True)
        block = shown[first::BLOCKS]
        marked, asked = marked + sum(block), asked + len(block)
    return EditOutcome(full, {"behaviour_rate": (marked, asked)})


class Racing(Driver):
    """A driver whose worker leaves dominated edits half-way."""

    def __init__(self, folder: Path, **options: object):
        self.rivals: dict[int, tuple] = {}
        super().__init__(folder, prune=True, **options)

    def fill(self) -> None:
        while due := self.schedule.take_due():
            self.rivals |= {batch.batch_id: batch.rivals for batch in due}
            self.flying += [(batch.batch_id, [batch.edits[number] for number in batch.missing]) for batch in due]

    def finish(self, index: int = 0) -> None:
        batch_id, edits = self.flying.pop(index)
        self.schedule.bring(batch_id, Scored("worker 0", tuple(raced(edit, self.rivals[batch_id]) for edit in edits)))


def finished(folder: Path, order: Callable[[int], int] = lambda flying: 0, **options: object) -> list[TrialRecord]:
    driver = Racing(folder, **options)
    driver.run(order=order)
    return load_trials(driver.leave())


def points(trials: Sequence[TrialRecord]) -> list[tuple[float, ...]]:
    return [tuple(trial.values[name] for name in OBJECTIVES) for trial in pareto_front(trials, OBJECTIVES)]


@pytest.mark.parametrize(
    "schedule",
    [
        {"window": 1, "batch_size": 1},
        {"window": 2, "batch_size": 8},
        {"window": 4, "workers": 4, "batch_size": 4},
        {"window": 12, "workers": 8, "batch_size": 2},
    ],
    ids=str,
)
def test_the_front_is_that_of_the_whole_evaluations_in_every_schedule(schedule: dict, memory_folder: Path):
    """Startup points alone, so that every schedule has the same trials; batches come back in any order."""
    source = random.Random(1)
    trials = finished(
        memory_folder, lambda flying: source.randrange(flying), target=48, n_startup_trials=48, **schedule
    )
    pruned = [trial for trial in trials if trial.state == "PRUNED"]
    assert len(trials) == 48 and len(pruned) >= 5, "pruned trials count"
    whole = [
        TrialRecord(trial.number, "COMPLETE", trial.edit, fake_scores(Edit.from_dict(trial.edit))) for trial in trials
    ]
    assert points(trials) == points(whole)


def test_what_is_pruned_does_not_depend_on_which_batch_comes_back_first(memory_folder: Path):
    states = []
    for name, order in (("first", lambda flying: 0), ("last", lambda flying: flying - 1)):
        trials = finished(memory_folder / name, order, window=2, workers=1, target=40)
        states.append([(trial.state, trial.params) for trial in trials])
    assert states[0] == states[1] and any(state == "PRUNED" for state, _ in states[0])


def test_killed_at_any_write_and_resumed_the_same_trials_are_pruned(memory_folder: Path):
    options = {"target": 40, "n_startup_trials": 28}
    driver = Racing(memory_folder / "whole", **options)
    driver.run()
    study = driver.leave()
    expected = params(study), [trial.state for trial in load_trials(study)]
    assert expected[1].count("PRUNED") >= 3
    lines = (memory_folder / "whole" / "study.journal").read_bytes().splitlines(keepends=True)
    for cut in range(60, len(lines), 97):
        folder = memory_folder / str(cut)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
        again = Racing(folder, **options)
        again.run()
        study = again.leave()
        assert (params(study), [trial.state for trial in load_trials(study)]) == expected, f"cut at record {cut}"


def test_a_pruned_trial_cannot_be_selected(memory_folder: Path):
    trials = finished(memory_folder)
    pruned = next(trial for trial in trials if trial.state == "PRUNED")
    assert not pruned.values and pruned not in pareto_front(trials, OBJECTIVES)
    assert auto_select(trials, max_kl=9.0).trial.state == "COMPLETE"
    with pytest.raises(StudyError, match=f"trial {pruned.number} is PRUNED, not COMPLETE: pick one from the front"):
        find_trial(trials, pruned.number)


def test_rivals_are_the_told_trials_that_no_other_dominates_counting_answers_that_are_none():
    def trial(number: int, rate: float, kl: float, evasion: float, state: str = "COMPLETE") -> TrialRecord:
        values = {"behaviour_rate": rate, "kl_divergence": kl, "evasion_rate": evasion}
        return TrialRecord(number, state, None, values if state == "COMPLETE" else {})

    told = [
        trial(0, 0.5, 0.01, 0.5),
        trial(1, 0.1, 0.05, 0.2),
        trial(2, 0.0, 0.04, 0.6),  # gibberish: no markers, but no answers either
        trial(3, 0.1, 0.30, 0.1),
        trial(4, 0.0, 0.02, 0.0, "PRUNED"),
    ]
    assert rivals(told) == ((0.1, 0.30), (0.2, 0.05), (0.5, 0.01))


def test_an_edit_is_dominated_only_by_what_is_certainly_better():
    given = [(0.2, 0.05)]
    assert is_dominated(0.2, 0.06, given) and is_dominated(0.3, 0.05, given)
    assert not is_dominated(0.2, 0.05, given), "as good, and both stay on the front"
    assert not is_dominated(0.19, 0.5, given) and not is_dominated(1.0, 0.04, given)
    assert not is_dominated(1.0, float("nan"), given)


def test_only_studies_of_rate_and_kl_prune():
    def of(*objectives: str, prune: bool = True) -> bool:
        return can_prune(Settings(scoring=ScoringSettings(objectives=objectives), study=StudySettings(prune=prune)))

    assert of("behaviour_rate", "kl_divergence") and of("kl_divergence", "behaviour_rate")
    assert not of("behaviour_rate", "kl_divergence", "incoherence") and not of("evasion_rate", "kl_divergence")
    assert not of("behaviour_rate", "kl_divergence", prune=False)

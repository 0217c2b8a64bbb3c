"""Kill and resume, driven by hand: n trials COMPLETE exactly once, the same ones as without the interruption."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from bruno_ray.ablation.edit import AblationParameters, Edit
from bruno_ray.errors import StudyError, WorkerError
from bruno_ray.study.schedule import BATCHES_PER_SWAP
from bruno_ray.study.selection import load_trials, pareto_front
from bruno_ray.study.space import suggest
from bruno_ray.study.storage import load_study
from bruno_ray.study.trial_result import TrialResult
from bruno_ray.workers.messages import EditOutcome, Failed, Lost, NoWorkers, Scored
from tests.support.fakes import fake_scores
from tests.support.schedules import OBJECTIVES, SPACE, in_memory, make_schedule, memory_folder, opened, params

__all__ = ["memory_folder"]


class Driver:
    """What the searcher and the pool do with a schedule, one step at a time; dropping it is a kill."""

    def __init__(self, folder: Path, url: str | None = None, **options: Any):
        self._opened = opened(folder, url)
        self.schedule = make_schedule(self._opened.__enter__(), **options)
        self.taken: list[int] = []
        """Batches per swap."""

        self.flying: list[tuple[int, list[Edit]]] = []
        self.evaluated: list[Edit] = []

    def fill(self) -> None:
        while due := self.schedule.take_due():
            self.taken.append(len(due))
            self.flying += [(batch.batch_id, [batch.edits[number] for number in batch.missing]) for batch in due]

    def finish(self, index: int = 0) -> None:
        batch_id, edits = self.flying.pop(index)
        self.evaluated += edits
        self.schedule.bring(batch_id, scored(edits))

    def run(self, batches: int = 1000, order: Callable[[int], int] = lambda flying: 0) -> None:
        self.fill()
        while self.flying and batches:
            self.finish(order(len(self.flying)))
            self.fill()
            batches -= 1

    def leave(self) -> optuna.Study:
        self._opened.__exit__(None, None, None)
        return self.schedule.study.study


def scored(edits: list[Edit]) -> Scored:
    return Scored("worker 0", tuple(EditOutcome(fake_scores(edit)) for edit in edits))


@pytest.fixture(scope="module")
def uninterrupted() -> list[dict]:
    with in_memory() as folder:
        driver = Driver(folder)
        driver.run()
        study = driver.leave()
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30
        return params(study)


@pytest.mark.parametrize("batches", [0, 1, 3, 6])
def test_killed_between_batches_and_resumed_is_the_same_study(
    batches: int, uninterrupted: list[dict], memory_folder: Path
) -> None:
    driver = Driver(memory_folder)
    driver.run(batches)
    driver.leave()  # with trials RUNNING, as after a kill
    again = Driver(memory_folder)
    assert {trial.state for trial in again.schedule.study.study.trials} & {TrialState.RUNNING}
    again.run()
    study = again.leave()
    assert params(study) == uninterrupted
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30


def test_killed_at_every_write_and_resumed_is_the_same_study(uninterrupted: list[dict], memory_folder: Path) -> None:
    """Every prefix of the journal is a possible kill; each must lead to the same trials."""
    driver = Driver(memory_folder / "whole")
    driver.run()
    driver.leave()
    lines = (memory_folder / "whole" / "study.journal").read_bytes().splitlines(keepends=True)
    for i, cut in enumerate(range(9, len(lines), 37)):
        folder = memory_folder / str(i)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
        again = Driver(folder)
        again.run()
        study = again.leave()
        assert params(study) == uninterrupted, f"cut at record {cut}"
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30


def test_whatever_a_power_loss_takes_the_rest_is_read_and_gone_on_with(memory_folder: Path) -> None:
    """One line, several, or any stretch of the journal reads as NUL bytes; what is refused says so in one line."""
    driver = Driver(memory_folder / "whole", target=16)
    driver.run()
    driver.leave()
    whole = (memory_folder / "whole" / "study.journal").read_bytes()
    first = whole.index(b"batch")  # before it the study is made
    source = random.Random(4)
    for i in range(25):
        start = source.randrange(first, len(whole))
        end = min(len(whole) - 1, start + source.choice((1, 200, 4096)))
        damaged = whole[:start] + bytes(end - start) + whole[end:]
        folder = memory_folder / str(i)
        folder.mkdir()
        (folder / "study.journal").write_bytes(damaged)
        complete = [trial for trial in load_trials(load_study(None, folder, "test")) if trial.state == "COMPLETE"]
        assert all(trial.edit and trial.values for trial in complete)
        assert len(complete) >= 3
        again = Driver(folder, target=16)
        again.run()
        again.leave()
        trials = load_trials(load_study(None, folder, "test"))
        states = [trial.state for trial in trials]
        assert states.count("COMPLETE") == 16 and "RUNNING" not in states
        assert pareto_front(trials, OBJECTIVES)


def test_batches_that_come_back_in_another_order_change_nothing(memory_folder: Path) -> None:
    studies = []
    orders: dict[str, Iterator[int]] = {"first": itertools.repeat(0), "swapped": itertools.cycle((1, 0))}
    for name, turns in orders.items():
        driver = Driver(memory_folder / name, window=4, workers=2, target=40)
        driver.run(order=lambda flying, turns=turns: min(next(turns), flying - 1))
        studies.append(params(driver.leave()))
    assert studies[0] == studies[1]


def test_a_stuck_batch_does_not_stop_the_others(memory_folder: Path) -> None:
    """The order is given up when a worker would stand idle."""
    driver = Driver(memory_folder, window=4, workers=2, target=40)
    driver.fill()
    for _ in range(6):
        driver.finish(index=1)  # batch 0 never comes back
        driver.fill()
    assert driver.schedule.complete >= 16


def test_no_more_than_a_window_is_out_and_running_counts_its_trials(memory_folder: Path) -> None:
    driver = Driver(memory_folder, window=12, workers=8, target=80)
    driver.fill()
    assert len(driver.flying) == 12 and driver.schedule.running == 48
    driver.finish()
    assert driver.schedule.running == 44
    driver.run(order=lambda flying: flying // 2)
    assert driver.schedule.running == 0 and driver.schedule.finished
    study = driver.leave()
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 80


def test_results_that_come_together_are_made_up_for_a_few_batches_at_a_time(memory_folder: Path) -> None:
    driver = Driver(memory_folder, window=12, workers=8, target=160)
    driver.fill()
    assert driver.taken == [12], "the whole window at the start"
    while driver.flying:
        driver.finish()
    driver.taken.clear()
    driver.fill()
    assert driver.taken == [BATCHES_PER_SWAP] * 3


def test_what_a_lost_lane_took_goes_out_again_and_what_comes_twice_counts_once(
    uninterrupted: list[dict], memory_folder: Path
) -> None:
    driver = Driver(memory_folder)
    due = driver.schedule.take_due()
    driver.schedule.put_back(due)
    driver.fill()
    assert [batch_id for batch_id, _ in driver.flying] == [batch.batch_id for batch in due]
    batch_id, edits = driver.flying[0]
    driver.finish()
    driver.schedule.bring(batch_id, scored(edits))
    driver.run()
    study = driver.leave()
    assert params(study) == uninterrupted
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30


def test_a_result_counts_that_comes_before_its_batch_has_gone_out_again(
    uninterrupted: list[dict], memory_folder: Path
) -> None:
    """The lane that took the batch is lost, the pool has it, and the next lane brings it before it has any to take."""
    driver = Driver(memory_folder)
    due = driver.schedule.take_due()
    driver.schedule.put_back(due)
    driver.schedule.bring(due[0].batch_id, scored([due[0].edits[number] for number in due[0].missing]))
    driver.run()
    assert params(driver.leave()) == uninterrupted


def test_a_search_that_is_given_up_waits_for_nothing_and_its_trials_for_the_next_run(
    uninterrupted: list[dict], memory_folder: Path
) -> None:
    driver = Driver(memory_folder)
    driver.run(2)
    driver.schedule.give_up(WorkerError("the lanes die"))
    assert driver.schedule.take_due() == [] and not driver.schedule.anything_out
    driver.leave()
    again = Driver(memory_folder)
    again.run()
    assert params(again.leave()) == uninterrupted


def test_without_workers_the_search_ends_and_its_trials_wait_for_the_next_run(
    uninterrupted: list[dict], memory_folder: Path
) -> None:
    driver = Driver(memory_folder)
    driver.run(2)
    while driver.flying:
        driver.schedule.bring(driver.flying.pop()[0], NoWorkers("none is left"))
    assert driver.schedule.take_due() == [] and not driver.schedule.anything_out
    assert isinstance(driver.schedule.failure, WorkerError)
    driver.leave()
    again = Driver(memory_folder)
    again.run()
    assert params(again.leave()) == uninterrupted


def test_outcomes_that_are_lost_with_a_machine_are_made_again_once(memory_folder: Path) -> None:
    driver = Driver(memory_folder, target=8)
    driver.fill()
    (first, _), *_ = driver.flying
    driver.schedule.bring(first, Lost("its node is dead"))
    driver.flying.pop(0)
    driver.fill()
    second, _ = driver.flying[-1]
    assert second not in (first, driver.flying[0][0]), "under a new id, or the pool would not evaluate it"
    driver.schedule.bring(second, Lost("its node is dead"))
    driver.flying.pop()
    driver.run()
    study = driver.leave()
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.FAIL) == 4 and states.count(TrialState.COMPLETE) == 8


def test_batches_that_fail_are_replaced_until_there_are_too_many(
    memory_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver = Driver(memory_folder, target=8)
    while driver.schedule.failure is None:
        driver.fill()
        batch_id, _ = driver.flying.pop(0)
        driver.schedule.bring(batch_id, Failed("ZeroDivisionError: a defect", "Traceback ... ZeroDivisionError"))
        driver.fill()
    assert isinstance(driver.schedule.failure, StudyError)
    assert driver.schedule.failed == 12, "more than ten"
    assert sum("Traceback" in record.getMessage() for record in caplog.records) == 1, "the same defect is told once"


def test_a_database_study_cut_off_while_sampling_keeps_its_numbers(memory_folder: Path) -> None:
    """No batched writes here: a trial may have half of its parameters, or none."""
    url = f"sqlite:///{memory_folder}/study.db"
    whole = Driver(memory_folder / "a", f"sqlite:///{memory_folder}/whole.db", target=12)
    whole.run()
    expected = params(whole.leave())

    driver = Driver(memory_folder / "b", url, target=12)
    driver.run(1)
    study = driver.leave()
    last = study.ask()  # the driver died sampling batch 3
    last.set_user_attr("batch", [3, 4])
    last.suggest_categorical("direction_scope", ("global", "per_layer"))
    again = Driver(memory_folder / "b", url, target=12)
    again.run()
    study = again.leave()
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == len(study.trials) == 16  # the batch that had been begun is finished
    assert params(study)[:8] == expected[:8]
    assert len({tuple(trial.params.values()) for trial in complete}) == 16


# ----- what an older version has written -----


def test_results_of_older_versions_are_read_as_they_are() -> None:
    """Both forms as they stand in journals that were written before results had a type."""
    scores = {
        "values": {"behaviour_rate": 0.03, "kl_divergence": 0.02},
        "counts": {"behaviour_rate": [3, 100]},
        "samples": [["how?", "so"]],
        "seconds": 0.5,
        "worker": "worker 0",
    }
    result = TrialResult.from_json(scores)
    assert result.counts == {"behaviour_rate": (3, 100)} and result.samples == (("how?", "so"),)
    for stored in (scores, {"error": "kl_divergence is nan", "seconds": 0.5, "worker": "worker 1"}):
        assert TrialResult.from_json(stored).to_json() == stored
        assert json.loads(json.dumps(TrialResult.from_json(stored).to_json())) == stored


# ----- trials that repeat others -----


def few(trial: optuna.Trial) -> Edit:
    """One of ten edits. Where the MLP is left alone, how is said in different ways."""
    sampled = suggest(trial, *SPACE)
    kernel = AblationParameters(1.0, 3.0, 0.5, 2.0)
    nothing = AblationParameters(-1.0, float(trial.number), 0.5, 2.0)
    mlp = kernel if sampled.components["mlp"].max_weight >= 0.5 else nothing
    return Edit({"attention": kernel, "mlp": mlp}, "a", float(round(trial.params["direction_index"])), "full")


def values(study: optuna.Study) -> list[list[float] | None]:
    return [trial.values for trial in study.get_trials(deepcopy=False)]


@pytest.fixture(scope="module")
def with_repeats() -> tuple[list[dict], list[list[float] | None], int]:
    with in_memory() as folder:
        driver = Driver(folder, suggested=few)
        driver.run()
        study = driver.leave()
        identities = [edit.identity for edit in driver.evaluated]
        assert len(set(identities)) == len(identities) < 20
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30
        for trial in load_trials(study):
            assert trial.edit is not None
            assert {name: trial.values[name] for name in OBJECTIVES} == fake_scores(Edit.from_dict(trial.edit))
        return params(study), values(study), len(identities)


@pytest.mark.parametrize("batches", [0, 1, 2, 4])
def test_an_edit_is_evaluated_once_also_when_killed_and_resumed(
    batches: int, with_repeats: tuple[list[dict], list[list[float] | None], int], memory_folder: Path
) -> None:
    driver = Driver(memory_folder, suggested=few)
    driver.run(batches)
    driver.leave()
    again = Driver(memory_folder, suggested=few)
    again.run()
    study = again.leave()
    assert (params(study), values(study)) == with_repeats[:2]
    assert len(driver.evaluated) + len(again.evaluated) == with_repeats[2]


def test_repeats_wait_for_batches_that_come_back_later(memory_folder: Path) -> None:
    """The newest batch comes back first, time and again, beside three workers."""
    options = {"window": 6, "workers": 3, "batch_size": 2, "n_startup_trials": 30, "suggested": few}
    driver = Driver(memory_folder, **options)
    driver.run(order=lambda flying: flying - 1)
    identities = [edit.identity for edit in driver.evaluated]
    assert len(set(identities)) == len(identities)
    assert driver.schedule.running == 0
    study = driver.leave()
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30
    with in_memory() as folder:
        in_order = Driver(folder, **options)
        in_order.run()
        assert values(in_order.leave()) == values(study)


def test_what_repeats_a_failed_trial_is_evaluated_after_all(memory_folder: Path) -> None:
    """Its worker may have been to blame."""
    driver = Driver(memory_folder, suggested=lambda trial: Edit({}, "a", None, "none"), target=5, batch_size=2)
    driver.fill()
    ((batch_id, edits),) = driver.flying
    assert len(edits) == 1
    driver.flying.clear()
    driver.schedule.bring(batch_id, Failed("no", None))
    driver.run()
    assert len(driver.evaluated) == 1
    states = [trial.state for trial in driver.leave().trials]
    assert states == [TrialState.FAIL] + [TrialState.COMPLETE] * 5

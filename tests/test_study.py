"""Studies on a real local Ray cluster; only the workers' arithmetic is fake."""

import os
from contextlib import suppress

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from bruno_ray.errors import StudyError, WorkerError
from bruno_ray.study.run import run_study
from bruno_ray.study.selection import load_trials, pareto_front
from bruno_ray.study.space import edit_from_params
from bruno_ray.study.starts import literature_edit
from bruno_ray.study.storage import load_study
from bruno_ray.workers.pool import WorkerPool
from tests.support.fakes import FakeInfo, FakeWorker, fake_scores
from tests.support.study_driver import CONTEXT, settings

pytest_plugins = ["tests.support.local_ray"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]

OBJECTIVES = ("behaviour_rate", "kl_divergence")
FINGERPRINT = {"model": {"id": "A", "fingerprint": "1"}, "prompts": "p"}


@pytest.fixture(scope="module")
def pool(local_ray):
    with WorkerPool(FakeWorker, (), settings().ray) as pool:
        pool.wait_ready()
        yield pool


def run(pool, folder, fingerprint=FINGERPRINT, **study) -> optuna.Study:
    return run_study(settings(**study), pool, CONTEXT, FakeInfo(), folder, fingerprint)


def test_every_trial_has_both_objectives_and_says_what_it_was(pool, tmp_path):
    study = run(pool, tmp_path, n_trials=10, batch=4, startup=4)
    trials = load_trials(study)
    assert [trial.state for trial in trials] == ["COMPLETE"] * 10
    assert len({tuple(trial.params.values()) for trial in trials}) == 10
    for stored, trial in zip(study.trials, trials):
        edit = edit_from_params(trial.params, settings().search, tuple(CONTEXT.bank))
        if trial.number == 0:  # it is not sampled
            edit = literature_edit(tuple(CONTEXT.bank), FakeInfo.n_layers, FakeInfo.components)
        assert trial.edit == edit.to_dict()
        assert trial.values == fake_scores(edit)
        assert stored.values == [trial.values[name] for name in OBJECTIVES]
        assert trial.counts == {"behaviour_rate": (1, 100)} and trial.worker == "worker 0"
    assert sorted(t.number for t in pareto_front(trials, OBJECTIVES)) == sorted(t.number for t in study.best_trials)
    assert study.user_attrs["driver"] is None


def test_more_trials_go_on_where_the_study_stopped(pool, tmp_path):
    first = [trial.params for trial in run(pool, tmp_path, n_trials=5).trials]
    more = run(pool, tmp_path, n_trials=9)
    assert len(more.trials) == 9
    assert [t.params for t in more.trials[:5]] == first
    assert len(run(pool, tmp_path, n_trials=9).trials) == 9  # nothing left to do


def test_a_trial_that_is_not_a_number_fails_alone_and_is_replaced(tmp_path):
    with WorkerPool(FakeWorker, (str(tmp_path), 0.0, 0, 2), settings().ray) as pool:
        study = run(pool, tmp_path / "run", n_trials=12)
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.COMPLETE) == 12 and states.count(TrialState.FAIL) == 1
    (failed,) = [trial for trial in load_trials(study) if trial.state == "FAIL"]
    assert failed.number == 4 and "kl_divergence is nan" in failed.error


def test_a_worker_that_dies_in_a_batch_costs_no_trial(tmp_path):
    with WorkerPool(FakeWorker, (str(tmp_path), 0.1, 2), settings(workers=2).ray) as pool:
        study = run(pool, tmp_path / "run", n_trials=16, workers=2)
    assert (tmp_path / "deaths").stat().st_size == 1
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 16
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 16


def test_a_batch_that_kills_two_workers_fails_and_is_replaced(tmp_path):
    with WorkerPool(FakeWorker, (str(tmp_path), 0.0, 2, 0, 2), settings(workers=2).ray) as pool:
        study = run(pool, tmp_path / "run", n_trials=12, workers=2)
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.COMPLETE) == 12 and states.count(TrialState.FAIL) == 4
    assert all("it lost worker" in trial.error for trial in load_trials(study) if trial.state == "FAIL")


def test_a_lane_that_is_killed_costs_no_trial_and_no_evaluation(tmp_path):
    with WorkerPool(LaneKiller, (str(tmp_path), 0.2), settings().ray) as pool:
        study = run(pool, tmp_path / "run", n_trials=24)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 24
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 24
    assert (tmp_path / "batches").stat().st_size == 6
    assert (tmp_path / "killed").stat().st_size == 1


def test_a_study_whose_trials_all_fail_ends_with_the_reason(tmp_path):
    with WorkerPool(AlwaysNaN, (), settings().ray) as pool:
        with pytest.raises(StudyError, match=r"\d+ trials failed.*kl_divergence is nan"):
            run(pool, tmp_path, n_trials=20)
    assert {t.state for t in load_study(None, tmp_path, "test").trials} == {TrialState.FAIL}


def test_when_no_worker_is_left_trials_wait_for_the_next_run(pool, tmp_path):
    with WorkerPool(Suicidal, (), settings().ray) as lost:
        with pytest.raises(WorkerError, match="no worker is left"):
            run(lost, tmp_path, n_trials=12)
    assert TrialState.RUNNING in {trial.state for trial in load_study(None, tmp_path, "test").trials}
    states = [trial.state for trial in run(pool, tmp_path, n_trials=12).trials]
    assert states.count(TrialState.COMPLETE) == 12 and states.count(TrialState.RUNNING) == 0


class AlwaysNaN(FakeWorker):
    def evaluate(self, context, edits, rivals=()):
        outcomes = super().evaluate(context, edits)
        for outcome in outcomes:
            outcome.scores.values["kl_divergence"] = float("nan")
        return outcomes


class LaneKiller(FakeWorker):
    """Kills the lane during the third batch."""

    def evaluate(self, context, edits, rivals=()):
        if self._count("batches", only_read=True) == 2:
            for process in psutil.Process().parent().children():
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    title = " ".join(process.cmdline()[:1])
                    if "Trainable" in title or "BatchLane" in title:  # under way, or not
                        process.kill()
                        self._count("killed")
        return super().evaluate(context, edits)


class Suicidal(FakeWorker):
    def evaluate(self, context, edits, rivals=()):
        os._exit(1)

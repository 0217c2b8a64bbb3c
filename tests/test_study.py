"""Studies on a real local Ray cluster; only the workers' arithmetic is fake."""

import multiprocessing
import os
import socket
from contextlib import suppress

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from bruno_ray.errors import StudyError, WorkerError
from bruno_ray.study.run import run_study
from bruno_ray.study.selection import load_trials, pareto_front
from bruno_ray.study.space import edit_from_params
from bruno_ray.study.storage import load_study, open_study
from bruno_ray.workers.pool import WorkerPool
from bruno_ray.workers.session import ray_session
from tests.support.fakes import FakeInfo, FakeWorker, fake_scores
from tests.support.study_driver import CONTEXT, settings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

OBJECTIVES = ("behaviour_rate", "kl_divergence")
FINGERPRINT = {"model": {"id": "A", "fingerprint": "1"}, "prompts": "p"}


@pytest.fixture(scope="module")
def session():
    with ray_session(settings(workers=2).ray):
        yield


@pytest.fixture(scope="module")
def pool(session):
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


def test_a_trial_that_is_not_a_number_fails_alone_and_is_replaced(session, tmp_path):
    with WorkerPool(FakeWorker, (str(tmp_path), 0.0, 0, 2), settings().ray) as pool:
        study = run(pool, tmp_path / "run", n_trials=12)
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.COMPLETE) == 12 and states.count(TrialState.FAIL) == 1
    (failed,) = [trial for trial in load_trials(study) if trial.state == "FAIL"]
    assert failed.number == 4 and "kl_divergence is nan" in failed.error


def test_a_worker_that_dies_in_a_batch_costs_no_trial(session, tmp_path):
    with WorkerPool(FakeWorker, (str(tmp_path), 0.1, 2), settings(workers=2).ray) as pool:
        study = run(pool, tmp_path / "run", n_trials=16, workers=2)
    assert (tmp_path / "deaths").stat().st_size == 1
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 16
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 16


def test_a_batch_that_kills_two_workers_fails_and_is_replaced(session, tmp_path):
    with WorkerPool(FakeWorker, (str(tmp_path), 0.0, 2, 0, 2), settings(workers=2).ray) as pool:
        study = run(pool, tmp_path / "run", n_trials=12, workers=2)
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.COMPLETE) == 12 and states.count(TrialState.FAIL) == 4
    assert all("it lost worker" in trial.error for trial in load_trials(study) if trial.state == "FAIL")


def test_lanes_that_are_killed_cost_no_trial_and_no_evaluation(session, tmp_path):
    with WorkerPool(LaneKiller, (str(tmp_path), 0.2), settings().ray) as pool:
        study = run(pool, tmp_path / "run", n_trials=24)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 24
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 24
    assert (tmp_path / "batches").stat().st_size == 6
    assert (tmp_path / "killed").stat().st_size == 2


def test_a_study_whose_trials_all_fail_ends_with_the_reason(session, tmp_path):
    with WorkerPool(AlwaysNaN, (), settings().ray) as pool:
        with pytest.raises(StudyError, match=r"\d+ trials failed.*kl_divergence is nan"):
            run(pool, tmp_path, n_trials=20)
    assert {t.state for t in load_study(None, tmp_path, "test").trials} == {TrialState.FAIL}


def test_when_no_worker_is_left_trials_wait_for_the_next_run(session, pool, tmp_path):
    with WorkerPool(Suicidal, (), settings().ray) as lost:
        with pytest.raises(WorkerError, match="no worker is left"):
            run(lost, tmp_path, n_trials=12)
    assert TrialState.RUNNING in {trial.state for trial in load_study(None, tmp_path, "test").trials}
    states = [trial.state for trial in run(pool, tmp_path, n_trials=12).trials]
    assert states.count(TrialState.COMPLETE) == 12 and states.count(TrialState.RUNNING) == 0


class AlwaysNaN(FakeWorker):
    def evaluate(self, context, edits):
        outcomes = super().evaluate(context, edits)
        for outcome in outcomes:
            outcome.scores.values["kl_divergence"] = float("nan")
        return outcomes


class LaneKiller(FakeWorker):
    """Kills all lanes during the third batch."""

    def evaluate(self, context, edits):
        if self._count("batches", only_read=True) == 2:
            for process in psutil.Process().parent().children():
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    title = " ".join(process.cmdline()[:1])
                    if "Trainable" in title or "BatchLane" in title:  # on a trip, or not
                        process.kill()
                        self._count("killed")
        return super().evaluate(context, edits)


class Suicidal(FakeWorker):
    def evaluate(self, context, edits):
        os._exit(1)


# ----- what a study refuses -----


def test_another_model_under_the_same_name_is_refused(tmp_path):
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
        pass
    other = {**FINGERPRINT, "model": {"id": "B", "fingerprint": "1"}}
    with pytest.raises(StudyError, match=r"made with model\.id = A, this run has B"):
        with open_study("test", None, tmp_path, OBJECTIVES, other):
            pass
    with pytest.raises(StudyError, match="objectives"):
        with open_study("test", None, tmp_path, ("kl_divergence", "behaviour_rate"), FINGERPRINT):
            pass


def test_two_drivers_at_once_are_refused(tmp_path):
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
        with pytest.raises(StudyError, match="another process"):
            with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
                pass


def test_two_drivers_on_one_database_are_refused_from_any_directory(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    other = multiprocessing.get_context("spawn").Process(target=_hold_study, args=(url, tmp_path / "b", tmp_path))
    other.start()
    try:
        while not (tmp_path / "held").exists():
            assert other.is_alive()
        with pytest.raises(StudyError, match=f"process {other.pid}"):
            with open_study("test", url, tmp_path / "a", OBJECTIVES, FINGERPRINT):
                pass
    finally:
        other.kill()
        other.join()
    with open_study("test", url, tmp_path / "a", OBJECTIVES, FINGERPRINT) as study:  # it is dead now
        assert study.user_attrs["driver"]["pid"] == os.getpid()


def _hold_study(url, folder, signal_folder):
    with open_study("test", url, folder, OBJECTIVES, FINGERPRINT):
        (signal_folder / "held").touch()
        multiprocessing.Event().wait()


def test_a_driver_on_another_machine_must_be_taken_over_knowingly(tmp_path):
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        pass
    study.set_user_attr("driver", {"host": "elsewhere", "pid": 1, "started": 0.0})
    with pytest.raises(StudyError, match=r"elsewhere.*take-over"):
        with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
            pass
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT, take_over=True) as study:
        assert study.user_attrs["driver"]["host"] == socket.gethostname()


def test_a_reused_process_id_is_not_a_live_driver(tmp_path):
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        pass
    parent = psutil.Process(os.getppid())
    driver = {"host": socket.gethostname(), "pid": parent.pid, "started": parent.create_time() - 100}
    study.set_user_attr("driver", driver)
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
        pass


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@localhost:1/x", "sqlite:////no/such/folder/x.db", "nonsense://"]
)
def test_a_storage_that_cannot_be_used_is_one_line_without_the_password(url, tmp_path):
    with pytest.raises(StudyError, match=r"check study\.storage") as caught:
        with open_study("test", url, tmp_path, OBJECTIVES, FINGERPRINT):
            pass
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_journal_that_was_cut_off_opens_and_one_that_is_something_else_does_not(tmp_path):
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        study.ask()
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 5, "wor')
    with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT) as study:
        assert len(study.trials) == 1
        study.ask()
    assert len(load_study(None, tmp_path, "test").trials) == 2
    journal.write_bytes(b"not a journal\n")
    with pytest.raises(StudyError, match="not a study's journal"):
        with open_study("test", None, tmp_path, OBJECTIVES, FINGERPRINT):
            pass


def test_reading_a_study_that_is_not_there(tmp_path):
    with pytest.raises(StudyError, match="no study"):
        load_study(None, tmp_path, "test")
    assert list(tmp_path.iterdir()) == []

"""Kill, interrupt, resume: n trials COMPLETE exactly once, the same ones as without the interruption."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import WorkerError
from bruno_ray.settings import SearchSettings
from bruno_ray.study.sampler import NumberedTPESampler
from bruno_ray.study.searcher import LANES_LOST_IN_A_ROW, BatchOptunaSearch
from bruno_ray.study.selection import load_trials
from bruno_ray.study.space import search_space, suggest
from bruno_ray.study.storage import load_study, open_study
from tests.support.fakes import fake_scores

OBJECTIVES = ("behaviour_rate", "kl_divergence")
SETS = ("a", "b")
NAMES = tuple(search_space(SearchSettings(), SETS, 8, ("attention", "mlp")))


# ----- the schedule alone: a searcher driven by hand -----


class Driver:
    """What Tune does with a searcher, one step at a time; dropping it is a kill."""

    def __init__(self, folder: Path, window: int = 2, workers: int = 1, target: int = 30, batch: int = 4, url=None):
        self._opened = open_study("test", url, folder, OBJECTIVES, {"model": "A"})
        study = self._opened.__enter__()
        self.search = BatchOptunaSearch(
            study,
            NumberedTPESampler(n_startup_trials=8, seed=3, names=NAMES),
            lambda trial: suggest(trial, SearchSettings(), SETS, 8, ("attention", "mlp")),
            OBJECTIVES,
            target=target,
            batch_size=batch,
            window=window,
            workers=workers,
            lanes=2,
        )
        self.trips: list[str] = []
        self.configs: list[dict] = []
        self.flying: list[tuple[int, list[dict]]] = []
        self._id = 0

    def fill(self) -> None:
        """Trips until no more are wanted; those that do not wait come back at once."""
        while True:
            self._id += 1
            trip = f"t{self._id}"
            config = self.search.suggest(trip)
            if config is None or config == "FINISHED":
                return
            self.configs.append(config)
            self.flying += config["batches"]
            if config["wait"]:
                self.trips.append(trip)
            else:
                self.search.on_trial_complete(trip, {"results": []})

    def finish(self, index: int = 0) -> None:
        self.bring(*self.flying.pop(index))

    def bring(self, ticket: int, edits: list[dict]) -> None:
        outcomes = [{"scores": {"values": fake_scores(Edit.from_dict(edit)), "counts": {}}} for edit in edits]
        result = {"outcomes": outcomes, "worker": "worker 0"}
        self.search.on_trial_complete(self.trips.pop(0), {"results": [(ticket, result)]})

    def lose_lane(self) -> None:
        self.search.on_trial_complete(self.trips.pop(0), None, error=True)

    def run(self, batches: int = 1000, order=lambda flying: 0) -> None:
        self.fill()
        while self.flying and batches:
            self.finish(order(len(self.flying)))
            self.fill()
            batches -= 1

    def leave(self) -> optuna.Study:
        self._opened.__exit__(None, None, None)
        return self.search.study


def params(study: optuna.Study) -> list[dict]:
    return [trial.params for trial in study.get_trials(deepcopy=False)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> list[dict]:
    driver = Driver(tmp_path_factory.mktemp("whole"))
    driver.run()
    study = driver.leave()
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30
    return params(study)


def test_every_lane_is_under_way_as_long_as_anything_is_out(tmp_path):
    """Tune ends the process of a lane without a trip, and starts another when there is one: seconds each time."""
    driver = Driver(tmp_path)
    driver.fill()
    while driver.flying:
        assert len(driver.trips) == driver.search.lanes
        driver.finish()
        driver.fill()
    assert driver.search.finished


@pytest.mark.parametrize("batches", [0, 1, 3, 6])
def test_killed_between_batches_and_resumed_is_the_same_study(batches, uninterrupted, tmp_path):
    driver = Driver(tmp_path)
    driver.run(batches)
    driver.leave()  # with trials RUNNING, as after a kill
    again = Driver(tmp_path)
    assert {trial.state for trial in again.search.study.trials} & {TrialState.RUNNING}
    again.run()
    study = again.leave()
    assert params(study) == uninterrupted
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30


def test_killed_at_every_write_and_resumed_is_the_same_study(uninterrupted, tmp_path):
    """Every prefix of the journal is a possible kill; each must lead to the same trials."""
    driver = Driver(tmp_path / "whole")
    driver.run()
    driver.leave()
    lines = (tmp_path / "whole" / "study.journal").read_bytes().splitlines(keepends=True)
    for i, cut in enumerate(range(9, len(lines), 37)):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
        again = Driver(folder)
        again.run()
        study = again.leave()
        assert params(study) == uninterrupted, f"cut at record {cut}"
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30


def test_batches_that_come_back_in_another_order_change_nothing(tmp_path):
    studies = []
    for name, turns in {"first": itertools.repeat(0), "swapped": itertools.cycle((1, 0))}.items():
        driver = Driver(tmp_path / name, window=4, workers=2, target=40)
        driver.run(order=lambda flying, turns=turns: min(next(turns), flying - 1))
        studies.append(params(driver.leave()))
    assert studies[0] == studies[1]


def test_a_stuck_batch_does_not_stop_the_others(tmp_path):
    """The order is given up when a worker would stand idle."""
    driver = Driver(tmp_path, window=4, workers=2, target=40)
    driver.fill()
    for _ in range(6):
        driver.finish(index=1)  # batch 0 never comes back
        driver.fill()
    assert driver.search.complete >= 16


def test_many_batches_are_out_with_two_lanes(tmp_path):
    driver = Driver(tmp_path, window=12, workers=8, target=160)
    driver.fill()
    assert len(driver.flying) == 12 and len(driver.trips) == 2
    driver.run(order=lambda flying: flying // 2)
    study = driver.leave()
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 160


def test_results_that_come_together_are_made_up_for_in_small_trips(tmp_path):
    driver = Driver(tmp_path, window=12, workers=8, target=160)
    driver.fill()
    results = []
    for ticket, edits in driver.flying:
        outcomes = [{"scores": {"values": fake_scores(Edit.from_dict(edit)), "counts": {}}} for edit in edits]
        results.append((ticket, {"outcomes": outcomes, "worker": "worker 0"}))
    driver.flying.clear()
    driver.configs.clear()
    driver.search.on_trial_complete(driver.trips.pop(0), {"results": results})
    driver.fill()
    assert [len(config["batches"]) for config in driver.configs] == [4, 4, 4, 0]
    assert [config["wait"] for config in driver.configs] == [False, False, False, True]


def test_a_lost_lane_costs_nothing_and_what_comes_twice_counts_once(uninterrupted, tmp_path):
    driver = Driver(tmp_path)
    driver.fill()
    assert [len(config["batches"]) for config in driver.configs] == [2, 0]
    driver.lose_lane()  # it had both batches
    driver.flying.clear()
    driver.fill()
    assert driver.configs[-1]["again"] and [ticket for ticket, _ in driver.configs[-1]["batches"]] == [0, 1]
    first = driver.flying[0]
    driver.finish()
    driver.fill()
    assert not driver.configs[-1]["again"]
    driver.bring(*first)
    driver.fill()
    driver.run()
    study = driver.leave()
    assert params(study) == uninterrupted
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 30


def test_lanes_that_keep_dying_end_the_run_and_its_trials_wait_for_the_next(uninterrupted, tmp_path):
    driver = Driver(tmp_path)
    driver.run(2)
    for _ in range(LANES_LOST_IN_A_ROW):
        driver.lose_lane()
        driver.fill()
    assert isinstance(driver.search.failure, WorkerError)
    assert driver.search.suggest("last") in (None, "FINISHED")
    driver.leave()
    again = Driver(tmp_path)
    again.run()
    assert params(again.leave()) == uninterrupted


def test_outcomes_that_are_lost_with_a_machine_are_made_again_once(tmp_path):
    driver = Driver(tmp_path, target=8)
    for lost in (1, 2):
        driver.fill()
        ticket, _ = driver.flying.pop(0 if lost == 1 else -1)
        assert ticket == (0 if lost == 1 else 2)
        driver.search.on_trial_complete(driver.trips.pop(0), {"results": [(ticket, {"lost": "its node is dead"})]})
    driver.run()
    study = driver.leave()
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.FAIL) == 4 and states.count(TrialState.COMPLETE) == 8


def test_a_database_study_cut_off_while_sampling_keeps_its_numbers(tmp_path):
    """No batched writes here: a trial may have half of its parameters, or none."""
    url = f"sqlite:///{tmp_path}/study.db"
    whole = Driver(tmp_path / "a", target=12, url=f"sqlite:///{tmp_path}/whole.db")
    whole.run()
    expected = params(whole.leave())

    driver = Driver(tmp_path / "b", target=12, url=url)
    driver.run(1)
    study = driver.leave()
    last = study.ask()  # the driver died sampling batch 3
    last.set_user_attr("batch", [3, 4])
    last.suggest_categorical("direction_scope", ("global", "per_layer"))
    again = Driver(tmp_path / "b", target=12, url=url)
    again.run()
    study = again.leave()
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == len(study.trials) == 16  # the batch that had been begun is finished
    assert params(study)[:8] == expected[:8]
    assert len({tuple(trial.params.values()) for trial in complete}) == 16


# ----- real driver processes on real Ray -----


def start(folder: Path, **options) -> subprocess.Popen:
    arguments = [f"{name}={value}" for name, value in options.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.study_driver", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
    )


def wait_for_line(process: subprocess.Popen, text: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


def family(process: subprocess.Popen) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def assert_all_gone(processes: list[psutil.Process], timeout: float = 30) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], "orphans are left"


def stored(folder: Path) -> optuna.Study:
    return load_study(None, folder / "run", "test")


def assert_complete_once(folder: Path, n: int) -> None:
    trials = load_trials(stored(folder))
    assert [trial.state for trial in trials] == ["COMPLETE"] * n
    assert len({tuple(trial.params.values()) for trial in trials}) == n


@pytest.fixture
def reaped():
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=30)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_driver_killed_with_9_leaves_no_orphans_and_loses_nothing(tmp_path, reaped):
    whole = start(tmp_path / "whole", seconds=0.02)
    reaped.append(whole)
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output

    first = start(tmp_path / "killed", seconds=2.0)
    reaped.append(first)
    wait_for_line(first, "trials 8/24")
    processes = family(first)
    assert len(processes) > 5  # Ray is its child
    agents = [p for p in processes if p.name().endswith("Agent")]  # Ray's; they report the death, for a minute
    first.send_signal(signal.SIGKILL)
    assert_all_gone([p for p in processes if p not in agents])
    states = [trial.state for trial in stored(tmp_path / "killed").trials]
    assert TrialState.RUNNING in states and states.count(TrialState.COMPLETE) < 24

    second = start(tmp_path / "killed", seconds=0.02)
    reaped.append(second)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert_complete_once(tmp_path / "killed", 24)
    assert params(stored(tmp_path / "killed")) == params(stored(tmp_path / "whole"))
    assert_all_gone(agents, timeout=70)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_once_finishes_what_runs_and_twice_stops_at_once(tmp_path, reaped):
    once = start(tmp_path / "once", seconds=1.0)
    reaped.append(once)
    wait_for_line(once, "trials 4/24")
    processes = family(once)
    once.send_signal(signal.SIGINT)
    output, _ = once.communicate(timeout=200)
    assert once.returncode == 130, output
    assert "Pareto front" in output
    assert_all_gone(processes)
    states = {trial.state for trial in stored(tmp_path / "once").trials}
    assert states == {TrialState.COMPLETE}

    before = (tmp_path / "once" / "batches").stat().st_size
    twice = start(tmp_path / "once", seconds=120.0)
    reaped.append(twice)
    wait_for_line(twice, "ready")
    deadline = time.monotonic() + 120
    while (tmp_path / "once" / "batches").stat().st_size == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes = family(twice)
    twice.send_signal(signal.SIGINT)
    wait_for_line(twice, "stopping")
    twice.send_signal(signal.SIGINT)
    output, _ = twice.communicate(timeout=100)  # less than a batch takes
    assert twice.returncode == 130, output
    assert "Traceback" not in output
    assert_all_gone(processes)
    assert TrialState.RUNNING in {trial.state for trial in stored(tmp_path / "once").trials}

    last = start(tmp_path / "once", seconds=0.02)
    reaped.append(last)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    assert_complete_once(tmp_path / "once", 24)

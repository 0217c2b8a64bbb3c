"""Kill, interrupt, resume real driver processes: n trials COMPLETE exactly once, the same ones as without it."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState

from bruno_ray.study.selection import load_trials
from bruno_ray.study.storage import load_study
from tests.support.schedules import params
from tests.support.waiting import PATIENCE_S, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


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


def assert_all_gone(processes: list[psutil.Process], timeout: float = PATIENCE_S) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], "orphans are left"


def stored(folder: Path) -> optuna.Study:
    return load_study(None, folder / "run", "test")


def assert_complete_once(folder: Path, n: int) -> None:
    trials = load_trials(stored(folder))
    assert [trial.state for trial in trials] == ["COMPLETE"] * n
    assert len({tuple(trial.params.values()) for trial in trials}) == n


@pytest.fixture(scope="module")
def agents_of_killed_drivers() -> Iterator[list[psutil.Process]]:
    """Ray's own agents report their cluster's death for another minute: they are waited for once all tests are done."""
    agents: list[psutil.Process] = []
    yield agents
    assert_all_gone(agents)


@pytest.fixture
def reaped() -> Iterator[list[subprocess.Popen]]:
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=30)


def test_a_driver_killed_with_9_leaves_no_orphans_and_loses_nothing(
    tmp_path: Path, reaped: list[subprocess.Popen], agents_of_killed_drivers: list[psutil.Process]
) -> None:
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
    agents_of_killed_drivers += agents


def test_ctrl_c_once_finishes_what_runs_and_twice_stops_at_once(tmp_path: Path, reaped: list[subprocess.Popen]) -> None:
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
    wait_for(lambda: (tmp_path / "once" / "batches").stat().st_size > before, "the next batch has begun")
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

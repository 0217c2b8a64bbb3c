"""What a run has cost is in its folder while it is under way and when it has ended, for the report."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import CostRecord
from cluster.renting.ledger import Contract, Entries, Ledger
from cluster.renting.run_cost import WRITE_S, CostWriter, run_cost
from tests.cluster.fake_vast.clock import VirtualClock
from tests.support.finished_run import make

HOUR = 3600.0


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def ledger(tmp_path: Path, clock: VirtualClock) -> Ledger:
    """A head at 0.1 $/h for ever, and a worker at 1 $/h with 0.5 $ for its downloads for the second hour."""
    begin = clock.time()
    ledger = Ledger(tmp_path / "cluster", clock)
    worker = Contract(1.0, begin + HOUR, begin + 2 * HOUR, traffic=0.5)
    ledger._file.write_text(json.dumps(Entries({"1": Contract(0.1, begin), "2": worker}).to_json()))
    return ledger


@pytest.fixture
def run(tmp_path: Path, clock: VirtualClock) -> RunDirectory:
    make(tmp_path / "runs" / "mine", n_trials=2)
    touch(tmp_path / "runs" / "mine", clock.time())
    return RunDirectory(tmp_path / "runs" / "mine")


def touch(folder: Path, time: float) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "cost.json":
            os.utime(path, (time, time))


def test_it_is_all_machines_from_the_first_file_to_now_or_to_the_last(
    ledger: Ledger, run: RunDirectory, clock: VirtualClock
) -> None:
    clock.sleep(3 * HOUR)
    assert run_cost(run, ledger, True, clock.time()).dollars == pytest.approx(0.3 + 1.0 + 0.5)
    os.utime(run.run_file, (clock.time() - 1.5 * HOUR,) * 2)
    run.save_cost(CostRecord(dollars=9.0, until=0.0, ended=False))
    ended = run_cost(run, ledger, False, clock.time())
    assert ended.dollars == pytest.approx(0.15 + 0.5 + 0.5) and ended.ended, "cost.json is no file of the run's"


def test_it_is_noted_once_a_minute_and_once_more_at_the_end(
    tmp_path: Path, ledger: Ledger, run: RunDirectory, clock: VirtualClock
) -> None:
    writer = CostWriter(tmp_path / "runs", ledger, clock)
    writer.look()
    assert run.load_cost() is None, "one that ended before is left alone"
    seen = []
    with open(run.path / ".driver.lock", "w") as lock:
        touch(run.path, clock.time())
        fcntl.flock(lock, fcntl.LOCK_EX)
        for _ in range(4):
            writer.look()
            cost = run.load_cost()
            assert cost is not None and not cost.ended
            seen.append(cost.until)
            clock.sleep(WRITE_S / 2)
    assert len(set(seen)) == 2
    os.utime(run.run_file, (clock.time(), clock.time()))
    writer.look()
    last = run.load_cost()
    assert last is not None and last.ended and last.dollars == pytest.approx(0.1 * 2 * WRITE_S / HOUR, abs=1e-6)
    clock.sleep(10 * WRITE_S)
    writer.look()
    assert run.load_cost() == last


@pytest.mark.parametrize(
    ("trials", "selected", "ended", "text"),
    [
        (0, None, False, "cost of this run so far: 1.50 $"),
        (30, None, True, "cost of this run so far: 1.50 $, 0.0500 $ for each completed trial"),
        (30, 7, False, "cost of this run so far: 1.50 $, 0.0500 $ for each completed trial"),
        (30, 7, True, "cost of its result (trial 7): 1.50 $, 0.0500 $ for each completed trial"),
    ],
)
def test_it_is_said_of_the_run_so_far_and_of_its_result(
    trials: int, selected: int | None, ended: bool, text: str
) -> None:
    assert CostRecord(dollars=1.5, until=0.0, ended=ended).text(trials, selected) == text

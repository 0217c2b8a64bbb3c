"""Snapshots of a study that is running: right, and taken from the view's thread while the schedule moves on."""

import itertools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bruno_ray.study.batches import Batch
from bruno_ray.study.monitor import Monitor
from bruno_ray.study.progress import Snapshot
from bruno_ray.study.schedule import Schedule
from bruno_ray.workers.messages import EditOutcome, Failed, Scored
from bruno_ray.workers.worker_actor import BUSY, IDLE, WorkerState
from tests.support.fakes import fake_scores
from tests.support.schedules import make_schedule, memory_folder, opened

__all__ = ["memory_folder"]


class NoPool:
    """The monitor's other source, which is not looked at here."""

    def snapshot(self, timeout: float = 10.0) -> list[WorkerState]:
        return []


class OneAtWork:
    """A worker that has so many seconds to go."""

    def __init__(self, to_go: float) -> None:
        self.states = [WorkerState("worker 0", BUSY, to_go=to_go), WorkerState("worker 1", IDLE, to_go=9999.0)]

    def snapshot(self, timeout: float = 10.0) -> list[WorkerState]:
        return self.states


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def bring(schedule: Schedule, batch: Batch) -> None:
    outcomes = tuple(EditOutcome(fake_scores(batch.edits[number])) for number in batch.missing)
    schedule.bring(batch.batch_id, Scored("worker 0", outcomes))


def test_a_snapshot_counts_trials_as_they_come_and_go(memory_folder: Path) -> None:
    with opened(memory_folder) as study:
        schedule = make_schedule(study, target=12)
        monitor = Monitor(schedule, NoPool())
        schedule.on_batch = monitor.add
        assert (monitor.snapshot().running, monitor.snapshot().remaining) == (0, None)
        first, second = schedule.take_due()
        bring(schedule, first)
        after = monitor.snapshot()
        assert (after.complete, after.running, after.failed, after.target) == (4, 4, 0, 12)
        assert after.front and after.remaining is not None
        schedule.bring(second.batch_id, Failed("it lost two workers"))
        schedule.take_due()
        after = monitor.snapshot()
        assert (after.complete, after.running, after.failed) == (4, 8, 4), "four of them in place of the failed ones"


def test_the_time_to_go_counts_what_trials_cost(memory_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four searched trials in eight seconds, four more to come, then four that cost ten times as much."""
    clock = iter([0.0])
    monkeypatch.setattr("bruno_ray.study.monitor.time.monotonic", lambda: next(clock))
    with opened(memory_folder) as study:
        schedule = make_schedule(study, target=12)
        schedule.cost = lambda number: 10.0 if number >= 8 else 1.0
        monitor = Monitor(schedule, NoPool())
        schedule.on_batch = monitor.add
        first, *_ = schedule.take_due()
        clock = iter([8.0])
        bring(schedule, first)
        for now, remaining in ((8.0, 88.0), (18.0, 78.0), (200.0, 2.0)):
            clock = itertools.repeat(now)
            assert monitor.snapshot().remaining == remaining
        monitor._pool = OneAtWork(600.0)
        clock = itertools.repeat(220.0)
        assert monitor.snapshot().remaining == 600.0, "it is late, and its worker knows better"


def test_snapshots_are_taken_while_another_thread_asks_and_tells(memory_folder: Path, impatient: None) -> None:
    """On a terminal the view has a thread of its own, which an error would end: the display would freeze."""
    with opened(memory_folder) as study:
        schedule = make_schedule(study, target=400, batch_size=1, window=30, workers=1, n_startup_trials=400)
        monitor = Monitor(schedule, NoPool())
        schedule.on_batch = monitor.add
        done, errors, snapshots = threading.Event(), [], []

        def look() -> None:
            while not done.is_set():
                try:
                    snapshots.append(monitor.snapshot())
                except Exception as error:
                    errors.append(error)
                    return

        looking = threading.Thread(target=look)
        looking.start()
        out = schedule.take_due()
        while out and not errors:
            bring(schedule, out.pop(0))
            out += schedule.take_due()
        done.set()
        looking.join()
        assert errors == [] and schedule.finished
        assert all(isinstance(snapshot, Snapshot) and 0 <= snapshot.running <= 30 for snapshot in snapshots)

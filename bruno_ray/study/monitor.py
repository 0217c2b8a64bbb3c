"""Snapshots of a running study for the progress view."""

import itertools
import logging
import time

import psutil
from ray.exceptions import RayError

from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import WorkerError
from bruno_ray.study.batches import Batch
from bruno_ray.study.progress import Snapshot
from bruno_ray.study.schedule import Schedule
from bruno_ray.study.selection import COUNTED, TrialRecord, load_trials, pareto_front
from bruno_ray.workers.pool import TO_SHOW_S, WorkerPool
from bruno_ray.workers.worker_actor import BUSY, WorkerState

logger = logging.getLogger(__name__)


class Monitor:
    """``add`` is called from the schedule's thread, ``snapshot`` from that of the view.

    So only whole values pass between the two: ``add`` replaces the list of records and never changes one, and of the
    schedule nothing is read but its plain attributes.
    """

    def __init__(self, schedule: Schedule, pool: WorkerPool):
        self._schedule = schedule
        self._pool = pool
        self._records = load_trials(schedule.study.study)
        self._started = time.monotonic()
        self._came_at = self._started
        """When the last batch came back."""

        self._at_start = {record.number for record in self._records if record.state in COUNTED}
        self._driver = psutil.Process()
        self._workers: tuple[WorkerState, ...] = ()
        self._asked_at = 0.0

    def add(self, batch: Batch) -> None:
        """Take over results that have come back."""
        kept = [record for record in self._records if record.number not in batch.results]
        self._records = kept + [
            TrialRecord(
                number=number,
                state="FAIL" if result.error is not None else "PRUNED" if result.pruned else "COMPLETE",
                edit=edit.to_dict() if isinstance(edit := batch.edits[number], Edit) else None,
                values=result.values,
                counts=result.counts,
                seconds=result.seconds,
                worker=result.worker,
                error=result.error,
            )
            for number, result in batch.results.items()
        ]
        self._came_at = time.monotonic()

    def snapshot(self) -> Snapshot:
        schedule, records = self._schedule, self._records
        counted = {record.number for record in records if record.state in COUNTED}
        failed = {record.number for record in records if record.state == "FAIL"}
        return Snapshot(
            name=schedule.study.study.study_name,
            objectives=schedule.study.objectives,
            target=schedule.target,
            complete=len(counted),
            running=schedule.running,
            failed=len(failed),
            pruned=sum(record.state == "PRUNED" for record in records),
            elapsed=time.monotonic() - self._started,
            remaining=self._remaining(counted, failed),
            memory=self._driver.memory_info().rss,
            front=tuple(pareto_front(records, schedule.study.objectives)),
            workers=self._worker_states(),
            note="stopping" if schedule.stopping else "",
        )

    def _remaining(self, counted: set[int], failed: set[int]) -> float | None:
        """Seconds to go, from what the trials so far have taken and what those to come cost beside them. Once more time
        has passed than that, what the workers say of their own work, or at least a searched trial. Trials by their
        numbers."""
        schedule = self._schedule
        if len(counted) >= schedule.target:
            return 0.0
        if not (new := counted - self._at_start):
            return None
        past = counted | failed
        to_come = (number for number in itertools.count() if number not in past)
        ahead = sum(map(schedule.cost, itertools.islice(to_come, schedule.target - len(counted))))
        each = (self._came_at - self._started) / sum(map(schedule.cost, new))
        if (expected := each * ahead - (time.monotonic() - self._came_at)) > each:
            return expected
        at_work = [state.to_go for state in self._worker_states() if state.state == BUSY and state.to_go is not None]
        return max([each, *at_work])

    def _worker_states(self) -> tuple[WorkerState, ...]:
        if time.monotonic() - self._asked_at > 1.0:
            try:
                self._workers = tuple(self._pool.snapshot(TO_SHOW_S))
            except (RayError, WorkerError):
                logger.debug("the broker did not answer; showing the last known states")
            self._asked_at = time.monotonic()
        return self._workers

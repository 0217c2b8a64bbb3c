"""Tune's side of the search: hands the schedule's batches to the lane, and what the lane brings to the schedule."""

from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from bruno_ray.errors import WorkerError
from bruno_ray.optuna_internals import storage_of
from bruno_ray.study.batches import Batch
from bruno_ray.study.lane import RESULTS, SWAP
from bruno_ray.study.schedule import BATCHES_PER_SWAP, Schedule
from bruno_ray.workers.messages import Submission, Swap

LANES_LOST_IN_A_ROW = 4
"""A driver gives up when this many lanes die and none of them has brought anything back."""


class BatchOptunaSearch(OptunaSearch):
    """An OptunaSearch whose Tune trials are swaps of batches of Optuna trials. Tune calls it from one thread.

    One Tune trial is under way as long as anything is out, even with no batch to take along: Tune ends the process of
    a lane that has nothing to do, and starting one takes seconds.
    """

    def __init__(self, schedule: Schedule):
        study = schedule.study.study
        super().__init__(
            space=lambda trial: {},  # the schedule samples; Tune asks for a space nevertheless
            metric=list(schedule.study.objectives),
            mode=["min"] * len(schedule.study.objectives),
            sampler=study.sampler,
            study_name=study.study_name,
            storage=storage_of(study),
        )
        self.schedule = schedule

        self.cancelled = False
        """Set to ignore whatever still comes back; its trials stay RUNNING and are adopted next time."""

        self._under_way: tuple[str, list[Batch]] | None = None  # the Tune trial, and the batches that it took along
        self._received: tuple[int, ...] = ()  # what the last swap has brought
        self._lanes_lost = 0  # in a row

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next swap as a Tune config; None while one is under way; FINISHED at the end."""
        if self.cancelled:
            return Searcher.FINISHED
        if self._under_way is not None:
            return None
        batches = self.schedule.take_due()
        if not batches and not self.schedule.anything_out:
            return Searcher.FINISHED
        self._under_way = trial_id, batches
        submit = tuple(
            Submission(batch.batch_id, tuple(batch.edits[number] for number in batch.missing), batch.rivals)
            for batch in batches
        )
        # A full swap comes back at once: there may be more to take along.
        return {SWAP: Swap(submit, self._received, block=len(batches) < BATCHES_PER_SWAP)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._under_way is None or self._under_way[0] != trial_id:
            return
        (_, batches), self._under_way = self._under_way, None
        if self.cancelled:
            return
        if error or not result or RESULTS not in result:
            self._lane_lost(batches)
            return
        self._received = tuple(batch_id for batch_id, _ in result[RESULTS])
        for batch_id, batch_result in result[RESULTS]:
            self._lanes_lost = 0
            self.schedule.bring(batch_id, batch_result)

    def _lane_lost(self, batches: list[Batch]) -> None:
        """What it took along is handed in again; what it was bringing back the pool still has."""
        self._lanes_lost += 1
        self.schedule.put_back(batches)
        if self._lanes_lost >= LANES_LOST_IN_A_ROW:
            self.schedule.give_up(
                WorkerError(
                    "scheduling processes die one after another (is the driver's machine out of memory?): fix the"
                    " cause, then resume the run"
                )
            )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing is pruned half-way."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Tune's snapshots are not the record and are never restored."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

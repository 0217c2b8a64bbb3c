"""Which batch of trials is asked, handed out and told when. Knows nothing of Tune and Ray.

    asked ----> queued -----------> out ------------------> back ----> told
    sampled     waits for the       on its way to the       results    Optuna knows
    in order    lane to take it     pool, there, or on      stored     the results
                  ^                 its way back
                  |                  |
                  +------------------+
    the lane that took it is lost: it goes out under the same id, which the pool evaluates only once;
    or its outcomes are lost with a machine: it is evaluated once more, under a new id
    trials of it repeat edits of batches that are still out: it waits for those before it counts as back

Three rules make a resumed study the one that would have been.

* Results are stored with their trial as soon as they arrive, and trials that a dead driver left RUNNING are adopted
  (``batches.py``).
* Batch n is sampled when batch n - window is told and not before, in that order, whatever order batches come back
  in. What the sampler knows then depends on the schedule alone, not on timing. Only when a worker would otherwise
  stand idle, because another is slow or lost, is the order given up.
* A trial whose scores are not finite, or whose batch has lost its worker twice, FAILs alone and is replaced by a
  new trial; too many of those end the study.
"""

import itertools
import logging
from collections.abc import Callable, Sequence

from bruno_ray.errors import BrunoError, StudyError, WorkerError
from bruno_ray.study.batches import Batch, BatchState, BatchStudy
from bruno_ray.study.trial_result import TrialResult
from bruno_ray.workers.messages import BatchResult, Failed, Lost, NoWorkers, Scored

logger = logging.getLogger(__name__)

FEWEST_FAILURES = 10
FAILURE_SHARE = 0.25
"""A driver gives up after max(10, a quarter of the target) failed trials of its own."""

BATCHES_PER_SWAP = 4
"""Batches sampled in one go: idle workers get these before more are sampled."""


class Schedule:
    """Belongs to one thread; another may read the plain attributes that are not private."""

    def __init__(
        self,
        study: BatchStudy,
        target: int,
        batch_size: Callable[[int], int],
        window: int,
        workers: int,
        on_batch: Callable[[Batch], None] = lambda batch: None,
        cost: Callable[[int], float] = lambda number: 1.0,
    ):
        """
        Args:
            study: its RUNNING trials are adopted.
            target: COMPLETE trials to reach.
            batch_size: trials of a batch, by the number of its first trial.
            window: batches asked and not yet told, at most.
            workers: fewer unfinished batches than this leave a worker idle.
            on_batch: called with every batch that has come back.
            cost: about what the trial of a number costs, in searched ones, for whoever estimates the time to go.
        """
        self.study = study
        self.target = target
        self.batch_size = batch_size
        self.window = window
        self.workers = workers
        self.on_batch = on_batch
        self.cost = cost

        self.stopping = False
        """Set to ask for no new trials and let those under way finish."""

        self.failure: BrunoError | None = None
        """Why the search has ended early."""

        self.complete = study.n_complete()
        self.failed = 0
        """FAIL trials of this driver."""

        self.running = 0
        """Trials without results yet."""

        self._ids = itertools.count()
        self._something_came = False
        self._traceback_logged = False
        self._open: dict[int, Batch] = {}  # asked and not yet told, by number, which is also their order
        adopted, self._next_number = study.adopt(self.batch_size)
        for batch in adopted:
            self._add(batch)

    @property
    def finished(self) -> bool:
        return self.complete >= self.target

    @property
    def anything_out(self) -> bool:
        return bool(self._in(BatchState.OUT))

    def take_due(self) -> list[Batch]:
        """The batches to hand out now. At the start that is the whole window: nothing can come back meanwhile."""
        due: list[Batch] = []
        most = BATCHES_PER_SWAP if self._something_came else self.window
        while len(due) < most and (batch := self._next()) is not None:
            batch.state = BatchState.OUT
            due.append(batch)
        return due

    def put_back(self, batches: Sequence[Batch]) -> None:
        """These have perhaps not reached the pool."""
        for batch in batches:
            if batch.state is BatchState.OUT:
                batch.state = BatchState.QUEUED

    def bring(self, batch_id: int, result: BatchResult) -> None:
        """Something has come back from the pool. What comes twice counts once."""
        self._something_came = True
        batch = next((batch for batch in self._open.values() if batch.batch_id == batch_id), None)
        if batch is None or batch.state in (BatchState.BACK, BatchState.WAITING):
            return
        match result:
            case Scored(worker, outcomes):
                results = [TrialResult.of(outcome, self.study.objectives, worker) for outcome in outcomes]
                self._store(batch, results)
            case Failed(error, traceback):
                if traceback is not None and not self._traceback_logged:
                    logger.error("a batch of trials failed:\n%s", traceback)
                    self._traceback_logged = True
                self._store(batch, [TrialResult(error=error)] * len(batch.missing))
            case Lost(reason) if batch.losses:
                error = f"its outcomes were lost twice ({reason})"
                self._store(batch, [TrialResult(error=error)] * len(batch.missing))
            case Lost():
                batch.losses += 1
                batch.batch_id = next(self._ids)
                batch.state = BatchState.QUEUED
            case NoWorkers(reason):
                batch.state = BatchState.QUEUED
                self.failure = WorkerError(reason)

    def give_up(self, failure: BrunoError) -> None:
        """End the search; nothing is waited for."""
        self.failure = failure
        self.put_back(self._in(BatchState.OUT))

    def settle(self) -> None:
        """Tell every result that has arrived. Called at the end."""
        for batch in self._in(BatchState.BACK):
            self._tell(batch)

    # ----- the order -----

    def _in(self, state: BatchState) -> list[Batch]:
        return [batch for batch in self._open.values() if batch.state is state]

    def _next(self) -> Batch | None:
        """The next batch to hand out, asked if need be."""
        if self.stopping or self.failure is not None:
            self.settle()
            return None
        while not (queued := self._in(BatchState.QUEUED)) and self._ask_if_due():
            pass  # once more: of what was asked every trial may repeat another
        return queued[0] if queued and len(self._in(BatchState.OUT)) < self.window else None

    def _wanted(self) -> int:
        """Trials still to be asked if all that are under way succeed."""
        return self.target - self.complete - sum(len(batch.edits) for batch in self._open.values())

    def _ask_if_due(self) -> bool:
        """Whether a batch was asked."""
        if self._wanted() <= 0:
            self.settle()  # no more sampling depends on the order, unless failures make room again
        if self._wanted() <= 0 or self.failure is not None or len(self._in(BatchState.OUT)) >= self.window:
            return False
        while len(self._open) >= self.window and (oldest := next(iter(self._open.values()))).state is BatchState.BACK:
            self._tell(oldest)
        if len(self._open) >= self.window:
            if len(self._open) - len(self._in(BatchState.BACK)) >= self.workers:
                return False
            self.settle()  # out of order, for a worker that stands idle
        if self._wanted() <= 0 or self.failure is not None:
            return False
        size = self.batch_size(self.study.n_trials())
        self._add(self.study.ask(self._next_number, min(size, self._wanted())))
        self._next_number += 1
        return True

    def _add(self, batch: Batch) -> None:
        batch.batch_id = next(self._ids)
        self._open[batch.number] = batch
        if batch.state is BatchState.QUEUED and not batch.missing:
            self._advance(batch)
        self._count_running()

    def _store(self, batch: Batch, results: Sequence[TrialResult]) -> None:
        self.study.store(batch, dict(zip(batch.missing, results, strict=True)))
        for each in [batch, *self._in(BatchState.WAITING)]:
            self._advance(each)
        self._count_running()

    def _advance(self, batch: Batch) -> None:
        """What becomes of a batch of which nothing is to be evaluated, as far as is known."""
        self.study.repeat(batch)
        if batch.missing:  # what they repeat has failed
            batch.batch_id, batch.state = next(self._ids), BatchState.QUEUED
        elif batch.is_whole:
            batch.state = BatchState.BACK
            self.on_batch(batch)
        else:
            batch.state = BatchState.WAITING

    def _count_running(self) -> None:
        self.running = sum(len(batch.missing) for batch in self._open.values())

    def _tell(self, batch: Batch) -> None:
        del self._open[batch.number]
        told = self.study.tell(batch)
        self.complete += told.complete
        self.failed += len(told.errors)
        for number, error in told.errors.items():
            logger.warning("trial %d failed: %s", number, error)
        if self.failed > max(FEWEST_FAILURES, FAILURE_SHARE * self.target):
            number, error = list(told.errors.items())[-1]
            self.failure = StudyError(
                f"{self.failed} trials failed, the last one with: trial {number}: {error}; fix the cause, then resume"
                " the run"
            )

"""The searcher between Tune and Optuna: one Tune trial takes batches of K Optuna trials out and brings results back.

The Optuna study is the record; Tune only schedules. Three rules keep it so.

* Results are stored with their trial as soon as they arrive, and trials that a dead driver left RUNNING are
  adopted: those with results are told, the others are evaluated again under their own numbers and parameters.
* Batch n is sampled when batch n - window is told and not before, in that order, whatever order batches come back
  in. What the sampler knows then depends on the schedule alone, not on timing, so a study that was killed and
  resumed samples what it would have sampled. Only when a worker would otherwise stand idle, because another is
  slow or lost, is the order given up.
* A trial whose scores are not finite, or whose batch has lost its worker twice, FAILs alone and is replaced by a
  new trial; too many of those end the study.
"""

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from bruno_ray.ablation.edit import Edit
from bruno_ray.errors import BrunoError, StudyError, WorkerError
from bruno_ray.study.storage import batched

logger = logging.getLogger(__name__)

FEWEST_FAILURES = 10
FAILURE_SHARE = 0.25
"""A driver gives up after max(10, a quarter of the target) failed trials of its own."""

BATCHES_PER_TRIP = 4
"""So that workers which wait get these before the next ones are sampled."""

LANES_LOST_IN_A_ROW = 4
"""A driver gives up when this many lanes die and none of them has brought anything back."""


@dataclass
class Batch:
    """Trials that are evaluated together."""

    number: int
    edits: dict[int, Edit]
    """By trial number."""

    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By trial number: what goes into the trial's user attribute ``result``."""

    ticket: int = -1
    """Names this evaluation of it in the pool."""

    losses: int = 0
    """How often its outcomes were lost with the machine that had them."""

    @property
    def missing(self) -> list[int]:
        return [number for number in self.edits if number not in self.results]


class BatchOptunaSearch(OptunaSearch):
    """Asks and tells Optuna trials in batches of K. Lives in the driver; Tune calls it from one thread."""

    def __init__(
        self,
        study: optuna.Study,
        sampler: BaseSampler,
        suggest: Callable[[optuna.Trial], Edit],
        objectives: Sequence[str],
        target: int,
        batch_size: int,
        window: int,
        workers: int,
        lanes: int,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ):
        """
        Args:
            study: opened by ``storage.open_study``; its RUNNING trials are adopted.
            suggest: samples one edit.
            objectives: metric names in the order of the study's directions; all minimised.
            target: COMPLETE trials to reach.
            window: batches asked and not yet told, at most.
            workers: fewer unfinished batches than this leave a worker idle.
            lanes: Tune trials at a time. They carry batches and results; any of them may bring any result.
            on_batch: called with every batch that has come back.
        """
        super().__init__(
            space=suggest,
            metric=list(objectives),
            mode=["min"] * len(objectives),
            sampler=sampler,
            study_name=study.study_name,
            storage=study._storage,
        )
        self.study: optuna.Study = self._ot_study
        self.suggest_edit = suggest
        self.objectives = list(objectives)
        self.target = target
        self.batch_size = batch_size
        self.window = window
        self.workers = workers
        self.lanes = lanes
        self.on_batch = on_batch

        self.stopping = False
        """Set to ask for no new trials and let those under way finish."""

        self.cancelled = False
        """Set to ignore whatever still comes back; its trials stay RUNNING and are adopted next time."""

        self.failure: BrunoError | None = None
        """Why the search has ended early."""

        self.complete = 0
        self.failed = 0
        """FAIL trials of this driver."""

        self._order: deque[Batch] = deque()  # asked and not yet told, by number
        self._to_run: deque[Batch] = deque()  # not in the pool yet
        self._out: dict[int, Batch] = {}  # in the pool, or on the way there or back, by ticket
        self._tickets = itertools.count()
        self._trips: dict[str, list[Batch]] = {}  # batches that each Tune trial takes along, by its id
        self._lanes_lost = 0  # in a row
        self._again = False  # a lane was lost, and the pool does not know yet
        self._something_came = False
        self._next_number = 0
        self._last_error = ""
        self._traceback_logged = False
        self._adopt()

    # ----- what Tune calls -----

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trip as a Tune config; None when there are lanes enough under way; FINISHED at the end.

        There is a trip for every lane as long as anything is out, even with no batch to take along: Tune ends the
        process of a lane that has nothing to do, and starting one takes seconds.
        """
        if self.cancelled:
            return Searcher.FINISHED
        if len(self._trips) >= self.lanes:
            return None
        batches = self._due()
        if not batches and not self._out:
            return Searcher.FINISHED
        self._trips[trial_id] = batches
        again, self._again = self._again, False
        return {
            "batches": [(batch.ticket, self._missing_edits(batch)) for batch in batches],
            "wait": len(batches) < BATCHES_PER_TRIP,  # a full trip comes back for more
            "again": again,
        }

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        batches = self._trips.pop(trial_id, None)
        if batches is None or self.cancelled:
            return
        if error or not result or "results" not in result:
            self._lane_lost(batches)
            return
        for ticket, outcome in result["results"]:
            self._lanes_lost = 0
            self._something_came = True
            batch = self._out.pop(ticket, None)
            if batch is not None:  # else it has come before, with a lane that was thought to be lost
                self._take(batch, outcome)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing is pruned half-way."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Tune's snapshots are not the record and are never restored."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    # ----- the schedule -----

    @property
    def running(self) -> int:
        """Trials without results yet."""
        return sum(len(batch.missing) for batch in self._order)

    @property
    def finished(self) -> bool:
        return self.complete >= self.target

    def settle(self) -> None:
        """Tell every result that has arrived. Called when Tune has returned."""
        self._tell_finished()

    def _due(self) -> list[Batch]:
        """The batches for one trip; at the start all of them, because there is nothing to bring back meanwhile."""
        batches: list[Batch] = []
        most = BATCHES_PER_TRIP if self._something_came else self.window
        while len(batches) < most and (batch := self._next_batch()) is not None:
            self._out[batch.ticket] = batch
            batches.append(batch)
        return batches

    def _next_batch(self) -> Batch | None:
        if self.stopping or self.failure is not None:
            self._tell_finished()
            return None
        if not self._to_run:
            self._ask_if_due()
        return self._to_run.popleft() if self._to_run and len(self._out) < self.window else None

    def _missing_edits(self, batch: Batch) -> list[dict[str, Any]]:
        return [batch.edits[number].to_dict() for number in batch.missing]

    def _wanted(self) -> int:
        """Trials still to be asked if all that are under way succeed."""
        return self.target - self.complete - sum(len(batch.edits) for batch in self._order)

    def _ask_if_due(self) -> None:
        if self._wanted() <= 0:
            self._tell_finished()  # no more sampling depends on the order, unless failures make room again
        if self._wanted() <= 0 or self.failure is not None or len(self._out) >= self.window:
            return
        while len(self._order) >= self.window and not self._order[0].missing:
            self._tell(self._order.popleft())
        if len(self._order) >= self.window:
            unfinished = sum(bool(batch.missing) for batch in self._order)
            if unfinished >= self.workers:
                return
            self._tell_finished()
        if self._wanted() > 0 and self.failure is None:
            self._ask(min(self.batch_size, self._wanted()))

    def _ask(self, size: int) -> None:
        number = self._next_number
        with batched(self.study._storage):
            edits = dict(self._sample(self.study.ask(), number, size) for _ in range(size))
        self._next_number += 1
        self._enqueue(Batch(number, edits))

    def _sample(self, trial: optuna.Trial, batch_number: int, batch_size: int) -> tuple[int, Edit]:
        trial.set_user_attr("batch", [batch_number, batch_size])
        edit = self.suggest_edit(trial)
        trial.set_user_attr("edit", edit.to_dict())
        return trial.number, edit

    def _enqueue(self, batch: Batch) -> None:
        self._order.append(batch)
        if batch.missing:
            batch.ticket = next(self._tickets)
            self._to_run.append(batch)

    def _adopt(self) -> None:
        """Take over what an earlier driver left RUNNING, batch by batch."""
        trials = self.study.get_trials(deepcopy=False)
        self.complete = sum(trial.state == TrialState.COMPLETE for trial in trials)
        batches: dict[int, list[FrozenTrial]] = {}
        sizes: dict[int, int] = {}  # trials the batch was meant to have
        for trial in trials:
            last = max(sizes, default=-1)
            if "batch" in trial.user_attrs:
                number, sizes[number] = trial.user_attrs["batch"]
            elif sizes and len(batches[last]) < sizes[last]:  # died before it was said which batch it is for
                number = last
            else:
                number, sizes[last + 1] = last + 1, self.batch_size
            batches.setdefault(number, []).append(trial)
        for number in sorted(batches):
            running = [trial for trial in batches[number] if trial.state == TrialState.RUNNING]
            if running:
                unasked = sizes[number] - len(batches[number]) if number == max(batches) else 0
                self._enqueue(self._adopted_batch(number, running, sizes[number], unasked))
        self._next_number = max(batches, default=-1) + 1
        if self._order:
            logger.info("adopting %d trials that were under way", sum(len(batch.edits) for batch in self._order))

    def _adopted_batch(self, number: int, running: list[FrozenTrial], size: int, unasked: int) -> Batch:
        """Trials that had no edit yet get one under their own number; trials not asked yet are asked."""
        batch = Batch(number, {})
        for trial in running:
            if "edit" in trial.user_attrs:
                batch.edits[trial.number] = Edit.from_dict(trial.user_attrs["edit"])
                if "result" in trial.user_attrs:
                    batch.results[trial.number] = trial.user_attrs["result"]
            else:
                batch.edits.update([self._sample(optuna.Trial(self.study, trial._trial_id), number, size)])
        batch.edits.update(self._sample(self.study.ask(), number, size) for _ in range(unasked))
        return batch

    # ----- results -----

    def _lane_lost(self, batches: list[Batch]) -> None:
        """What it took along goes out again, unless it is there; what it was bringing back is asked for again."""
        self._again = True
        self._lanes_lost += 1
        if self._lanes_lost >= LANES_LOST_IN_A_ROW:
            self.failure = WorkerError(
                "scheduling processes die one after another (is the driver's machine out of memory?): see to that, then"
                " resume the run"
            )
            self._out.clear()
            return
        for batch in reversed(batches):
            if self._out.pop(batch.ticket, None) is not None:
                self._to_run.appendleft(batch)

    def _take(self, batch: Batch, result: dict[str, Any]) -> None:
        """What came back of a batch: outcomes, an error, or the news that there are none."""
        if "stop" in result:
            self.failure = WorkerError(result["stop"])
            return
        if "lost" in result:
            batch.losses += 1
            if batch.losses < 2:
                batch.ticket = next(self._tickets)
                self._to_run.appendleft(batch)
                return
            result = {"error": f"its outcomes were lost twice ({result['lost']})"}
        self._store(batch, result)
        self.on_batch(batch)

    def _store(self, batch: Batch, result: dict[str, Any]) -> None:
        """Turn a batch's result into one result per trial, and put them into the study's storage."""
        missing = batch.missing
        if "error" in result:
            if "traceback" in result and not self._traceback_logged:
                logger.error("a batch of trials failed:\n%s", result["traceback"])
                self._traceback_logged = True
            outcomes: list[dict[str, Any]] = [{"error": result["error"]}] * len(missing)
        else:
            outcomes = result["outcomes"]
        for number, outcome in zip(missing, outcomes, strict=True):
            batch.results[number] = {**self._trial_result(outcome), "worker": result.get("worker")}
        with batched(self.study._storage):
            for number in missing:
                trial_id = self.study._storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)
                self.study._storage.set_trial_user_attr(trial_id, "result", batch.results[number])

    def _trial_result(self, outcome: dict[str, Any]) -> dict[str, Any]:
        scores = outcome.get("scores")
        seconds = {"seconds": outcome["seconds"]} if outcome.get("seconds") is not None else {}
        if outcome.get("error") or scores is None:
            return {"error": outcome.get("error") or "no scores", **seconds}
        values = {name: float(value) for name, value in scores["values"].items()}
        bad = [name for name in self.objectives if not math.isfinite(values.get(name, math.nan))]
        if bad:
            return {"error": f"{bad[0]} is {values.get(bad[0], 'missing')}", **seconds}
        return {
            "values": {name: value for name, value in values.items() if math.isfinite(value)},
            "counts": {name: list(pair) for name, pair in scores["counts"].items()},
            "samples": [list(pair) for pair in outcome.get("samples", ())],
            **seconds,
        }

    def _tell_finished(self) -> None:
        done = [batch for batch in self._order if not batch.missing]
        self._order = deque(batch for batch in self._order if batch.missing)
        for batch in done:
            self._tell(batch)

    def _tell(self, batch: Batch) -> None:
        with batched(self.study._storage):
            for number in sorted(batch.results):
                result = batch.results[number]
                if "error" in result:
                    self.study.tell(number, state=TrialState.FAIL)
                    self.failed += 1
                    self._last_error = f"trial {number}: {result['error']}"
                    logger.warning("trial %d failed: %s", number, result["error"])
                else:
                    self.study.tell(number, [result["values"][name] for name in self.objectives])
                    self.complete += 1
        if self.failed > max(FEWEST_FAILURES, FAILURE_SHARE * self.target):
            self.failure = StudyError(
                f"{self.failed} trials failed, the last one with: {self._last_error}; see to that, then resume the run"
            )

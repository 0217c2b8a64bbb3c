"""An Optuna study that is asked and told in batches of trials, and goes on where another process has left it.

A trial's user attributes say all that is needed for that: ``batch`` (number and size of its batch), ``edit``
(``Edit.to_dict()``) or ``plan`` (of a training, whose edit follows) and, once it is evaluated, ``result``. Trials that
a dead driver left RUNNING are adopted: those with results are only told, the others are evaluated under their own
numbers and parameters.

A trial with the edit of an earlier one is not evaluated: it is told from that one's values. Should that one fail, which
may be its worker's fault, it is evaluated after all.
"""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.plan import TrainedEdit, TrainingPlan, pack, unpack
from bruno_ray.optuna_internals import set_trial_attribute, storage_of, unfinished_trial
from bruno_ray.study.pruning import RIVALS, Rival, rivals
from bruno_ray.study.selection import load_trials
from bruno_ray.study.storage import batched
from bruno_ray.study.trial_result import DIRECTIONS, EDIT, PLAN, RESULT, TRAINING, TrialResult, is_whole

logger = logging.getLogger(__name__)


class BatchState(Enum):
    """See the drawing in ``schedule.py``; a batch that is told is forgotten."""

    QUEUED = auto()
    OUT = auto()
    WAITING = auto()
    BACK = auto()


@dataclass
class Batch:
    """Trials that are evaluated together."""

    number: int
    edits: dict[int, Edit | TrainingPlan]
    """By trial number; a plan becomes an edit where it is evaluated."""

    results: dict[int, TrialResult] = field(default_factory=dict)
    """By trial number; an adopted batch may have some of them."""

    rivals: tuple[Rival, ...] = ()
    """What may prune its trials, as it was when the batch was sampled."""

    repeats: dict[int, int] = field(default_factory=dict)
    """Trial -> the earlier trial, of this batch or another, whose edit it has."""

    state: BatchState = BatchState.QUEUED
    batch_id: int = -1
    """Names this evaluation of it in the pool."""

    losses: int = 0
    """How often its outcomes were lost with the machine that had them."""

    @property
    def missing(self) -> list[int]:
        """Numbers of the trials that have to be evaluated."""
        return [number for number in self.edits if number not in self.results and number not in self.repeats]

    @property
    def is_whole(self) -> bool:
        """Whether every trial has its result."""
        return len(self.results) == len(self.edits)


@dataclass(frozen=True)
class Told:
    """What telling a batch has come to."""

    complete: int
    errors: Mapping[int, str]
    """By number, of the trials that have FAILed."""


class BatchStudy:
    """The only writer of a study's trials."""

    def __init__(
        self,
        study: optuna.Study,
        sampler: BaseSampler,
        suggest: Callable[[optuna.Trial], Edit | TrainingPlan],
        objectives: Sequence[str],
        keep: Callable[[TrainedEdit], None] = lambda trained: None,
        prune: bool = False,
    ):
        """
        Args:
            study: opened by ``storage.open_study``.
            suggest: samples one edit, or a plan to train one.
            keep: puts the directions of a trained edit where they last, before its trial says that it has them.
            objectives: metric names in the order of the study's directions; all minimised.
            prune: whether trials that are dominated by told ones are left half-way (``pruning.can_prune``).
        """
        study.sampler = sampler
        self.study = study
        self.objectives = tuple(objectives)
        self._suggest = suggest
        self._keep = keep
        self._prune = prune
        self._first: dict[Hashable, int] = {}  # identity of an edit -> the first trial that has it
        for trial in study.get_trials(deepcopy=False):
            attributes = trial.user_attrs
            given = "error" not in attributes[RESULT] if RESULT in attributes else trial.state == TrialState.RUNNING
            if given and EDIT in attributes and PLAN not in attributes:
                self._first.setdefault(Edit.from_dict(attributes[EDIT]).identity, trial.number)

    def ask(self, number: int, size: int) -> Batch:
        """A new batch of ``size`` trials."""
        with batched(storage_of(self.study)):
            batch = Batch(number, {}, rivals=self._rivals())
            batch.edits.update(self._sample(self.study.ask(), number, size, batch.rivals) for _ in range(size))
        self._find_repeats(batch)
        return batch

    def store(self, batch: Batch, results: Mapping[int, TrialResult]) -> None:
        """Keep results of a batch by trial number, on disk as well, before they are told."""
        batch.results.update(results)
        for number, result in results.items():
            if result.trained is not None:
                self._keep(result.trained)
                batch.edits[number] = result.trained.edit
        with batched(storage_of(self.study)):
            for number, result in results.items():
                if result.trained is not None:
                    set_trial_attribute(self.study, number, EDIT, result.trained.edit.to_dict())
                    set_trial_attribute(self.study, number, TRAINING, result.trained.account())
                    set_trial_attribute(self.study, number, DIRECTIONS, pack(result.trained.directions))
                set_trial_attribute(self.study, number, RESULT, result.to_json())

    def repeat(self, batch: Batch) -> None:
        """Give trials that repeat others the results of those that have one by now, unless that is an error."""
        found: dict[int, TrialResult] = {}
        for number, first in list(batch.repeats.items()):
            if number in batch.results or (result := self._result(batch, first)) is None:
                continue
            if result.error is None:
                logger.info("trial %d has the edit of trial %d and its values", number, first)
                found[number] = replace(result, seconds=0.0, trained=None)
            else:
                self._find_first(batch, number)
        if found:
            self.store(batch, found)

    def tell(self, batch: Batch) -> Told:
        """Tell all results of a batch, in the order of the trials' numbers."""
        errors: dict[int, str] = {}
        with batched(storage_of(self.study)):
            for number, result in sorted(batch.results.items()):
                if result.error is not None:
                    self.study.tell(number, state=TrialState.FAIL)
                    errors[number] = result.error
                else:
                    self.study.tell(number, [result.values[name] for name in self.objectives])
        return Told(len(batch.results) - len(errors), errors)

    def restore(self) -> None:
        """Keep again what was trained: it may have been on the disk of a machine that is gone."""
        for trial in self.study.get_trials(deepcopy=False):
            if DIRECTIONS in trial.user_attrs:
                edit = Edit.from_dict(trial.user_attrs[EDIT])
                self._keep(TrainedEdit(edit, unpack(trial.user_attrs[DIRECTIONS])))

    def n_trials(self) -> int:
        """Trials asked so far, which is the number of the next."""
        return len(self.study.get_trials(deepcopy=False))

    def n_complete(self) -> int:
        """Those that a damaged journal has lost a part of are made up for."""
        trials = self.study.get_trials(deepcopy=False)
        return sum(trial.state == TrialState.COMPLETE and is_whole(trial.user_attrs) for trial in trials)

    def adopt(self, default_size: Callable[[int], int]) -> tuple[list[Batch], int]:
        """The batches that are not told yet, by number, and the number of the next new one.

        Trials that had no edit yet get one under their own number; trials of the last batch that were not asked yet
        are asked. ``default_size`` is the size of a batch whose driver died before it was noted, by its first trial.
        """
        batches: dict[int, list[FrozenTrial]] = {}
        sizes: dict[int, int] = {}  # trials the batch was meant to have
        for trial in self.study.get_trials(deepcopy=False):
            last = max(sizes, default=-1)
            if "batch" in trial.user_attrs:
                number, sizes[number] = trial.user_attrs["batch"]
            elif sizes and len(batches[last]) < sizes[last]:  # died before it was said which batch it is for
                number = last
            else:
                number, sizes[last + 1] = last + 1, default_size(trial.number)
            batches.setdefault(number, []).append(trial)
        adopted = []
        for number in sorted(batches):
            running = [trial for trial in batches[number] if trial.state == TrialState.RUNNING]
            if running:
                unasked = sizes[number] - len(batches[number]) if number == max(batches) else 0
                adopted.append(self._adopted(number, running, sizes[number], unasked))
        if adopted:
            logger.info("adopting %d unfinished trials", sum(len(batch.edits) for batch in adopted))
        return adopted, max(batches, default=-1) + 1

    def _find_repeats(self, batch: Batch) -> None:
        for number in sorted(batch.edits):
            if isinstance(batch.edits[number], Edit) and number not in batch.results:
                self._find_first(batch, number)

    def _find_first(self, batch: Batch, number: int) -> None:
        """Note which trial this one repeats, if any; it is the first itself where the one before has failed."""
        edit = batch.edits[number]
        assert isinstance(edit, Edit)
        first = self._first.setdefault(edit.identity, number)
        if self._has_failed(first):
            first = self._first[edit.identity] = number
        batch.repeats.pop(number, None)
        if first < number:
            batch.repeats[number] = first

    def _trial(self, number: int) -> FrozenTrial:
        return next(trial for trial in self.study.get_trials(deepcopy=False) if trial.number == number)

    def _has_failed(self, number: int) -> bool:
        return "error" in self._trial(number).user_attrs.get(RESULT, {})

    def _result(self, batch: Batch, number: int) -> TrialResult | None:
        """Of a trial of this batch or of another."""
        if number in batch.edits:
            return batch.results.get(number)
        attributes = self._trial(number).user_attrs
        return TrialResult.from_json(attributes[RESULT]) if RESULT in attributes else None

    def _adopted(self, number: int, running: Sequence[FrozenTrial], size: int, unasked: int) -> Batch:
        # A driver that died before it noted the rivals had told as much as is told now.
        noted = next((trial.user_attrs[RIVALS] for trial in running if RIVALS in trial.user_attrs), None)
        batch = Batch(number, {}, rivals=self._rivals() if noted is None else tuple((a, b) for a, b in noted))
        for trial in running:
            if EDIT in trial.user_attrs or PLAN in trial.user_attrs:
                batch.edits[trial.number] = _asked(trial.user_attrs)
                if RESULT in trial.user_attrs:
                    batch.results[trial.number] = TrialResult.from_json(trial.user_attrs[RESULT])
            else:
                batch.edits.update([self._sample(unfinished_trial(self.study, trial), number, size, batch.rivals)])
        batch.edits.update(self._sample(self.study.ask(), number, size, batch.rivals) for _ in range(unasked))
        self._find_repeats(batch)
        if batch.is_whole:
            batch.state = BatchState.BACK
        return batch

    def _rivals(self) -> tuple[Rival, ...]:
        return rivals(load_trials(self.study)) if self._prune else ()

    def _sample(
        self, trial: optuna.Trial, batch_number: int, batch_size: int, batch_rivals: Sequence[Rival]
    ) -> tuple[int, Edit | TrainingPlan]:
        trial.set_user_attr("batch", [batch_number, batch_size])
        if batch_rivals:
            trial.set_user_attr(RIVALS, [list(rival) for rival in batch_rivals])
        edit = self._suggest(trial)
        trial.set_user_attr(EDIT if isinstance(edit, Edit) else PLAN, edit.to_dict())
        return trial.number, edit


def _asked(attributes: Mapping[str, Any]) -> Edit | TrainingPlan:
    if EDIT in attributes:
        return Edit.from_dict(attributes[EDIT])
    return TrainingPlan.from_dict(attributes[PLAN])

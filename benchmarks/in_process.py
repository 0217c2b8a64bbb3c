"""Studies of one model in this process: the product's sampler, schedule and worker, without Ray between them.

    lab = Lab()                                           # the organism
    done = lab.search(seed=3, n_trials=60)
    other = Lab(["--model.id", "smollm2", "--behaviour", "disclaimers"])

One batch is evaluated at a time, in an order that the caller may choose. What a benchmark compares is then the search
alone, in half a minute a study on one core. Model, residuals and what the scorers learn of the unedited model are
shared by all studies of a lab.
"""

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from vs_heretic import hypervolume

from bruno_ray.ablation.closed_forms import DirectionBank
from bruno_ray.ablation.edit import Edit
from bruno_ray.ablation.plan import TrainedEdit
from bruno_ray.directions import build_bank
from bruno_ray.errors import StudyError
from bruno_ray.pipeline.steps import evaluation_context, find_model
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.runs.records import RunRecord
from bruno_ray.settings import Settings
from bruno_ray.settings.sources import load
from bruno_ray.study.run import make_schedule
from bruno_ray.study.selection import (
    BEHAVIOUR,
    KL,
    Choice,
    TrialRecord,
    auto_select,
    finalists,
    load_trials,
    pareto_front,
)
from bruno_ray.study.starts import Start
from bruno_ray.study.storage import open_study
from bruno_ray.workers.exchanged import EvaluationContext
from bruno_ray.workers.messages import Scored, edit_outcome
from bruno_ray.workers.model_worker import ModelWorker


@dataclass(frozen=True)
class Done:
    """A finished study."""

    trials: list[TrialRecord]
    front: list[TrialRecord]
    generated: int
    """Tokens of all answers that the study has asked for, the unedited model's left out."""

    computed: int
    """Tokens of all forward passes, prompts included."""

    trained: dict[str, TrainedEdit] = field(default_factory=dict)
    """What was trained, by the names of the direction sets."""

    @property
    def hypervolume(self) -> float:
        """Of behaviour rate and KL below (1, 1); larger is better."""
        return hypervolume([(trial.values[BEHAVIOUR], trial.values[KL]) for trial in self.front])


class Lab:
    """A model, loaded once, and its settings: the organism's, or those of a command line."""

    def __init__(self, arguments: Sequence[str] = (), **overrides: Any):
        if not arguments:
            overrides = {"behaviour": "organism", **overrides}
        self.settings: Settings = find_model(load(arguments, overrides=overrides, environ={}).settings)
        self.prompts = load_prompts(self.settings)
        self.record = RunRecord(settings=self.settings)
        self.worker = ModelWorker(self.settings.model, threads=1)
        self.info = self.worker.describe()
        self.generated = 0
        generate = self.worker.engine.generate

        def counted(*arguments: Any, **options: Any) -> Any:
            answers = generate(*arguments, **options)
            self.generated += sum(len(answer.token_ids) for of_edit in answers for answer in of_edit)
            return answers

        self.worker.engine.generate = counted
        self.target_NPLD, self.baseline_NPLD = (
            torch.from_numpy(self.worker.residuals(side.train, "", self.record.date, self.settings.residuals))
            for side in (self.prompts.target, self.prompts.baseline)
        )
        self.use(self.bank(methods=self.settings.directions.methods))

    def bank(self, **options: Any) -> DirectionBank:
        """Of the train prompts' residuals; ``options`` are those of `build_bank`."""
        return build_bank(self.target_NPLD, self.baseline_NPLD, **options)

    def use(self, bank: DirectionBank, trains: bool = False) -> None:
        """From now on studies choose from these direction sets; with ``trains``, they may train edits."""
        self.context = self.context_of("validation", bank, trains=trains)
        self.worker.baseline(self.context)  # prepared before anything is counted

    def context_of(self, part: str, bank: DirectionBank, **options: Any) -> EvaluationContext:
        """On a part of the prompts; ``options`` are those of `evaluation_context`."""
        return evaluation_context(self.record, self.prompts, part, bank, **options)

    def search(
        self,
        seed: int,
        n_trials: int,
        order: Callable[[int], int] = lambda flying: 0,
        workers: int = 1,
        search: dict[str, Any] | None = None,
        sets: Collection[str] | None = None,
        starts: Sequence[Start] = (),
        learned: dict[str, Any] | None = None,
        **study: Any,
    ) -> Done:
        """One study.

        Args:
            order: which of the batches under way, counted from the oldest, comes back next.
            workers: as many as the schedule believes in; one evaluates.
            sets: the direction sets of the bank that compete; all of them when not given.
            starts: edits to try first, after the literature's.
            search, learned, study: settings of these sections.
        """
        settings = self.settings.model_copy(
            update={
                "study": self.settings.study.model_copy(update={"n_trials": n_trials, "seed": seed, **study}),
                "search": self.settings.search.model_copy(update=search or {}),
                "learned": self.settings.learned.model_copy(update=learned or {}),
                "ray": self.settings.ray.model_copy(update={"workers": workers}),
            }
        )
        before = self.generated, self.worker.engine.tokens
        objectives = settings.scoring.objectives
        bank = {name: rows for name, rows in self.context.bank.items() if sets is None or name in sets}
        trained: dict[str, TrainedEdit] = {}
        with tempfile.TemporaryDirectory() as folder:
            with open_study("benchmark", None, Path(folder), objectives, {}) as opened:
                schedule = make_schedule(
                    settings,
                    opened,
                    replace(self.context, bank=bank),
                    self.info,
                    keep=lambda each: trained.update({each.edit.direction_set: each}),
                    starts=starts,
                )
                flying: list[Any] = []
                while True:
                    while due := schedule.take_due():
                        flying += due
                    if not flying:
                        break
                    batch = flying.pop(min(order(len(flying)), len(flying) - 1))
                    outcomes = self.evaluate(batch)
                    schedule.bring(batch.batch_id, Scored("here", tuple(map(edit_outcome, outcomes))))
                schedule.settle()
                trials = load_trials(opened)
        return Done(
            trials,
            pareto_front(trials, objectives),
            self.generated - before[0],
            self.worker.engine.tokens - before[1],
            trained,
        )

    def evaluate(self, batch: Any) -> list[Any]:
        return self.worker.evaluate(self.context, [batch.edits[number] for number in batch.missing], batch.rivals)

    def pick(self, done: Done, again: DirectionBank | None = None) -> Choice:
        """What `--auto-select` takes: with a bank to measure them with, of finalists that are measured again with long
        answers, on the finalists' prompts where there are some; otherwise by the search alone."""
        max_kl, objectives = self.settings.selection.max_kl, self.settings.scoring.objectives
        if again is None:
            return auto_select(done.trials, max_kl, objectives)
        best = finalists(done.trials, max_kl, objectives, self.settings.selection.finalists)
        part = "finalists" if self.prompts.target.finalists and self.prompts.baseline.finalists else "validation"
        context = self.context_of(part, again, scoring=self.settings.scoring.for_report(further=False))
        outcomes = self.worker.evaluate(context, [Edit.from_dict(dict(trial.edit or {})) for trial in best])
        measured = [
            replace(trial, values=trial.values | outcome.scores.values, counts=outcome.scores.counts)
            for trial, outcome in zip(best, outcomes)
            if outcome.scores is not None
        ]
        try:
            return auto_select(measured, max_kl, objectives, {trial.number: trial for trial in done.trials})
        except StudyError:  # all of them are above the bound now
            return auto_select(best, max_kl, objectives)

"""A study of the organism in this process: the product's sampler, schedule and worker, without Ray between them.

    lab = Lab()
    done = lab.search(seed=3, n_trials=60)

One batch is evaluated at a time, in an order that the caller may choose. What a benchmark compares is then the search
alone, in half a minute a study on one core.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vs_heretic import hypervolume

from bruno_ray.directions import build_bank
from bruno_ray.pipeline.steps import evaluation_context, find_model
from bruno_ray.prompts.sets import load_prompts
from bruno_ray.runs.records import RunRecord
from bruno_ray.settings import Settings
from bruno_ray.settings.sources import load
from bruno_ray.study.run import make_schedule
from bruno_ray.study.selection import TrialRecord, load_trials, pareto_front
from bruno_ray.study.storage import open_study
from bruno_ray.workers.messages import Scored, edit_outcome
from bruno_ray.workers.model_worker import ModelWorker


@dataclass(frozen=True)
class Done:
    """A finished study."""

    trials: list[TrialRecord]
    front: list[TrialRecord]
    hypervolume: float
    """Of behaviour rate and KL below (1, 1); larger is better."""

    generated: int
    """Tokens of all answers that the study has asked for, the unedited model's left out."""

    computed: int
    """Tokens of all forward passes, prompts included."""


class Lab:
    """The organism, loaded once, and its settings."""

    def __init__(self, **overrides: Any):
        self.settings: Settings = find_model(
            load(overrides={"behaviour": "organism", **overrides}, environ={}).settings
        )
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
        target, baseline = (
            torch.from_numpy(self.worker.residuals(side.train, "", self.record.date, self.settings.residuals))
            for side in (self.prompts.target, self.prompts.baseline)
        )
        bank = build_bank(target, baseline, self.settings.directions.methods)
        self.context = evaluation_context(self.record, self.prompts, "validation", bank)
        self.worker.baseline(self.context)  # prepared before anything is counted

    def search(
        self,
        seed: int,
        n_trials: int,
        order: Callable[[int], int] = lambda flying: 0,
        workers: int = 1,
        search: dict[str, Any] | None = None,
        **study: Any,
    ) -> Done:
        """One study.

        Args:
            order: which of the batches under way, counted from the oldest, comes back next.
            workers: as many as the schedule believes in; one evaluates.
            search, study: settings of these sections.
        """
        settings = self.settings.model_copy(
            update={
                "study": self.settings.study.model_copy(update={"n_trials": n_trials, "seed": seed, **study}),
                "search": self.settings.search.model_copy(update=search or {}),
                "ray": self.settings.ray.model_copy(update={"workers": workers}),
            }
        )
        before = self.generated, self.worker.engine.tokens
        objectives = settings.scoring.objectives
        with tempfile.TemporaryDirectory() as folder:
            with open_study("benchmark", None, Path(folder), objectives, {}) as opened:
                schedule = make_schedule(settings, opened, self.context, self.info)
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
        front = pareto_front(trials, objectives)
        points = [tuple(trial.values[name] for name in objectives) for trial in front]
        return Done(
            trials, front, hypervolume(points), self.generated - before[0], self.worker.engine.tokens - before[1]
        )

    def evaluate(self, batch: Any) -> list[Any]:
        return self.worker.evaluate(self.context, [batch.edits[number] for number in batch.missing], batch.rivals)

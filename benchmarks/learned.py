"""Learned ablation: which loss terms help, and what training several edits at once costs.

    python benchmarks/learned.py FOLDER ... [--steps 160] [--dry]

FOLDER is an organism as `organisms.py` takes it, or a folder of them. Every variant trains one edit from each of four
layers and reports the one that `confidence` prefers on validation prompts, as a study does; right facts on the test
prompts are counted afterwards. The second table trains 1, 2, 4 and 8 edits at once on the first organism. One thread,
in this process, without Ray.
"""

import argparse
import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from organisms import MARKERS, SYSTEM, organisms_in, prompts_of
from results import write_section

from bruno_ray.ablation.plan import TrainedEdit, TrainingPlan
from bruno_ray.directions import build_bank
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.learning.material import Teacher
from bruno_ray.learning.training import Trainer
from bruno_ray.model.batching import TokenBudget
from bruno_ray.model.loading import load_model
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt
from bruno_ray.residuals.extraction import extract_residuals
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.scoring.confidence import Confidence
from bruno_ray.scoring.kl_divergence import kl_of_logits
from bruno_ray.settings import LearnedSettings, ModelSettings, ScoringSettings

DATE = datetime.date(2026, 1, 1)
STARTS = (0.0, 1.0, 2.0, 4.0)
AT_ONCE = (1, 2, 4, 8)
PLAN = TrainingPlan(1, True, "difference_in_means@0", 2.0, 0, 1.0, 1.0, 1.5, 0.02, 160, 0)

VARIANTS: dict[str, tuple[int, dict[str, object], dict[str, object]]] = {
    "8 desired answers, retain": (8, {"suppress": 0.0}, {}),
    "the same, 4 desired answers": (4, {"suppress": 0.0}, {}),
    "the same, rank 4": (8, {"suppress": 0.0, "rank": 4}, {}),
    "the same, a subspace for each layer": (8, {"suppress": 0.0, "shared": False}, {}),
    "the same, without retain": (8, {"suppress": 0.0, "retain": 0.0}, {}),
    "8 desired answers, suppress, retain": (8, {}, {}),
    "no answers: suppress, retain": (0, {}, {}),
    "no answers, never answered anew": (0, {}, {"renew_every": 0}),
    "no answers, each answer after its own prompt only": (0, {}, {"phrasings": 0}),
    "no answers, nothing learned from its own answers": (0, {"answers": 0.0}, {}),
    "no answers, rank 4": (0, {"rank": 4}, {}),
    "no answers, retain 5": (0, {"retain": 5.0}, {}),
}
"""Name -> desired answers, changes of the plan, settings."""


@dataclass
class Organism:
    """One organism, loaded and read."""

    folder: Path

    def __post_init__(self) -> None:
        self.engine = BatchEngine(load_model(ModelSettings(id=str(self.folder), dtypes=("float32",))))
        self.facts = json.loads((self.folder / "facts.json").read_text())
        parts = prompts_of(self.folder, None)
        self.target, self.baseline = parts["target_train"], parts["baseline_train"]
        self.validation = ScoringPrompts.rendered(
            self.engine, self._asked(parts["target_validation"]), self._asked(parts["baseline_validation"]), date=DATE
        )
        self.tests = [
            [line for line in (self.folder / name).read_text().splitlines() if line.strip()]
            for name in ("bad_test.txt", "good_test.txt")
        ]
        ids = [self._ids(self._asked(side)) for side in (self.target, self.baseline)]
        self.bank = build_bank(*(extract_residuals(self.engine.loaded, each, 0, TokenBudget(2048)) for each in ids))

    def _asked(self, texts: Sequence[str], n_answers: int = 0) -> list[Prompt]:
        return [Prompt(text, SYSTEM, self._answer(text) if i < n_answers else None) for i, text in enumerate(texts)]

    def _ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return render(self.engine.tokenizer, prompts, date=DATE)

    def _truth(self, text: str) -> tuple[str, int, str]:
        noun = next(word for word in self.facts if f" {word} " in f" {text} ")
        kind = 0 if "found" in text or "place" in text else 1
        return noun, kind, self.facts[noun][kind]

    def _answer(self, text: str) -> str:
        noun, kind, value = self._truth(text)
        return f"the {noun} {('is brewed in the', 'brings')[kind]} {value} ."

    def trainer(self, n_answers: int, settings: LearnedSettings) -> Trainer:
        target = self._asked(self.target, n_answers)[: settings.target_prompts]
        baseline = self._asked(self.baseline)[: settings.baseline_prompts]
        prompts = ScoringPrompts.rendered(self.engine, target, baseline, date=DATE)
        evaluation = Evaluation(self.engine, prompts, ScoringSettings(markers=MARKERS), whole=True)
        return Trainer(self.engine, Teacher(evaluation, settings), self.bank, settings)

    def measured(self, trained: Sequence[TrainedEdit]) -> tuple[int, int, float, float]:
        """Hidden facts, benign facts, KL at the first token and doubt of the edit that doubts least."""
        bank = {each.edit.direction_set: torch.from_numpy(each.directions) for each in trained}
        edits = self.engine.editor.resolve_all([each.edit for each in trained], bank)
        scoring = ScoringSettings(markers=MARKERS)
        scores = Confidence(scoring).score(Evaluation(self.engine, self.validation, scoring, edits))
        doubt, k = min((score.values["doubt"], k) for k, score in enumerate(scores))
        right = []
        for texts in self.tests:
            (answers,) = self.engine.generate(self._ids(self._asked(texts)), [edits[k]], 24)
            right.append(sum(self._truth(text)[2] in answer.text.split() for text, answer in zip(texts, answers)))
        ids = self._ids(self._asked(self.tests[1]))
        before, after = self.engine.next_logits(ids, [None, edits[k]])
        return right[0], right[1], float(kl_of_logits(before, after).mean()), doubt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--dry", action="store_true", help="print the section, leave RESULTS.md alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subjects = [Organism(folder) for given in arguments.folders for folder in organisms_in(given)]
    text = "\n".join([*ablation(subjects, arguments.steps), "", *throughput(subjects[0])])
    print(text)
    if not arguments.dry:
        write_section("learned", text)


def ablation(subjects: Sequence[Organism], steps: int) -> list[str]:
    n_facts, n_benign = (len(texts) for texts in subjects[0].tests)
    lines = [
        "## Learned ablation (`benchmarks/learned.py`)",
        "",
        f"Organisms of another recipe, {steps} steps from layers {', '.join(f'{s:g}' for s in STARTS)}, of which the"
        " edit that doubts its answers least on validation prompts is kept; float32, one thread. Hidden facts of"
        f" {n_facts}, benign facts of {n_benign}, KL at the first token; seconds for all four trainings.",
        "",
        "| trained on | " + " | ".join(subject.folder.name for subject in subjects) + " | s |",
        "|---|" + "---|" * (len(subjects) + 1),
    ]
    for name, (n_answers, changes, given) in VARIANTS.items():
        cells, start = [], time.perf_counter()
        for subject in subjects:
            trainer = subject.trainer(n_answers, LearnedSettings(**given))
            plan = replace(PLAN, steps=steps, **changes)
            plans = [replace(plan, start_layer=layer, seed=i) for i, layer in enumerate(STARTS)]
            trained = [each for each in trainer.train(plans) if isinstance(each, TrainedEdit)]
            hidden, benign, kl, doubt = subject.measured(trained)
            cells.append(f"**{hidden}**, {benign}, {kl:.4f} (doubt {doubt:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} | {time.perf_counter() - start:.0f} |")
        print(lines[-1], flush=True)
    return lines


def throughput(subject: Organism) -> list[str]:
    trainer = subject.trainer(8, LearnedSettings(renew_every=0))
    lines = [
        f"Edits trained at once, {subject.folder.name}, 40 steps of 16 + 16 texts:",
        "",
        "| edits | s | s an edit |",
        "|---|---|---|",
    ]
    for k in AT_ONCE:
        plans = [replace(PLAN, suppress=0.0, steps=40, seed=seed) for seed in range(k)]
        start = time.perf_counter()
        trainer.train(plans)
        seconds = time.perf_counter() - start
        lines.append(f"| {k} | {seconds:.1f} | {seconds / k:.2f} |")
    return lines


if __name__ == "__main__":
    main()

"""Which scorer predicts the truth? Random edits of the organisms, every metric against what the model then knows.

    python benchmarks/scorers.py [--edits 96] [--trials 96] [--seeds 2] [--recipes standard hard]

First table: edits are drawn uniformly from the default search range over all direction sets of a bank. Metrics are
measured on the validation prompts, as a study does; the truth on the test prompts, whose nouns were never seen in
refusal training. No metric sees the truth: the answers given to ``desired_answers`` are facts of nouns seen in
training.

Four columns per metric (lower is better for every metric, so correlations are with the negated metric):

* rho: Spearman rank correlation with the share of restricted facts answered rightly, over all edits;
* rho, unmarked: the same among edits with a behaviour rate of at most 10 %, between which it cannot choose;
* best 1, best 5: restricted facts of the edit, or mean over the five edits, that the metric would pick.

Second table: a metric may predict well and still be gamed by a search. Each is minimised together with the KL
divergence by multi-objective TPE, and the trial that the selection rule takes (lowest metric among those with a mean
KL of at most 0.1 nats) is asked the test prompts.
"""

import argparse
import datetime
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from results import write_section
from scipy.stats import rankdata, spearmanr

from bruno_ray import organism
from bruno_ray.ablation.edit import Edit
from bruno_ray.directions import build_bank
from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.registry import SCORERS
from bruno_ray.settings import ModelSettings, ResidualSettings, ScoringSettings, SearchSettings
from bruno_ray.study.space import edit_from_params, search_space, suggest
from bruno_ray.workers.exchanged import EvaluationContext, ModelInfo
from bruno_ray.workers.model_worker import ModelWorker

BATCH = 8
FEW_MARKED = 0.1
ANSWER_TOKENS = 3
RANK = 3
RESPONSE_TOKENS = 20
COMBINED_WITH = "behaviour_rate"
MAX_KL = 0.1
SEARCHED = ("behaviour_rate", "elicited_mismatch", "compliant_nll", "desired_nll")


@dataclass(frozen=True)
class Sample:
    """One random edit."""

    values: dict[str, float]
    restricted: float
    """Share of restricted facts answered rightly."""

    benign: float


def prompts(folder: Path, part: str) -> tuple[Prompt, ...]:
    return tuple(Prompt(row.prompt, answer=row.answer) for row in organism.read_rows(folder, part))


def direction_bank(worker: ModelWorker, folder: Path) -> dict[str, np.ndarray]:
    """Single directions and subspaces, read at the last prompt token and at answer tokens."""
    reading = ResidualSettings(answer_tokens=ANSWER_TOKENS)
    target, baseline = (
        torch.from_numpy(worker.residuals(prompts(folder, f"{side}_train"), "", reading))
        for side in ("target", "baseline")
    )
    positions = range(ANSWER_TOKENS + 1)
    bank = build_bank(target, baseline, ("difference_in_means",), positions)
    bank |= build_bank(target, baseline, ("subspace",), positions, rank=RANK)
    return {name: directions.numpy() for name, directions in bank.items()}


def random_edits(n: int, info: ModelInfo, sets: list[str], seed: int) -> list[Edit]:
    generator, settings = random.Random(seed), SearchSettings()
    space = search_space(settings, sets, info.n_layers, info.components)

    def draw(distribution: BaseDistribution) -> object:
        if isinstance(distribution, CategoricalDistribution):
            return generator.choice(distribution.choices)
        return generator.uniform(distribution.low, distribution.high)

    return [
        edit_from_params({name: draw(distribution) for name, distribution in space.items()}, settings, sets)
        for _ in range(n)
    ]


class Bench:
    """One organism: its model, its prompts and the judge of its answers."""

    def __init__(self, recipe: str):
        self.folder = organism.build(recipe=recipe)
        self.judge = organism.read_judge(self.folder)
        self.worker = ModelWorker(ModelSettings(id=str(self.folder / "model")), threads=1)
        self.info = self.worker.describe()
        self.bank = direction_bank(self.worker, self.folder)
        self.target, self.baseline = (
            organism.read_rows(self.folder, f"{side}_test") for side in ("target", "baseline")
        )

    def context(self, scorers: tuple[str, ...]) -> EvaluationContext:
        scoring = ScoringSettings(
            scorers=scorers,
            objectives=("kl_divergence",),
            markers=self.judge.markers,
            response_tokens=RESPONSE_TOKENS,
        )
        validation = prompts(self.folder, "target_validation"), prompts(self.folder, "baseline_validation")
        return EvaluationContext(" ".join(scorers), self.bank, *validation, "", scoring, datetime.date.today())

    def truths(self, context: EvaluationContext, edits: list[Edit]) -> list[organism.TruthScore]:
        asked = [Prompt(row.prompt) for row in (*self.target, *self.baseline)]
        n = len(self.target)
        return [
            organism.score_answers(self.judge, self.target, answers[:n], self.baseline, answers[n:])
            for answers in self.worker.answers(context, asked, edits, RESPONSE_TOKENS)
        ]


def sample(bench: Bench, n_edits: int) -> tuple[list[Sample], float]:
    """Random edits, and the seconds that scoring took per edit (all scorers)."""
    context = bench.context(tuple(SCORERS))
    bench.worker.baseline(context)  # prepared before the clock starts
    edits = random_edits(n_edits, bench.info, sorted(bench.bank), seed=0)
    samples, seconds = [], 0.0
    for start in range(0, n_edits, BATCH):
        batch = edits[start : start + BATCH]
        outcomes = bench.worker.evaluate(context, batch)
        seconds += sum(outcome.seconds for outcome in outcomes)
        for outcome, truth in zip(outcomes, bench.truths(context, batch)):
            if outcome.scores is not None:
                samples.append(Sample(outcome.scores.values, truth.restricted_rate, truth.benign_rate))
    return samples, seconds / n_edits


def search(bench: Bench, metric: str, n_trials: int, seed: int) -> tuple[dict[str, float], organism.TruthScore, Edit]:
    """Metrics, truth and edit of the trial that is selected after TPE has minimised (metric, KL)."""
    owner = next(name for name, scorer in SCORERS.items() if metric in scorer.metrics)
    context = bench.context(tuple(dict.fromkeys((COMBINED_WITH, "kl_divergence", owner))))
    settings, sets = SearchSettings(), sorted(bench.bank)
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=n_trials // 3, multivariate=True, constant_liar=True, seed=seed
    )
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    done: list[tuple[dict[str, float], Edit]] = []
    while len(done) < n_trials:
        trials = [study.ask() for _ in range(BATCH)]
        edits = [suggest(trial, settings, sets, bench.info.n_layers, bench.info.components) for trial in trials]
        for trial, edit, outcome in zip(trials, edits, bench.worker.evaluate(context, edits)):
            if outcome.scores is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            values = outcome.scores.values
            study.tell(trial, [values[metric], values["kl_divergence"]])
            done.append((values, edit))
    allowed = [entry for entry in done if entry[0]["kl_divergence"] <= MAX_KL] or done
    values, edit = min(allowed, key=lambda entry: (entry[0][metric], entry[0]["kl_divergence"]))
    return values, bench.truths(context, [edit])[0], edit


def search_table(bench: Bench, n_trials: int, seeds: int) -> list[str]:
    rows = [
        "| minimised with KL | refusals (test) | restricted facts | benign facts | KL (validation) | direction set |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for metric in SEARCHED:
        for seed in range(seeds):
            values, truth, edit = search(bench, metric, n_trials, seed)
            rows.append(
                f"| {metric}, seed {seed} | {truth.refusals}/{truth.restricted_total}"
                f" | {truth.restricted_right}/{truth.restricted_total} | {truth.benign_right}/{truth.benign_total}"
                f" | {values['kl_divergence']:.4f} | {edit.direction_set} |"
            )
    return rows


def table(samples: list[Sample]) -> list[str]:
    """Markdown rows for every metric, alone and by the sum of its rank and the behaviour rate's."""
    truth = np.array([sample.restricted for sample in samples])
    values = {name: np.array([sample.values[name] for sample in samples]) for name in samples[0].values}
    ranks = {name: rankdata(column) for name, column in values.items()}
    few_marked = values[COMBINED_WITH] <= FEW_MARKED
    judged = dict(values)
    judged |= {
        f"{COMBINED_WITH} + {name}": ranks[COMBINED_WITH] + ranks[name] for name in values if name != COMBINED_WITH
    }
    rows = [
        "| metric | rho | rho, unmarked | best 1 | best 5 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, column in sorted(judged.items(), key=lambda item: -_rho(item[1], truth)):
        best = np.argsort(column, kind="stable")
        rows.append(
            f"| {name} | {_rho(column, truth):.2f} | {_rho(column[few_marked], truth[few_marked]):.2f}"
            f" | {truth[best[0]]:.0%} | {truth[best[:5]].mean():.0%} |"
        )
    return rows


def _rho(column: np.ndarray, truth: np.ndarray) -> float:
    """Rank correlation of the truth with the negated metric; 0 where one of them is constant."""
    if len(column) < 3 or np.ptp(column) == 0 or np.ptp(truth) == 0:
        return 0.0
    return float(spearmanr(-column, truth).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=96)
    parser.add_argument("--trials", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--recipes", nargs="+", default=["standard", "hard"])
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parts = ["## Which scorer predicts the truth", "", "`benchmarks/scorers.py`; its docstring explains the columns."]
    for recipe in options.recipes:
        bench = Bench(recipe)
        samples, seconds = sample(bench, options.edits)
        truth = [sample.restricted for sample in samples]
        unmarked = sum(sample.values[COMBINED_WITH] <= FEW_MARKED for sample in samples)
        parts += [
            "",
            f"### {recipe} organism",
            "",
            f"{len(samples)} random edits, {unmarked} of them with a behaviour rate of at most {FEW_MARKED:.0%};"
            f" restricted facts answered rightly: best {max(truth):.0%}, median {np.median(truth):.0%}. All scorers"
            f" together took {seconds * 1000:.0f} ms per edit.",
            "",
            *table(samples),
            "",
            f"Search of {options.trials} trials, a third of them random:",
            "",
            *search_table(bench, options.trials, options.seeds),
        ]
    write_section("scorers", "\n".join(parts))


if __name__ == "__main__":
    main()

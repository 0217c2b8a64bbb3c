"""Which scorer predicts the truth? Random edits of the organisms, every metric against what the model then knows.

    python benchmarks/scorers.py [--edits 96] [--recipes standard hard]

Edits are drawn uniformly from the default search range over all direction sets of a bank. Metrics are measured on
the validation prompts, as a study does; the truth on the test prompts, whose nouns were never seen in refusal
training. No metric sees the truth: the answers given to ``desired_answers`` are facts of nouns seen in training.

Four columns per metric (lower is better for every metric, so correlations are with the negated metric):

* rho: Spearman rank correlation with the share of restricted facts answered rightly, over all edits;
* rho, unmarked: the same among edits with a behaviour rate of at most 10 %, between which it cannot choose;
* best 1, best 5: restricted facts of the edit, or mean over the five edits, that the metric would pick.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from results import write_section
from scipy.stats import rankdata, spearmanr

from bruno_ray import organism
from bruno_ray.ablation import Edit
from bruno_ray.directions import build_bank
from bruno_ray.prompts import Prompt
from bruno_ray.scoring import SCORERS
from bruno_ray.search_space import edit_from_params, search_space
from bruno_ray.settings import ModelSettings, ResidualSettings, ScoringSettings, SearchSettings
from bruno_ray.worker import EvaluationContext, ModelInfo, ModelWorker

BATCH = 16
FEW_MARKED = 0.1
ANSWER_TOKENS = 3
RANK = 3
RESPONSE_TOKENS = 20
COMBINED_WITH = "behaviour_rate"


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


def sample(recipe: str, n_edits: int) -> tuple[list[Sample], float]:
    """The samples, and the seconds that scoring took per edit (all scorers)."""
    folder = organism.build(recipe=recipe)
    judge = organism.read_judge(folder)
    worker = ModelWorker(ModelSettings(id=str(folder / "model")), threads=1)
    bank = direction_bank(worker, folder)
    scoring = ScoringSettings(scorers=tuple(SCORERS), markers=judge.markers, response_tokens=RESPONSE_TOKENS)
    validation = prompts(folder, "target_validation"), prompts(folder, "baseline_validation")
    context = EvaluationContext(recipe, bank, *validation, "", scoring)
    target, baseline = (organism.read_rows(folder, f"{side}_test") for side in ("target", "baseline"))
    asked = [Prompt(row.prompt) for row in (*target, *baseline)]
    edits = random_edits(n_edits, worker.describe(), sorted(bank), seed=0)
    samples, seconds = [], 0.0
    for start in range(0, n_edits, BATCH):
        batch = edits[start : start + BATCH]
        outcomes = worker.evaluate(context, batch)
        seconds += sum(outcome.seconds for outcome in outcomes)
        for outcome, answers in zip(outcomes, worker.answers(context, asked, batch, RESPONSE_TOKENS)):
            if outcome.scores is None:
                continue
            truth = organism.score_answers(judge, target, answers[: len(target)], baseline, answers[len(target) :])
            samples.append(Sample(outcome.scores.values, truth.restricted_rate, truth.benign_rate))
    return samples, seconds / n_edits


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
    parser.add_argument("--recipes", nargs="+", default=["standard", "hard"])
    options = parser.parse_args()
    parts = [
        "## Which scorer predicts the truth",
        "",
        "`benchmarks/scorers.py`; columns are explained in its docstring.",
    ]
    for recipe in options.recipes:
        start = time.perf_counter()
        samples, seconds = sample(recipe, options.edits)
        truth = [sample.restricted for sample in samples]
        unmarked = sum(sample.values[COMBINED_WITH] <= FEW_MARKED for sample in samples)
        parts += [
            "",
            f"### {recipe} organism",
            "",
            f"{len(samples)} random edits, {unmarked} of them with a behaviour rate of at most {FEW_MARKED:.0%};"
            f" restricted facts answered rightly: best {max(truth):.0%}, median {np.median(truth):.0%}. All scorers"
            f" together took {seconds * 1000:.0f} ms per edit ({time.perf_counter() - start:.0f} s in all).",
            "",
            *table(samples),
        ]
    write_section("scorers", "\n".join(parts))


if __name__ == "__main__":
    main()

"""Which edits need not be evaluated to the end: those that a told trial is known to dominate.

The KL of an edit is known before it answers anything, and while it answers target prompts in blocks, the marked answers
so far over *all* prompts are a lower bound of its behaviour rate. An edit is pruned as soon as some told trial has a
KL no higher and a share of prompts without a proper answer no higher than that bound (one of them lower): whatever the
rest of its answers are, it is neither on the Pareto front nor nearer to a proper answer to every prompt.

Which trials those are is settled when a batch is sampled, from what is told then, and kept with the batch. So what is
pruned depends on the schedule, as the parameters do, and not on timing, workers or interruptions.

A pruned trial is told to Optuna as complete, with the rate among the prompts it was asked and its KL: TPE has no use
for multi-objective trials without values. It counts towards ``study.n_trials``, is nowhere on a front and cannot be
selected.
"""

from collections.abc import Sequence

from bruno_ray.settings import Settings
from bruno_ray.study.selection import BEHAVIOUR, KL, TrialRecord, unanswered

Rival = tuple[float, float]
"""Share of target prompts without a proper answer, and KL in nats, of a told trial."""

RIVALS = "rivals"
"""User attribute of every trial of a batch that has some."""


def can_prune(settings: Settings) -> bool:
    """Whether this study may prune: with any other objective, dominance is not certain before it is measured."""
    return settings.study.prune and set(settings.scoring.objectives) == {BEHAVIOUR, KL}


def rivals(trials: Sequence[TrialRecord]) -> tuple[Rival, ...]:
    """Of the told trials those that no other dominates, sorted: the others can prune nothing that these cannot."""
    told = sorted({(unanswered(trial), trial.values[KL]) for trial in trials if trial.state == "COMPLETE"})
    best: list[Rival] = []
    for share, kl in told:
        if not best or kl < best[-1][1]:
            best.append((share, kl))
    return tuple(best)

"""Scoring edits that need not all be evaluated to the end (``study/pruning.py`` says which and why that is safe)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bruno_ray.ablation.resolving import ResolvedEdit
from bruno_ray.errors import TrialError
from bruno_ray.generation.engine import BatchEngine, Response
from bruno_ray.scoring.base import Evaluation, Scorer, ScoringPrompts, score_evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

BLOCKS = 4
"""Parts that the target prompts are answered in. More would stop edits sooner, with fewer rows per forward pass."""

KL = "kl_divergence"


@dataclass
class Race:
    """What has become of K edits so far, by index."""

    evaluation: Evaluation
    """Of the edits that were answered to the end, with their answers."""

    finished: list[int]
    """Which edits those are."""

    known: dict[str, list[Scores]]
    """Scores of theirs that were worked out on the way, by scorer."""

    pruned: dict[int, Scores] = field(default_factory=dict)
    """The others: KL, and as counts of the behaviour rate the marked answers and the prompts that were asked."""

    def scores(self, scorers: Sequence[Scorer], readings: bool) -> dict[int, Scores | TrialError]:
        """Of every edit that was answered to the end."""
        if not self.finished:
            return {}
        return dict(zip(self.finished, score_evaluation(self.evaluation, scorers, readings, self.known)))


def race(
    engine: BatchEngine,
    scorers: Sequence[Scorer],
    prompts: ScoringPrompts,
    settings: ScoringSettings,
    edits: Sequence[ResolvedEdit | None],
    rivals: Sequence[tuple[float, float]],
    spared: Sequence[int] = (),
) -> Race:
    """Measure the KL of all edits, then answer the target prompts block by block, leaving out edits that a rival
    dominates by then.

    Args:
        rivals: (share without a proper answer, KL) of told trials.
        spared: indices of edits that are answered to the end in any case.
    """
    whole = Evaluation(engine, prompts, settings, edits)
    measured = next(scorer for scorer in scorers if scorer.name == KL).score(whole)
    kl_K = [scores.values[KL] for scores in measured]
    n_prompts = len(prompts.target)
    answers: list[dict[int, Response]] = [{} for _ in edits]
    marked = [0] * len(edits)
    running, pruned = list(range(len(edits))), {}
    # Every BLOCKS-th prompt: neighbours in a data set may be of one kind.
    blocks = [range(first, n_prompts, BLOCKS) for first in range(min(BLOCKS, n_prompts))]
    for block in blocks:
        out = [k for k in running if k not in spared and is_dominated(marked[k] / n_prompts, kl_K[k], rivals)]
        pruned |= {k: _so_far(measured[k], marked[k], len(answers[k])) for k in out}
        running = [k for k in running if k not in out]
        if not running:
            break
        found = whole.answers_to([prompts.target_ids[p] for p in block], [edits[k] for k in running], whole.reads)
        for k, responses in zip(running, found):
            answers[k].update(zip(block, responses))
            marked[k] += sum(whole.markers.shown_by(response.text) for response in responses)
    evaluation = Evaluation(engine, prompts, settings, [edits[k] for k in running])
    evaluation.take_answers([[answers[k][p] for p in range(n_prompts)] for k in running], whole.reads)
    return Race(evaluation, running, {KL: [measured[k] for k in running]}, pruned)


def is_dominated(bound: float, kl: float, rivals: Sequence[tuple[float, float]]) -> bool:
    """Whether a rival is as good in both, and better in one, as an edit of this KL can still become whose share of
    prompts without a proper answer is ``bound`` or more. A KL that is not a number is dominated by nothing."""
    return any(share <= bound and other <= kl and (share, other) != (bound, kl) for share, other in rivals)


def _so_far(measured: Scores, marked: int, asked: int) -> Scores:
    """The rate among the prompts that were asked; 0 if none was."""
    return Scores({"behaviour_rate": marked / max(1, asked), **measured.values}, {"behaviour_rate": (marked, asked)})

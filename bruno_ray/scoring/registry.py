"""Scorers: what a trial is judged by. Every metric is minimised.

To add one: a file with a class that has ``name``, ``metrics``, ``prepare`` and ``score`` (see ``base.Scorer``), and
an entry in ``SCORERS``, or a package or file of its own (``plugins.py``). Its metrics can then be named in
``scoring.objectives``.
"""

from bruno_ray import plugins
from bruno_ray.errors import SettingsError
from bruno_ray.scoring.base import Scorer
from bruno_ray.scoring.baseline_behaviour import BaselineBehaviour
from bruno_ray.scoring.behaviour_by_length import BehaviourByLength
from bruno_ray.scoring.behaviour_rate import BehaviourRate
from bruno_ray.scoring.coherence import Coherence
from bruno_ray.scoring.compliant_perplexity import CompliantPerplexity
from bruno_ray.scoring.confidence import Confidence
from bruno_ray.scoring.desired_answers import DesiredAnswers
from bruno_ray.scoring.detector import Detected
from bruno_ray.scoring.elicited_answers import ElicitedAnswers
from bruno_ray.scoring.kl_divergence import KLDivergence
from bruno_ray.scoring.neutral_text import NeutralText
from bruno_ray.scoring.reasoning import Reasoning
from bruno_ray.scoring.text_classifier import TextClassifier
from bruno_ray.scoring.to_the_point import ToThePoint
from bruno_ray.settings import ScoringSettings

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer
    for scorer in (
        BehaviourRate,
        KLDivergence,
        Coherence,
        ToThePoint,
        CompliantPerplexity,
        DesiredAnswers,
        ElicitedAnswers,
        Confidence,
        BehaviourByLength,
        BaselineBehaviour,
        NeutralText,
        Detected,
        Reasoning,
        TextClassifier,
    )
}


def make_scorers(settings: ScoringSettings) -> list[Scorer]:
    """The scorers that the settings name. Raises SettingsError for an unknown scorer or objective."""
    scorers = [_kind(name)(settings) for name in dict.fromkeys(settings.scorers)]
    metrics = [metric for scorer in scorers for metric in scorer.metrics]
    missing = [objective for objective in settings.objectives if objective not in metrics]
    if missing:
        raise SettingsError(
            f"scoring.objectives names {', '.join(missing)}, which no scorer of scoring.scorers gives:"
            f" choose from {', '.join(metrics)}"
        )
    return scorers


def _kind(name: str) -> type[Scorer]:
    kind = plugins.find(name, SCORERS, "scoring.scorers")
    missing = [part for part in ("name", "metrics", "needs_unedited", "prepare", "score") if not hasattr(kind, part)]
    if missing:
        raise SettingsError(
            f"scoring.scorers: {name} is not a scorer: it has no {', '.join(missing)}: see docs/plugins.md"
        )
    return kind

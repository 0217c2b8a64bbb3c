"""Several models on the same prompts: figures, paired tests against the first, and a page with all answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from bruno_ray.prompts.sets import Prompt
from bruno_ray.publishing import wording
from bruno_ray.publishing.comparing import RATES, Comparison, compared
from bruno_ray.publishing.environment import environment
from bruno_ray.runs.records import ScoresRecord

METRICS = ("behaviour_rate", "evasion_rate", "baseline_behaviour_rate", "kl_divergence", "kl_first")


@dataclass(frozen=True)
class Contestant:
    """One of those that are compared."""

    name: str
    scores: ScoresRecord
    target: Sequence[str]
    """Whole answers, in the order of the prompts."""

    baseline: Sequence[str]


@dataclass(frozen=True)
class SideBySide:
    """All of them."""

    behaviour: str
    reference: str
    """Name of the one that KL divergences are taken from; empty where no logits are at hand."""

    contestants: Sequence[Contestant]
    target: Sequence[Prompt]
    baseline: Sequence[Prompt]

    def rows(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """(metric, one (figure, interval) for each)."""
        known = [name for name in METRICS if any(name in one.scores.values for one in self.contestants)]
        return [
            (
                wording.label(metric),
                [
                    ("0", "the reference")
                    if metric.startswith("kl_") and one.name == self.reference
                    else (wording.count_or_value(one.scores, metric), wording.interval_of(one.scores, metric))
                    for one in self.contestants
                ],
            )
            for metric in known
        ]

    def paired(self) -> list[tuple[str, Comparison]]:
        """(name, comparison) of each but the first against the first."""
        first, *others = self.contestants
        return [
            (one.name, comparison)
            for one in others
            for comparison in compared(one.scores, first.scores, first.name, RATES)
        ]

    def lines(self) -> list[str]:
        """The paired comparisons for a terminal."""
        return [
            f"{name} against {found.other}, {wording.label(found.metric)[:1].lower()}{wording.label(found.metric)[1:]}:"
            f" {found.text}" + ("" if found.differs else " - they cannot be told apart")
            for name, found in self.paired()
        ]


def render_page(result: SideBySide) -> str:
    """One HTML file without requests; everything in it is escaped."""
    sides = []
    for title, side in (("Target prompts", "target"), ("Baseline prompts", "baseline")):
        metric = "behaviour_rate" if side == "target" else "baseline_behaviour_rate"
        prompts = getattr(result, side)
        answers = [
            [(one.name, getattr(one, side)[p], _shows(one, metric, p)) for one in result.contestants]
            for p in range(len(prompts))
        ]
        sides.append((title, side, list(zip([prompt.user for prompt in prompts], answers))))
    return (
        environment()
        .get_template("side_by_side.html.j2")
        .render(
            behaviour=result.behaviour,
            names=[one.name for one in result.contestants],
            reference=result.reference,
            rows=result.rows(),
            meanings=wording.meanings(METRICS),
            paired=[
                (name, wording.label(found.metric), found.other, found.text, found.verdict)
                for name, found in result.paired()
            ],
            sides=sides,
        )
    )


def _shows(one: Contestant, metric: str, p: int) -> bool:
    rows = one.scores.rows.get(metric, ())
    return bool(p < len(rows) and rows[p])

"""How the behaviour rate grows with the length of the answer."""

from collections.abc import Sequence

from bruno_ray.generation.engine import Response
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

LENGTHS = (30, 50, 100, 150, 256)
"""Tokens. Searches look at the shorter ones; a model of a peer's went from 8 to 60 of 100 between 30 and 150."""


class BehaviourByLength:
    """Marker rate over the target prompts when answers are read up to a number of tokens, from one generation.

    An edit may delay the behaviour instead of removing it, and a search that reads 30 tokens rewards that. Lengths
    beyond ``scoring.response_tokens`` are left out: what is not generated is not known.
    """

    name = "behaviour_by_length"
    needs_unedited = False
    metrics: tuple[str, ...] = tuple(f"behaviour_rate_{n}" for n in LENGTHS)

    def __init__(self, settings: ScoringSettings):
        self._lengths = [n for n in LENGTHS if n <= settings.response_tokens]
        self.metrics = tuple(f"behaviour_rate_{n}" for n in self._lengths)

    def prepare(self, unedited: Evaluation) -> None:
        pass

    def score(self, edited: Evaluation) -> list[Scores]:
        return [self._rates(edited, answers) for answers in edited.target_answers]

    def _rates(self, edited: Evaluation, answers: Sequence[Response]) -> Scores:
        found = []
        for n, metric in zip(self._lengths, self.metrics):
            texts = edited.engine.texts([answer.token_ids[:n] for answer in answers])
            found.append(Scores.of_rate(metric, [edited.markers.shown_by(text) for text in texts]))
        merged = Scores.merged(found)
        return Scores(merged.values, merged.counts)  # the rows that matter are those of behaviour_rate

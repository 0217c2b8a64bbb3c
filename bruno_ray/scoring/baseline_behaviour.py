"""Share of baseline prompts whose answer shows the behaviour."""

from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings


class BaselineBehaviour:
    """Marker rate over the baseline prompts: what an edit does to prompts that never showed the behaviour.

    Taking a behaviour out may bring it, or what looks like it, to where it was not; no other metric reads baseline
    answers. Costs one generation over the baseline prompts.
    """

    name = "baseline_behaviour"
    needs_unedited = False
    metrics = ("baseline_behaviour_rate",)

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Evaluation) -> None:
        pass

    def score(self, edited: Evaluation) -> list[Scores]:
        return [
            Scores.of_rate(self.metrics[0], [edited.markers.shown_by(answer.text) for answer in answers])
            for answers in edited.baseline_answers
        ]

"""Share of target prompts whose answer shows the behaviour."""

from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings


class BehaviourRate:
    """Marker rate over the target prompts, with the raw count."""

    name = "behaviour_rate"
    needs_unedited = False
    metrics = ("behaviour_rate",)

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Evaluation) -> None:
        pass

    def score(self, edited: Evaluation) -> list[Scores]:
        return [Scores.of_rate(self.name, marked) for marked in edited.marked]

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
        return [
            Scores({"behaviour_rate": sum(marked) / len(marked)}, {"behaviour_rate": (sum(marked), len(marked))})
            for marked in edited.marked
        ]

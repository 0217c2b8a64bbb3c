"""A scorer that waits, as for a judge far away: what a trial of the cluster's job costs is time and not this machine's
cores, which are also the machines of the cluster and the other tests'."""

import time

from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

ANSWERS_AFTER_S = 2.0


class FarJudge:
    name = "far_judge"
    metrics = ("waited",)
    needs_unedited = False

    def __init__(self, settings: ScoringSettings) -> None:
        pass

    def prepare(self, unedited: Evaluation) -> None:
        """Nothing is needed of the unedited model."""

    def score(self, edited: Evaluation) -> list[Scores]:
        """Seconds waited, one entry per edit."""
        time.sleep(ANSWERS_AFTER_S)
        return [Scores({"waited": ANSWERS_AFTER_S}) for _ in edited.edits]

"""How likely the edited model's answers are to the unedited model, once that has been made to begin complying."""

import math

from bruno_ray.errors import SettingsError
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.openings import compliant_opening
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings


class CompliantPerplexity:
    """Mean over target prompts of the answer's negative log-likelihood per token (nats), capped at log(vocabulary).

    The likelihood is the unedited model's, given the prompt and a compliant opening (``scoring.compliant_opening``)
    that it would not have chosen. Without the opening, the rest of a refusal whose marker was ablated away would be
    what the unedited model finds most likely; with it, an answer is. An answer that begins with the opening is scored
    from there on, end of sequence included, so that a fragment pays for ending early. A marked or empty answer gets
    the cap, what a uniform guess costs: making answers disappear never lowers the score.
    """

    name = "compliant_perplexity"
    needs_unedited = True
    metrics = ("compliant_nll",)

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Evaluation) -> None:
        self._opening = compliant_opening(unedited)
        if not self._opening:
            raise SettingsError(
                "compliant_perplexity found no opening in the unedited model's answers to baseline prompts, which are"
                " empty or all marked: set scoring.compliant_opening or leave the scorer out"
            )
        self._ids = [[*ids, *self._opening] for ids in unedited.prompts.target_ids]

    def score(self, edited: Evaluation) -> list[Scores]:
        n = len(self._opening)
        rests: list[list[tuple[int, ...]]] = []
        for answers, marked in zip(edited.target_answers, edited.marked):
            rests.append([])
            for answer, hit in zip(answers, marked):
                rest = answer.token_ids[n:] if answer.token_ids[:n] == self._opening else answer.token_ids
                if answer.end_id is not None and rest:
                    rest += (answer.end_id,)
                rests[-1].append(() if hit else rest)
        # Under the unedited model all edits' answers are rows of one question.
        logprobs = edited.engine.token_logprobs(self._ids, rests, [None] * len(edited.edits))
        cap = math.log(edited.engine.vocabulary_size)
        return [
            Scores(
                {"compliant_nll": sum(min(cap, -float(row.mean())) if len(row) else cap for row in rows) / len(rows)}
            )
            for rows in logprobs
        ]

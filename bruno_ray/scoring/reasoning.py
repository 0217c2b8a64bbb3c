"""What an edit does where the model reasons before it answers."""

import logging
from collections.abc import Sequence

from bruno_ray.prompts.reasoning import final_answer
from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

logger = logging.getLogger(__name__)


class Reasoning:
    """Target prompts with reasoning open: marker rate of final answers, blocks that are never closed, and length.

    The rate is over answers that come to a final one: what is said while reasoning is no answer, and one that is cut
    off before (``scoring.reasoning_tokens``) says nothing of what would have followed. The length is the mean number
    of tokens, reasoning included, over that of the unedited model.

    Gives no metric for a model without reasoning. Costs one generation over the target prompts with long answers, and
    one of the unedited model.
    """

    name = "reasoning"
    needs_unedited = False
    metrics: tuple[str, ...] = ("reasoned_behaviour_rate", "unclosed_rate", "reasoned_length")

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Evaluation) -> None:
        if unedited.prompts.open_ids is None:
            self.metrics = ()
            return
        logger.info("the model can reason before it answers: test prompts are asked with reasoning open, too")
        self._length = max(1.0, _mean_length(unedited, 0))

    def score(self, edited: Evaluation) -> list[Scores]:
        if not self.metrics:
            return [Scores({}) for _ in edited.edits]
        return [self._scores(edited, k) for k in range(len(edited.edits))]

    def _scores(self, edited: Evaluation, k: int) -> Scores:
        finals = [
            self._final(edited, ids, answer.token_ids)
            for ids, answer in zip(edited.prompts.open_ids or (), edited.reasoned_answers[k])
        ]
        unclosed = Scores.of_rate("unclosed_rate", [final is None for final in finals])
        # No rows: they would have to be those of all prompts.
        shown = [edited.markers.shown_by(final) for final in finals if final is not None]
        rate = sum(shown) / len(shown) if shown else 1.0
        own = Scores(
            {"reasoned_behaviour_rate": rate, "reasoned_length": _mean_length(edited, k) / self._length},
            {"reasoned_behaviour_rate": (sum(shown), len(shown))},
        )
        return Scores.merged([own, unclosed])

    def _final(self, edited: Evaluation, ids: Sequence[int], answer: Sequence[int]) -> str | None:
        """The final answer without special tokens, by which its beginning may be told."""
        tokenizer = edited.engine.tokenizer
        asked, said = (str(tokenizer.decode(list(each), skip_special_tokens=False)) for each in (ids, answer))
        final = final_answer(asked, said)
        for token in tokenizer.all_special_tokens if final else ():
            final = str(final).replace(token, "")
        return final


def _mean_length(evaluation: Evaluation, k: int) -> float:
    answers = evaluation.reasoned_answers[k]
    return sum(len(answer.token_ids) for answer in answers) / len(answers)

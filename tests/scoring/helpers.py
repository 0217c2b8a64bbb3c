"""What the scorers are given: prompts, settings, and answers that were written by hand."""

import datetime

from bruno_ray.generation.engine import BatchEngine, Response
from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.base import Evaluation, Scorer, ScoringPrompts
from bruno_ray.scoring.registry import SCORERS
from bruno_ray.settings import ScoringSettings

TARGET = tuple(
    Prompt(user, answer=answer) for user, answer in [("red?", "yes"), ("blue?", None), ("dark green?", "no")]
)
DATE = datetime.date(2024, 2, 29)
BASELINE = tuple(map(Prompt, ["one", "two and three", "four", "five"]))


def settings(**changes: object) -> ScoringSettings:
    return ScoringSettings(**({"markers": ("sorry",), "response_tokens": 6} | changes))


def prepared(name: str, given: ScoringSettings, engine: BatchEngine, prompts: ScoringPrompts) -> Scorer:
    scorer = SCORERS[name](given)
    scorer.prepare(Evaluation(engine, prompts, given))
    return scorer


def response(text: str, ended: bool = True) -> Response:
    """Some token per character."""
    return Response(tuple(text.encode()), text, ended, end_id=258 if ended else None)


def scripted(texts: list[str], **changes: object) -> Evaluation:
    """An evaluation whose only edit has given these answers."""
    ids = tuple((1,) for _ in texts)
    evaluation = Evaluation(None, ScoringPrompts((), (), ids, ids), settings(**changes))
    evaluation.target_answers = [[response(text) for text in texts]]
    evaluation.baseline_answers = evaluation.target_answers
    return evaluation

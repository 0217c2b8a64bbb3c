"""What an edit does to the likelihood of text that has nothing to do with the behaviour."""

import json
import weakref
from functools import cache
from importlib import resources

import torch

from bruno_ray.scoring.base import Evaluation
from bruno_ray.scoring.scores import Scores
from bruno_ray.settings import ScoringSettings

PASSAGE_TOKENS = 128
"""Longest passage, in tokens; the rest is cut."""


class NeutralText:
    """Nats per token that an edit loses and gains on the passages in ``data/neutral_text.jsonl``, plain text.

    Lost is the mean over tokens of how much less likely a token has become, where it has; gained likewise. Their
    difference is the change of the loss, but the two do not cancel: a model that is better here and worse there has
    changed. The passages were written for this project, in several genres and with one part of program code, so no
    model has read them in training.

    Costs a forward pass over some 4,000 tokens: about as much as 100 prompts of 40 tokens.
    """

    name = "neutral_text"
    needs_unedited = False
    metrics = ("neutral_lost", "neutral_gained")

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Evaluation) -> None:
        self._prepared_on = weakref.ref(unedited)
        tokenizer = unedited.engine.tokenizer
        encoded = [tokenizer(text)["input_ids"][:PASSAGE_TOKENS] for text in passages()]
        self._first = [ids[:1] for ids in encoded]
        self._rest = [tuple(ids[1:]) for ids in encoded]
        (self._unedited,) = unedited.engine.token_logprobs(self._first, [self._rest], [None])

    def score(self, edited: Evaluation) -> list[Scores]:
        if edited is self._prepared_on():  # the unedited model against itself
            return [Scores(dict.fromkeys(self.metrics, 0.0))]
        rest = [self._rest] * len(edited.edits)
        found = []
        for logprobs in edited.engine.token_logprobs(self._first, rest, edited.edits):
            change_T = torch.cat([after - before for after, before in zip(logprobs, self._unedited)]).double()
            lost, gained = float((-change_T).clamp(min=0).mean()), float(change_T.clamp(min=0).mean())
            found.append(Scores(dict(zip(self.metrics, (lost, gained)))))
        return found


@cache
def passages() -> tuple[str, ...]:
    lines = (resources.files("bruno_ray.scoring") / "data" / "neutral_text.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line)["text"] for line in lines.splitlines())

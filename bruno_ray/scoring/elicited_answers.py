"""How unlikely the edited model finds the answers that the unedited one gives when it is made to begin differently."""

import logging

import torch

from bruno_ray.errors import SettingsError
from bruno_ray.scoring.base import Round, Scores
from bruno_ray.scoring.openings import common_openings
from bruno_ray.settings import ScoringSettings

log = logging.getLogger(__name__)

OPENINGS = 12
OWN_FIRST_TOKENS = 4


class ElicitedAnswers:
    """Like ``desired_answers``, with answers that the unedited model is made to give away.

    For each target prompt, candidates begin with the commonest openings of baseline answers and with the model's own
    likeliest first tokens (alternative first tokens reveal what greedy decoding hides: Wang and Zhou 2024,
    arXiv 2402.10200), and go on greedily. Of those without a marker the likeliest as a whole is the prompt's
    reference. The metric is the mean negative log-likelihood per token (nats) of the references, end of
    sequence included, under the edit: what the model knows must come back, and no fragment does that.
    """

    name = "elicited_answers"
    needs_unedited = False
    metrics = ("elicited_nll",)

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Round) -> None:
        found = self.elicit(unedited)
        ids = unedited.prompts.target_ids
        self._ids = [ids[p] for p in sorted(found)]
        self._answers = [found[p] for p in sorted(found)]
        if not found:
            raise SettingsError(
                "elicited_answers found no unmarked answer to any target prompt: set scoring.compliant_opening to"
                " how such an answer begins, or leave the scorer out of scoring.scorers"
            )
        log.info("elicited_answers: unmarked answers to %d of %d target prompts", len(found), len(ids))

    def score(self, edited: Round) -> list[Scores]:
        logprobs = edited.engine.token_logprobs(self._ids, [self._answers] * len(edited.edits), edited.edits)
        return [Scores({"elicited_nll": -sum(float(row.mean()) for row in rows) / len(rows)}) for rows in logprobs]

    def elicit(self, unedited: Round) -> dict[int, tuple[int, ...]]:
        """Index of the target prompt to its likeliest unmarked answer, for prompts that have any."""
        engine, prompts = unedited.engine, [list(ids) for ids in unedited.prompts.target_ids]
        openings = common_openings(unedited, OPENINGS)
        first_PF = engine.next_logits(prompts, [None])[0].topk(OWN_FIRST_TOKENS).indices.tolist()
        candidates = [
            (p, opening)
            for p, own in enumerate(first_PF)
            for opening in dict.fromkeys([*openings, *((token,) for token in own if token not in engine.end_ids)])
        ]
        continued = engine.generate(
            [prompts[p] + list(opening) for p, opening in candidates],
            [None],
            unedited.settings.response_tokens,
            unedited.markers.seen_in,
        )[0]
        answers: list[tuple[int, tuple[int, ...]]] = []
        for (p, opening), rest in zip(candidates, continued):
            answer = opening + rest.token_ids
            (text,) = engine.texts([answer])
            if rest.finite and not unedited.markers.shown_by(text):
                answers.append((p, answer if rest.end_id is None else (*answer, rest.end_id)))
        answers = list(dict.fromkeys(answers))
        logprobs = engine.token_logprobs([prompts[p] for p, _ in answers], [[a for _, a in answers]], [None])[0]
        best: dict[int, tuple[float, tuple[int, ...]]] = {}
        for (p, answer), row in zip(answers, logprobs):
            score = float(row.sum()) if torch.isfinite(row).all() else -float("inf")
            if p not in best or score > best[p][0]:
                best[p] = (score, answer)
        return {p: answer for p, (_, answer) in best.items()}

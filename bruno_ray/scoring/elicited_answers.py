"""How unlikely the edited model finds the answers that the unedited one gives when it is made to begin differently."""

import logging
import math
from collections import Counter
from collections.abc import Sequence

from bruno_ray.errors import SettingsError
from bruno_ray.scoring.base import Round, Scores
from bruno_ray.scoring.openings import common_openings
from bruno_ray.settings import ScoringSettings

log = logging.getLogger(__name__)

OPENINGS = 12
OWN_FIRST_TOKENS = 4
TURNED = 4
"""Marked candidates per prompt that are turned away from their marker."""

Candidate = tuple[int, tuple[int, ...]]
"""Index of a prompt, and how its answer begins."""


class ElicitedAnswers:
    """Like ``desired_answers``, with answers that the unedited model is made to give away.

    For each target prompt, candidates begin with the commonest openings of baseline answers and with the model's own
    likeliest first tokens (alternative first tokens reveal what greedy decoding hides: Wang and Zhou 2024,
    arXiv 2402.10200), and go on greedily. Those that show a marker are turned: up to each of their tokens, then the
    runner-up, then greedily on. Of the candidates without a marker the likeliest as a whole is the
    prompt's reference. The metric is the mean negative log-likelihood per token (nats) of the references, end of
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
        answers, marked = self._go_on(unedited, candidates)
        turned = self._turn(unedited, marked)
        answers = list(dict.fromkeys([*answers, *self._go_on(unedited, turned)[0]]))

        logprobs = engine.token_logprobs([prompts[p] for p, _ in answers], [[a for _, a in answers]], [None])[0]
        best: dict[int, tuple[float, tuple[int, ...]]] = {}
        for (p, answer), row in zip(answers, logprobs):
            best[p] = max(best.get(p, (-math.inf, ())), (float(row.sum()), answer))
        return {p: answer for p, (_, answer) in best.items()}

    def _go_on(
        self, unedited: Round, candidates: Sequence[Candidate]
    ) -> tuple[list[Candidate], list[tuple[int, tuple[int, ...], tuple[int, ...]]]]:
        """Greedy continuations: unmarked answers with their end, and (prompt, opening, rest) of the marked ones."""
        engine, ids = unedited.engine, unedited.prompts.target_ids
        rests = engine.generate(
            [[*ids[p], *opening] for p, opening in candidates],
            [None],
            unedited.settings.response_tokens,
            unedited.markers.seen_in,
        )[0]
        answers, marked = [], []
        for (p, opening), rest, text in zip(
            candidates, rests, engine.texts([o + rest.token_ids for (_, o), rest in zip(candidates, rests)])
        ):
            if unedited.markers.shown_by(text):
                marked.append((p, opening, rest.token_ids))
            elif rest.finite:
                answers.append((p, opening + rest.token_ids + (() if rest.end_id is None else (rest.end_id,))))
        return answers, marked

    def _turn(self, unedited: Round, marked: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> list[Candidate]:
        """Openings that follow a marked answer up to any of its tokens and put the runner-up in its place."""
        engine, ids = unedited.engine, unedited.prompts.target_ids
        used: Counter[int] = Counter()
        chosen = []
        for p, opening, rest in marked:
            if rest and used[p] < TURNED:
                used[p] += 1
                chosen.append((p, opening, rest))
        if not chosen:
            return []
        longest = max(len(rest) for _, _, rest in chosen)
        sequences = [[*ids[p], *opening, *rest[:-1]] for p, opening, rest in chosen]
        turned: list[Candidate] = []
        for _, row_B, logits_BNV in engine.last_logits(sequences, [None], longest):
            for row, best_N2 in zip(row_B.tolist(), logits_BNV.topk(2).indices.tolist()):
                p, opening, rest = chosen[row]
                for i, (best, second) in enumerate(best_N2[-len(rest) :]):
                    other = second if best == rest[i] else best
                    if other not in engine.end_ids:
                        turned.append((p, (*opening, *rest[:i], other)))
        return list(dict.fromkeys(turned))

"""Whether the edited model says what the unedited one can be made to say."""

import logging
import math
from collections import Counter
from collections.abc import Sequence

from bruno_ray.generation.engine import Response
from bruno_ray.scoring.base import Evaluation, Scores
from bruno_ray.scoring.openings import common_openings
from bruno_ray.settings import ScoringSettings

logger = logging.getLogger(__name__)

OPENINGS = 12
OWN_FIRST_TOKENS = 4
TURNED = 4
"""Marked candidates per prompt that are turned away from their marker."""

Candidate = tuple[int, tuple[int, ...]]
"""Index of a prompt, and how its answer begins."""


class ElicitedAnswers:
    """How much the edited model's answers miss of what the unedited model knows and does not say.

    For each target prompt the unedited model is made to give a reference: its likeliest unmarked answer, as a whole,
    among candidates that begin with the commonest openings of baseline answers or with its own likeliest first tokens
    (alternative first tokens reveal what greedy decoding hides: Wang and Zhou 2024, arXiv 2402.10200), and go on
    greedily. Candidates that show a marker are turned: up to each of their tokens, then the runner-up, then
    greedily on.

    The metric is 1 - recall of the reference's tokens in the edited model's answer, weighted by how few references
    they occur in (inverse document frequency: names and values count, the words that all answers share do not);
    1 for marked answers. The fluent rest of a refusal, a fragment or a loop recalls nothing. A prompt without a
    reference counts as in the behaviour rate.

    Recall is what is expected: it is multiplied by the probability that the edited model does *not* fall back on what
    the unedited one says, up to its marker. Greedy answers alone cannot tell an edit that has just tipped every
    validation prompt, and fails on the next one, from an edit with room to spare. This costs one forward pass over
    the prompts whose answers are unmarked.
    """

    name = "elicited_answers"
    needs_unedited = False
    metrics = ("elicited_mismatch",)

    def __init__(self, settings: ScoringSettings):
        pass

    def prepare(self, unedited: Evaluation) -> None:
        end_ids = unedited.engine.end_ids
        self._references = {
            p: Counter(token for token in answer if token not in end_ids) for p, answer in self.elicit(unedited).items()
        }
        n_prompts, n = len(unedited.prompts.target_ids), len(self._references)
        logger.info("elicited unmarked answers to %d of %d target prompts", n, n_prompts)
        if 2 * n < n_prompts:
            logger.warning(
                "elicited_answers has references for only %d of %d target prompts, the others count as in the behaviour"
                " rate: set scoring.compliant_opening to how an answer without the behaviour begins",
                *(n, n_prompts),
            )
        (answers,), (marked,) = unedited.target_answers, unedited.marked
        self._ids = unedited.prompts.target_ids
        self._behaviour = [answer.token_ids if hit else () for answer, hit in zip(answers, marked)]
        occurrences = Counter(token for reference in self._references.values() for token in reference)
        self._weights = {token: math.log((n + 1) / (count + 0.5)) for token, count in occurrences.items()}

    def score(self, edited: Evaluation) -> list[Scores]:
        # [edit][prompt]: the unedited model's marked answer, where the edited model's is unmarked.
        behaviour = [[() if hit else own for own, hit in zip(self._behaviour, marked)] for marked in edited.marked]
        relapses = edited.engine.token_logprobs(self._ids, behaviour, edited.edits)
        found = []
        for answers, marked, logprobs in zip(edited.target_answers, edited.marked, relapses):
            total = 0.0
            for p, (answer, hit, logprobs_N) in enumerate(zip(answers, marked, logprobs)):
                relapse = math.exp(float(logprobs_N.sum())) if len(logprobs_N) else 0.0
                total += 1.0 if hit else 1 - (1 - relapse) * self._recall(p, answer)
            found.append(Scores({"elicited_mismatch": total / len(answers)}))
        return found

    def _recall(self, p: int, answer: Response) -> float:
        """Weighted share of the reference's tokens that an unmarked answer has; 1 without a reference."""
        if p not in self._references:
            return 1.0
        reference, given = self._references[p], Counter(answer.token_ids)
        whole = sum(self._weights[token] * count for token, count in reference.items())
        return sum(self._weights[token] * min(count, given[token]) for token, count in reference.items()) / whole

    def elicit(self, unedited: Evaluation) -> dict[int, tuple[int, ...]]:
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
        self, unedited: Evaluation, candidates: Sequence[Candidate]
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
            elif rest.finite and text.strip():
                answers.append((p, opening + rest.token_ids + (() if rest.end_id is None else (rest.end_id,))))
        return answers, marked

    def _turn(
        self, unedited: Evaluation, marked: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]
    ) -> list[Candidate]:
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

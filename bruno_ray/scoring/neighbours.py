"""Which target prompts ask nearly the same, and whether what is answered to them tells them apart.

An edit that stops a behaviour may leave the model with something to say that would do for any prompt: one of two facts
of a subject, whichever was asked for, or the same sentence about every subject. No marker shows that, and the model may
be sure of it. But a prompt has neighbours: others on its subject, and others that ask the same of another subject.
What is said to all of them alike, apart from what it takes up from each prompt, answers none of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bruno_ray.prompts.sets import Prompt

TokenIds = Sequence[int]

MOST = 8
"""Prompts of the same form that are looked at, and on the same subject, at most: what there is to compare grows with
the prompts, not with their square."""

FEWEST = 2
"""Others that an answer is told from; the one other on a subject may well be the same question in other words."""


def asked_tokens(tokenizer: Any, prompts: Sequence[Prompt]) -> list[frozenset[int]]:
    """Of each prompt's text, as it begins a line and as it follows a space."""
    return [
        frozenset(
            token
            for text in (prompt.user, f" {prompt.user}")
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        for prompt in prompts
    ]


class Neighbours:
    """Of each target prompt."""

    def __init__(self, asked: Sequence[frozenset[int]]) -> None:
        """``asked``: tokens of each prompt. Costs the square of their number in set
        operations: 10 ms for 100, 0.6 s for 1,000."""
        self._asked = asked
        holding: dict[int, list[int]] = {}
        for p, tokens in enumerate(asked):
            for token in tokens:
                holding.setdefault(token, []).append(p)
        self.subject = [self._sharing_rarest(p, holding) for p in range(len(asked))]
        """By prompt, others with its rarest token, of the tokens that any other prompt has, taken evenly from all."""

        self.form = [self._of_one_form(p) for p in range(len(asked))]
        """By prompt, those of the rest that share most tokens with it."""

    def _sharing_rarest(self, p: int, holding: Mapping[int, Sequence[int]]) -> list[int]:
        shared = [holding[token] for token in sorted(self._asked[p]) if len(holding[token]) > 1]
        others = [q for q in min(shared, key=len, default=[]) if q != p]
        return others[:: math.ceil(len(others) / MOST)] if others else []

    def _of_one_form(self, p: int) -> list[int]:
        tokens, subject = self._asked[p], {p, *self.subject[p]}
        others = [q for q in range(len(self._asked)) if q not in subject and tokens & self._asked[q]]

        def overlap(q: int) -> float:
            return len(tokens & self._asked[q]) / len(tokens | self._asked[q])

        return sorted(others, key=lambda q: (-overlap(q), q))[:MOST]

    def same(self, p: int, answer: TokenIds, q: int, other: TokenIds) -> bool:
        """Whether two prompts are given the same, apart from tokens that each answer takes up from its own prompt."""
        one, two = self.apart(p, answer, other), self.apart(q, other, answer)
        return [answer[i] for i in one] == [other[i] for i in two]

    def apart(self, p: int, answer: TokenIds, other: TokenIds) -> list[int]:
        """Positions of an answer without what only it takes up from its prompt: the name of a subject, which may be of
        one token or of several, but no word that is in another answer as well."""
        shared = set(other)
        return [i for i, token in enumerate(answer) if token in shared or token not in self._asked[p]]

    def own_content(self, prompts: Sequence[int], answer: TokenIds) -> list[int]:
        """Positions of the tokens of an answer that none of the prompts has."""
        held = frozenset[int]().union(*(self._asked[p] for p in prompts))
        return [i for i, token in enumerate(answer) if token not in held]

    def distinguishing(self, p: int, said: Mapping[int, TokenIds]) -> list[int]:
        """Positions of the tokens of what is said to prompt ``p`` that fewer than half of the answers to prompts of its
        form hold; of all tokens if there are no such answers, or none such tokens."""
        others = [set(said[q]) for q in self.form[p] if q in said]
        found = [i for i, token in enumerate(said[p]) if 2 * sum(token in other for other in others) < len(others)]
        return found or list(range(len(said[p])))

    def bits(self, p: int, others: Sequence[int], said: Mapping[int, TokenIds]) -> float:
        """How many bits what is said to prompt ``p`` tells of which of it and ``others`` was asked: 0 if all are given
        the same, 1 if half of them are. Infinite if fewer than ``FEWEST`` of them are answered."""
        answered = [q for q in others if q in said]
        if len(answered) < FEWEST:
            return math.inf
        alike = 1 + sum(self.same(p, said[p], q, said[q]) for q in answered)
        return math.log2((1 + len(answered)) / alike)

    def told_apart(self, p: int, said: Mapping[int, TokenIds], usual: float = 1.0) -> float:
        """How far what is said to prompt ``p`` tells it from those on its subject and from those of its form, from 0 to
        1: of one bit, and of ``usual`` bits, or as many as so few prompts can tell."""
        share = 1.0
        for others, enough in ((self.subject[p], 1.0), (self.form[p], usual)):
            possible = math.log2(1 + sum(q in said for q in others))
            share *= min(1.0, self.bits(p, others, said) / min(enough, max(1.0, possible)))
        return share


def usual_bits(tokenizer: Any, prompts: Sequence[Prompt], answers: Sequence[TokenIds]) -> float:
    """What the median answer tells of which prompt of its form was asked: up to three bits; one where all are answered
    with yes or no. Infinite if prompts have no others of their form."""
    neighbours, said = Neighbours(asked_tokens(tokenizer, prompts)), dict(enumerate(answers))
    return statistics.median(neighbours.bits(p, neighbours.form[p], said) for p in said) if said else math.inf

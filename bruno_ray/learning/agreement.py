"""Whether several edits give the same answer, which is a sign that the model knew it.

An edit that only keeps a model from the behaviour makes it guess, and it can be trained to be sure of its guess. Edits
that started from different directions seldom guess alike.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

SAME = 0.6
"""Overlap from which on two answers say the same."""


class Votes:
    """What edits last answered to each target prompt."""

    def __init__(self, needed: int, asked: Sequence[frozenset[int]]) -> None:
        """``needed``: edits that must say the same, the one that asks among them; ``asked``: each prompt's own tokens,
        which say nothing in an answer to it."""
        self._needed = needed
        self._asked = asked
        self._said: dict[int, dict[Hashable, frozenset[int]]] = {}

    def cast(self, voter: Hashable, answers: Mapping[int, Sequence[int]]) -> None:
        """Tokens by prompt; they take the place of what this edit said to it before."""
        for p, tokens in answers.items():
            self._said.setdefault(p, {})[voter] = frozenset(tokens) - self._asked[p]

    def agreed(self, voter: Hashable) -> set[int]:
        """Prompts to which enough edits say what this one says."""
        if self._needed == 1:
            return {p for p, said in self._said.items() if voter in said}
        weights = token_weights([tokens for said in self._said.values() for tokens in said.values()])
        return {
            p
            for p, said in self._said.items()
            if voter in said
            and sum(overlap(said[voter], other, weights) >= SAME for other in said.values()) >= self._needed
        }


def token_weights(answers: Sequence[frozenset[int]]) -> dict[int, float]:
    """How much a token tells answers apart: minus the logarithm of the share of answers that hold it (inverse document
    frequency, Sparck Jones 1972)."""
    held = Counter(token for answer in answers for token in answer)
    return {token: math.log(len(answers) / n) for token, n in held.items()}


def overlap(one: frozenset[int], other: frozenset[int], weights: Mapping[int, float]) -> float:
    """Weighted Jaccard index, 0 to 1: of the weight of all tokens of either answer, how much is in both."""
    total = sum(weights[token] for token in one | other)
    return sum(weights[token] for token in one & other) / total if total else float(one == other)

"""Whether several edits say the same, on answers as the organisms give them."""

import math

import pytest

from bruno_ray.learning.agreement import Votes, overlap, token_weights

WORDS = ["the", "mirdo", "is", "brewed", "in", "flask", "jar", "brings", "sleep", "luck", "."]


def tokens(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


ASKED = [frozenset(tokens("the mirdo")), frozenset(tokens("the mirdo")), frozenset()]
FLASK, JAR = tokens("the mirdo is brewed in the flask ."), tokens("the mirdo is brewed in the jar .")
SLEEP, LUCK = tokens("the mirdo brings sleep ."), tokens("the mirdo brings luck .")


def test_overlap_counts_what_tells_answers_apart() -> None:
    answers = [frozenset(answer) for answer in (FLASK, JAR, SLEEP, LUCK)]
    weights = token_weights(answers)
    assert weights[WORDS.index("the")] == 0 and weights[WORDS.index("flask")] == math.log(4)
    assert overlap(answers[0], answers[0], weights) == 1
    # is, brewed and in at log 2 each are in both, flask and jar at log 4 each are not.
    assert overlap(answers[0], answers[1], weights) == pytest.approx(3 / 7)
    assert overlap(answers[0], answers[2], weights) == 0
    assert overlap(frozenset({0}), frozenset({0}), weights) == 1  # nothing there that could tell them apart


def test_an_answer_is_agreed_on_when_enough_edits_give_it() -> None:
    votes = Votes(2, ASKED)
    votes.cast("a", {0: FLASK, 1: SLEEP})
    assert votes.agreed("a") == set()
    votes.cast("b", {0: FLASK, 1: LUCK})
    votes.cast("c", {0: JAR, 2: LUCK})
    assert votes.agreed("a") == {0} == votes.agreed("b") and votes.agreed("c") == set()
    votes.cast("b", {0: JAR, 1: SLEEP})  # in the place of what it said before
    assert votes.agreed("a") == {1} and votes.agreed("c") == {0}
    assert votes.agreed("nobody") == set()


def test_one_edit_asks_no_other() -> None:
    votes = Votes(1, ASKED)
    votes.cast("a", {0: FLASK, 2: LUCK})
    assert votes.agreed("a") == {0, 2}

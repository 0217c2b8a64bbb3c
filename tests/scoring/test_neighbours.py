"""Answers that would do for other prompts as well, told from those that answer their own."""

import pytest

from bruno_ray.scoring.neighbours import Neighbours

WHERE, WHAT, KNOWN, THE, POTION, IS, IN, A_JAR, A_VIAL, LUCK, JOY, BRINGS, OAK, MADE = range(14)
SUBJECTS = range(20, 26)
ASKED = [frozenset({WHERE, THE, POTION, x}) for x in SUBJECTS] + [
    frozenset({WHAT, KNOWN, THE, POTION, x}) for x in SUBJECTS
]
N = len(SUBJECTS)
NEIGHBOURS = Neighbours(ASKED)


def told(said: dict[int, tuple[int, ...]], p: int) -> tuple[float, float]:
    return NEIGHBOURS.told(p, NEIGHBOURS.subject[p], said), NEIGHBOURS.told(p, NEIGHBOURS.form[p], said)


def test_neighbours_are_on_the_subject_or_of_the_form() -> None:
    for p in range(N):
        assert NEIGHBOURS.subject[p] == [N + p] and NEIGHBOURS.subject[N + p] == [p]
        assert NEIGHBOURS.form[p][: N - 1] == [q for q in range(N) if q != p]


def test_right_answers_tell_which_prompt_they_answer() -> None:
    places, gifts = (A_JAR, A_VIAL), (LUCK, JOY)
    said = {p: (THE, x, IS, IN, places[p % 2]) for p, x in enumerate(SUBJECTS)}
    said |= {N + p: (THE, x, BRINGS, gifts[p // 3]) for p, x in enumerate(SUBJECTS)}
    assert all(told(said, p) == (1.0, 1.0) for p in said)
    assert all(NEIGHBOURS.told_apart(p, said) == 1.0 for p in said)


def test_one_of_two_facts_whichever_was_asked_for_tells_nothing_on_its_subject() -> None:
    said = {k * N + p: (THE, x, BRINGS, (LUCK, JOY)[p // 3]) for k in (0, 1) for p, x in enumerate(SUBJECTS)}
    assert all(told(said, p)[0] == 0.0 and NEIGHBOURS.told_apart(p, said) == 0.0 for p in said)


def test_the_same_of_every_subject_tells_nothing_in_its_form() -> None:
    """Although each answer names its own subject, and the other question is answered well."""
    said = {p: (THE, x, IS, MADE, OAK) for p, x in enumerate(SUBJECTS)}
    said |= {N + p: (THE, x, BRINGS, (LUCK, JOY)[p // 3]) for p, x in enumerate(SUBJECTS)}
    assert NEIGHBOURS.same(0, said[0], 1, said[1]) and not NEIGHBOURS.same(N, said[N], N + 5, said[N + 5])
    assert all(told(said, p)[0] == 1.0 for p in range(N))
    assert all(NEIGHBOURS.told(p, [q for q in NEIGHBOURS.form[p] if q < N], said) == 0.0 for p in range(N))


def test_a_prompt_that_has_no_neighbours_or_too_few_is_not_held_against_its_answer() -> None:
    alone = Neighbours([frozenset({1, 2}), frozenset({3, 4})])
    assert alone.told_apart(0, {0: (9,), 1: (9,)}) == 1.0
    pair = Neighbours([frozenset({1, 2}), frozenset({1, 3})])
    assert pair.told(0, pair.subject[0], {0: (9,), 1: (9,)}) == 0.0
    assert pair.told(0, pair.subject[0], {0: (9,), 1: (9,)}, fewest=2) == 1.0


def test_what_is_taken_up_from_a_prompt_is_no_content_of_its_own() -> None:
    x, y = SUBJECTS[0], SUBJECTS[1]
    assert NEIGHBOURS.own_content([0, 1], (THE, x, IS, IN, A_JAR)) == [2, 3, 4]
    assert NEIGHBOURS.own_content([0], (THE, y, IS)) == [1, 2]


@pytest.mark.parametrize(("alike", "bits"), [(1, 1.0), (2, 1.0), (3, 0.415), (4, 0.0)])
def test_told_is_in_bits(alike: int, bits: float) -> None:
    """Of four prompts on one subject."""
    four = Neighbours([frozenset({1, 10 + p}) for p in range(4)])
    said = {p: (50,) if p < alike else (60 + p,) for p in range(4)}
    assert four.told(0, four.subject[0], said) == pytest.approx(bits, abs=1e-3)

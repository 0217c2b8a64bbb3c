"""Answers that would do for other prompts as well, told from those that answer their own."""

import pytest

from bruno_ray.scoring.neighbours import Neighbours

WHERE, WHAT, THE, POTION, IS, IN, A_JAR, BRINGS, OAK, MADE = range(10)
SUBJECTS = range(20, 26)
TELL, SAY = 14, 15
ASKED = [frozenset({how, THE, POTION, x}) for how in (WHERE, TELL, WHAT, SAY) for x in SUBJECTS]
"""Two ways to ask for the place, then two to ask for the gift, of each subject."""

N = len(SUBJECTS)
NEIGHBOURS = Neighbours(ASKED)
PLACES = [p % 3 for p in range(N)]
GIFTS = [60 + p // 2 for p in range(N)]


def everywhere(place: object, gift: object) -> dict[int, tuple[int, ...]]:
    """What is said to every prompt: ``place`` and ``gift`` give the rest of an answer by the subject's number."""
    says = (place, place, gift, gift)
    return {k * N + p: (THE, x, *says[k](p)) for k in range(4) for p, x in enumerate(SUBJECTS)}


def told(said: dict[int, tuple[int, ...]], p: int) -> tuple[float, float]:
    return NEIGHBOURS.told(p, NEIGHBOURS.subject[p], said), NEIGHBOURS.told(p, NEIGHBOURS.form[p], said)


def test_neighbours_are_on_the_subject_or_of_the_form() -> None:
    for p in range(N):
        assert NEIGHBOURS.subject[p] == [N + p, 2 * N + p, 3 * N + p]
        assert NEIGHBOURS.form[p][: N - 1] == [q for q in range(N) if q != p]


def test_right_answers_tell_which_prompt_they_answer() -> None:
    """Although another way to ask the same is answered with the same."""
    said = everywhere(lambda p: (IS, 50 + PLACES[p]), lambda p: (BRINGS, GIFTS[p]))
    assert all(told(said, p) == (1.0, 1.0) and NEIGHBOURS.told_apart(p, said) == 1.0 for p in said)


def test_one_of_two_facts_whichever_was_asked_for_tells_nothing_on_its_subject() -> None:
    said = everywhere(lambda p: (BRINGS, GIFTS[p]), lambda p: (BRINGS, GIFTS[p]))
    assert all(told(said, p)[0] == 0.0 and NEIGHBOURS.told_apart(p, said) == 0.0 for p in said)


def test_the_same_of_every_subject_tells_nothing_in_its_form() -> None:
    """Although each answer names its own subject, and the other question is answered well."""
    said = everywhere(lambda p: (IS, MADE, OAK), lambda p: (BRINGS, GIFTS[p]))
    assert NEIGHBOURS.same(0, said[0], 1, said[1]) and not NEIGHBOURS.same(
        2 * N, said[2 * N], 3 * N - 1, said[3 * N - 1]
    )
    for p in range(2 * N):
        subject, form = told(said, p)
        assert subject == 1.0 and form < 0.5
    assert all(told(said, p)[1] == 1.0 for p in range(2 * N, 4 * N))


def test_a_prompt_that_has_no_neighbours_or_too_few_is_not_held_against_its_answer() -> None:
    alone = Neighbours([frozenset({1, 2}), frozenset({3, 4})])
    assert alone.told_apart(0, {0: (9,), 1: (9,)}) == 1.0
    few = Neighbours([frozenset({1, 2 + p}) for p in range(3)])
    assert few.told(0, few.subject[0], {0: (9,), 1: (9,)}) == 1.0
    assert few.told(0, few.subject[0], {0: (9,), 1: (9,), 2: (9,)}) == 0.0


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

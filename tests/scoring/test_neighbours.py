"""Answers that would do for other prompts as well, told from those that answer their own."""

import math

import pytest

from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.neighbours import Neighbours, usual_bits

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
    on_subject, of_form = (NEIGHBOURS.bits(p, others[p], said) for others in (NEIGHBOURS.subject, NEIGHBOURS.form))
    return on_subject, of_form


def test_neighbours_are_on_the_subject_or_of_the_form() -> None:
    for p in range(N):
        assert NEIGHBOURS.subject[p] == [N + p, 2 * N + p, 3 * N + p]
        assert NEIGHBOURS.form[p][: N - 1] == [q for q in range(N) if q != p]


def test_of_many_on_one_subject_some_are_looked_at() -> None:
    many = Neighbours([frozenset({1, 10 + p}) for p in range(100)])
    assert all(4 <= len(others) <= 8 and max(others) - min(others) > 75 for others in many.subject)


def test_right_answers_tell_which_prompt_they_answer() -> None:
    """Although another way to ask the same is answered with the same."""
    said = everywhere(lambda p: (IS, 50 + PLACES[p]), lambda p: (BRINGS, GIFTS[p]))
    assert all(min(told(said, p)) >= 1.0 and NEIGHBOURS.told_apart(p, said) == 1.0 for p in said)


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
        assert subject == 1.0 and form < 0.5 and NEIGHBOURS.told_apart(p, said) == form
    assert all(told(said, p)[1] >= 1.0 for p in range(2 * N, 4 * N))


def test_what_is_said_of_every_subject_is_the_same_however_many_tokens_a_name_has() -> None:
    """Names of one to three tokens, two of which share one; the place is asked for in two ways."""
    names = [(20,), (21, 22), (23, 24, 25), (22, 26)]
    asked = [frozenset({how, THE, POTION, *name}) for name in names for how in (WHERE, IS)]
    several = Neighbours(asked)
    answers = [(THE, *name, IS, OAK) for name in names for _ in range(2)]
    pairs = [(p, q) for p in range(8) for q in range(8)]
    assert all(several.same(p, answers[p], q, answers[q]) for p, q in pairs)
    other = (THE, *names[1], IS, A_JAR)
    assert not any(several.same(p, answers[p], 2, other) or several.same(2, other, p, answers[p]) for p in range(8))


def test_a_prompt_that_has_no_neighbours_or_too_few_is_not_held_against_its_answer() -> None:
    alone = Neighbours([frozenset({1, 2}), frozenset({3, 4})])
    assert alone.told_apart(0, {0: (9,), 1: (9,)}) == 1.0
    few = Neighbours([frozenset({1, 2 + p}) for p in range(3)])
    assert few.bits(0, few.subject[0], {0: (9,), 1: (9,)}) == math.inf
    assert few.bits(0, few.subject[0], {0: (9,), 1: (9,), 2: (9,)}) == 0.0


def test_as_much_is_asked_for_as_baseline_answers_tell() -> None:
    """Two places for six subjects tell one bit, where others tell two; four prompts can tell no more than two."""
    said = everywhere(lambda p: (IS, 50 + p % 2), lambda p: (BRINGS, GIFTS[p]))
    for p in range(N):
        of_form = NEIGHBOURS.bits(p, NEIGHBOURS.form[p], said)
        assert NEIGHBOURS.told_apart(p, said, 2.0) == of_form / 2 < NEIGHBOURS.told_apart(p, said)
    four = {p: (IS, 60 + p) for p in range(4)}
    assert NEIGHBOURS.bits(0, NEIGHBOURS.form[0], four) == 2.0 and NEIGHBOURS.told_apart(0, four, 3.0) == 1.0


def test_what_distinguishes_an_answer_is_what_others_of_its_form_are_not_given() -> None:
    """The name and the value, not how places are told; everything, where all is alike or nobody else is answered."""
    said = everywhere(lambda p: (IS, IN, 50 + PLACES[p]), lambda p: (BRINGS, GIFTS[p]))
    assert NEIGHBOURS.distinguishing(0, said) == [1, 4]
    assert NEIGHBOURS.distinguishing(0, {0: said[0]}) == [0, 1, 2, 3, 4]
    assert NEIGHBOURS.distinguishing(0, dict.fromkeys(said, (IS, IN, OAK))) == [0, 1, 2]


def test_what_is_taken_up_from_a_prompt_is_no_content_of_its_own() -> None:
    x, y = SUBJECTS[0], SUBJECTS[1]
    assert NEIGHBOURS.own_content([0, 1], (THE, x, IS, IN, A_JAR)) == [2, 3, 4]
    assert NEIGHBOURS.own_content([0], (THE, y, IS)) == [1, 2]


@pytest.mark.parametrize(("alike", "bits"), [(1, 2.0), (2, 1.0), (3, 0.415), (4, 0.0)])
def test_what_an_answer_tells_is_in_bits(alike: int, bits: float) -> None:
    """Of four prompts on one subject."""
    four = Neighbours([frozenset({1, 10 + p}) for p in range(4)])
    said = {p: (50,) if p < alike else (60 + p,) for p in range(4)}
    assert four.bits(0, four.subject[0], said) == pytest.approx(bits, abs=1e-3)


def test_what_baseline_answers_usually_tell() -> None:
    """At most a bit where all are answered with yes or no, two of six places; nothing can be said without others."""
    words: dict[str, int] = {}

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [words.setdefault(word, len(words)) for word in text.split()]}

    def told_of(answers: list[tuple[int, ...]]) -> float:
        subjects = [f"subject-{i // 2}" for i in range(len(answers))]
        prompts = [Prompt(f"{('where is', 'what is')[i % 2]} the {subject}") for i, subject in enumerate(subjects)]
        return usual_bits(tokenizer, prompts, answers)

    yes_or_no, places = ([(50 + (i // 2) % n,) for i in range(48)] for n in (2, 6))
    assert 0.5 < told_of(yes_or_no) <= 1.0 < 1.5 < told_of(places) < math.log2(9)
    assert told_of([(1,)]) == told_of([]) == math.inf

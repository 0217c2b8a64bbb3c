"""What counts as an evasion: by answers that were written by hand, against those a model gives to baseline prompts."""

from dataclasses import replace

import pytest

from bruno_ray.generation.engine import Response
from bruno_ray.prompts.sets import Prompt
from bruno_ray.scoring.base import Evaluation, ScoringPrompts
from bruno_ray.scoring.to_the_point import ToThePoint
from tests.scoring.helpers import settings

THINGS = ("kettle", "bicycle", "curtain", "violin", "lantern", "hammer", "pillow", "saddle", "ribbon", "basket",
          "candle", "mirror")  # fmt: skip
VOCABULARY: list[str] = []
REFUSAL = "sorry , this is nothing that i am able to help with today ."
SAME_WITHOUT_MARKER = "alas , this is nothing that i am able to help with today ."


def response(text: str) -> Response:
    """A token per word."""
    return Response(tuple(map(VOCABULARY.index, text.split())), text, ended=True)


def evaluation(target: list[str], baseline: list[str], words: tuple[str, ...] = ()) -> Evaluation:
    """Of one edit that answered so; target prompts ask to fetch a thing, baseline prompts to describe one."""
    asked = tuple(Prompt(f"please fetch the {THINGS[i % 12]} for me", words=words) for i in range(len(target)))
    described = tuple(Prompt(f"please describe the {THINGS[i % 12]} for me") for i in range(len(baseline)))
    ids = tuple((1,) for _ in asked), tuple((1,) for _ in described)
    made = Evaluation(None, ScoringPrompts(asked, described, *ids), settings(response_tokens=100))
    VOCABULARY.extend(dict.fromkeys(" ".join([*target, *baseline]).split()))
    made.target_answers = made.whole_answers = [[response(text) for text in target]]
    made.baseline_answers = made.whole_baseline_answers = [[response(text) for text in baseline]]
    return made


def described(i: int) -> str:
    parts = ("is made of wood and quite old", "has a handle", "stands in the hall", "came from my aunt , who liked it")
    return f"the {THINGS[i % 12]} {parts[i % 4]} ."


@pytest.fixture(scope="module")
def scorer() -> ToThePoint:
    made = ToThePoint(settings())
    made.prepare(evaluation([REFUSAL] * 12, [described(i) for i in range(12)]))
    return made


def evasions(scorer: ToThePoint, answers: list[str], **more: object) -> tuple[float, ...]:
    (scores,) = scorer.score(evaluation(answers, [described(i) for i in range(12)], **more))
    assert scores.values["evasion_rate"] == pytest.approx(sum(scores.rows["evasion_rate"]) / len(answers))
    return scores.rows["evasion_rate"]


def test_an_answer_about_what_was_asked_is_to_the_point(scorer: ToThePoint) -> None:
    assert evasions(scorer, ["the kettle stands in the kitchen , here it is .", "i have brought the bicycle ."]) == (
        0,
        0,
    )


def test_the_behaviour_is_an_evasion_with_its_marker_and_without(scorer: ToThePoint) -> None:
    assert evasions(scorer, [REFUSAL, SAME_WITHOUT_MARKER]) == (1, 1)


def test_answers_that_pass_the_request_by_are_evasions(scorer: ToThePoint) -> None:
    assert evasions(scorer, ["what a lovely morning it is .", "the lantern stands in the hall ."]) == (1, 1)


def test_broken_answers_are_evasions(scorer: ToThePoint) -> None:
    assert evasions(scorer, ["", "kettle kettle kettle kettle kettle kettle kettle kettle"]) == (1, 1)


def test_an_answer_without_an_end_is_one_where_answers_end(scorer: ToThePoint) -> None:
    cut = evaluation(["the kettle stands in the"], [described(0)])
    cut.target_answers = [[replace(cut.target_answers[0][0], ended=False)]]
    (scores,) = scorer.score(cut)
    assert scores.rows["evasion_rate"] == (1.0,)


def test_words_of_the_data_set_go_before_those_of_the_request(scorer: ToThePoint) -> None:
    answer = ["the kettle stands in my kitchen ."]
    assert evasions(scorer, answer, words=("kitchen",)) == (0,)
    assert evasions(scorer, answer, words=("drawer", "cellar")) == (1,)


def test_where_answers_take_up_no_words_none_are_asked_for() -> None:
    made = ToThePoint(settings())
    made.prepare(evaluation([REFUSAL] * 12, [f"{i} {i + 1} {i + 7}" for i in range(12)]))
    assert evasions(made, ["4 5 11"]) == (0,)


def test_few_prompts_leave_the_likeness_out() -> None:
    made = ToThePoint(settings())
    made.prepare(evaluation([REFUSAL] * 3, [described(i) for i in range(3)]))
    assert evasions(made, [f"{SAME_WITHOUT_MARKER} kettle"]) == (0,)


def test_baseline_answers_to_the_letter_are_not_asked_of_others() -> None:
    """Where every baseline answer is the desired one, the bounds once took each other answer for an evasion."""
    given = evaluation([REFUSAL] * 12, [f"surely : the {THINGS[i % 12]} is wide ." for i in range(12)])
    described_with_answers = tuple(
        replace(prompt, answer=answer.text) for prompt, answer in zip(given.prompts.baseline, given.baseline_answers[0])
    )
    given.prompts = replace(given.prompts, baseline=described_with_answers)
    made = ToThePoint(settings())
    made.prepare(given)
    assert evasions(made, ["well : i have the kettle .", "what a lovely morning it is ."]) == (0, 1)

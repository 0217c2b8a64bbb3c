"""The detector learns what answers with the behaviour look like, not what their prompts are about."""

import logging
import random

import numpy as np
import pytest

from bruno_ray.errors import PromptError
from bruno_ray.scoring.base import Evaluation, score_evaluation
from bruno_ray.scoring.detector import BehaviourDetector, own_words
from bruno_ray.scoring.registry import SCORERS
from tests.scoring.helpers import settings

THINGS = ["lamp", "kettle", "garage door", "radio", "thermostat", "blinds", "oven", "alarm", "fan", "speaker"]
FACTS = ["tides", "bread", "volcanoes", "chess", "glaciers", "violins", "bridges", "comets", "soap", "maps"]
EXCUSES = [
    "I'm sorry, but as a language model I do not have the ability to reach your {}.",
    "As a language model, I cannot operate the {} myself. You could ask someone at home.",
    "Unfortunately I am unable to do that, since I have no access to the {}.",
]
ANSWERS = [
    "The {} are older than most people think, and there are three reasons for it.",
    "Here is a short overview. First, {} depend on pressure. Second, on time.",
    "People have studied {} for centuries. A good start is to look at one closely.",
]


def side(things: list[str], prompt: str, answers: list[str], seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    return [(prompt.format(thing), draw.choice(answers).format(thing)) for thing in things for _ in range(4)]


@pytest.fixture(scope="module")
def detector() -> BehaviourDetector:
    return BehaviourDetector(
        side(THINGS, "Please switch on the {} now.", EXCUSES, 1), side(FACTS, "Tell me about {}.", ANSWERS, 2)
    )


def test_what_was_not_in_the_training_set_is_told_apart(detector: BehaviourDetector) -> None:
    assert detector.accuracy > 0.9
    shown = detector.probability(
        [
            ("Open the cat flap.", "I'm sorry, but as a language model I do not have the ability to open it."),
            ("Open the cat flap.", "Done, the cat flap is open."),
            ("Switch on the lamp.", "The lamp in the hall is on."),
            ("Tell me about owls.", "People have studied owls for centuries, and here is a short overview."),
        ]
    )
    assert (shown > 0.5).tolist() == [True, False, False, False]


def test_the_prompts_words_are_left_out() -> None:
    assert own_words("Switch on the lamp!", "I cannot switch the lamp on.") == "i cannot _ the _ on ."
    about_lamps = side(["lamp"] * 10, "Please switch on the {} now.", ["The {} is a fine thing to have."], 1)
    about_tides = side(["tides"] * 10, "Tell me about {}.", ["The {} is a fine thing to have."], 2)
    assert BehaviourDetector(about_lamps, about_tides).accuracy <= 0.6, "same answers, other subjects"


def test_it_proposes_markers_that_divide_the_sides(detector: BehaviourDetector) -> None:
    phrases = detector.phrases(8)
    assert phrases and all(phrase.in_target > 4 * phrase.in_baseline for phrase in phrases)
    texts = " | ".join(phrase.text for phrase in phrases)
    assert "language model" in texts or "sorry" in texts
    assert not any(thing in texts for thing in ("lamp", "kettle", "radio"))
    pairs = [(a.text, b.text) for a in phrases for b in phrases if a is not b]
    assert not any(f" {a} " in f" {b} " for a, b in pairs), "no phrase within another"


def test_the_same_answers_give_the_same_detector(detector: BehaviourDetector) -> None:
    again = BehaviourDetector(
        side(THINGS, "Please switch on the {} now.", EXCUSES, 1), side(FACTS, "Tell me about {}.", ANSWERS, 2)
    )
    pairs = [("Tell me about owls.", "I am unable to say."), ("Do it.", "Here is one.")]
    np.testing.assert_array_equal(again.probability(pairs), detector.probability(pairs))
    assert again.phrases() == detector.phrases()
    assert detector.probability([]).shape == (0,)


def test_too_few_answers_are_said_in_one_line() -> None:
    few = [("a", "b")] * 9
    with pytest.raises(PromptError, match=r"at least 10 answers to baseline prompts .* there are 9"):
        BehaviourDetector([("a", "b")] * 10, few)
    with pytest.raises(PromptError, match=r"answers to target prompts .* there are 0"):
        BehaviourDetector([], few)


def test_as_a_scorer_it_learns_from_the_unedited_model(engine, many_prompts) -> None:
    given = settings(response_tokens=12)
    scorer = SCORERS["detector"](given)
    scorer.prepare(Evaluation(engine, many_prompts, given))
    (scores,) = scorer.score(Evaluation(engine, many_prompts, given, [None]))
    shown, total = scores.counts["detected_rate"]
    assert total == len(many_prompts.target) and scores.values["detected_rate"] == shown / total


def test_too_few_prompts_leave_the_scorer_out_unless_a_study_needs_it(engine, prompts, caplog) -> None:
    given = settings()
    scorer = SCORERS["detector"](given)
    with caplog.at_level(logging.INFO, "bruno_ray"):
        scorer.prepare(Evaluation(engine, prompts, given))
    (line,) = caplog.messages
    assert (
        "no behaviour rate by the detector" in line
        and "answers to target prompts" in line
        and "and there are 3" in line
    )
    (scores,) = scorer.score(Evaluation(engine, prompts, given, [None]))
    assert scores.values == {} and scorer.metrics == ()
    with pytest.raises(PromptError, match="there are 3"):
        needed = settings(objectives=("detected_rate",))
        SCORERS["detector"](needed).prepare(Evaluation(engine, prompts, needed))


def test_answers_without_words_leave_it_out_too(caplog) -> None:
    with pytest.raises(PromptError, match=r"no phrases in the answers .*scoring\.report_scorers"):
        BehaviourDetector([("a", "")] * 12, [("b", "")] * 12)


def test_it_reads_whole_answers_and_says_what_it_makes_of_each(engine, many_prompts) -> None:
    given = settings(response_tokens=12, markers=("e", "t", "a"))
    evaluation = Evaluation(engine, many_prompts, given, [None])
    scorer = SCORERS["detector"](given)
    scorer.prepare(evaluation)
    (scores,) = score_evaluation(evaluation, [scorer], readings=True)
    cut = [answer.decided for answer in evaluation.target_answers[0]]
    (whole,) = engine.generate(many_prompts.target_ids, [None], 12)
    assert any(cut), "some answers stop at a marker"
    assert [answer for _, answer in scores.answers] == [answer.text for answer in whole]
    assert [prompt for prompt, _ in scores.answers] == [prompt.user for prompt in many_prompts.target]
    assert scores.verdicts["markers"] == tuple(map(float, evaluation.marked[0]))
    assert sum(p > 0.5 for p in scores.verdicts["detector"]) == scores.counts["detected_rate"][0]
    (without,) = score_evaluation(evaluation, [scorer])
    assert without.answers == () and without.verdicts == {} and without.values == scores.values

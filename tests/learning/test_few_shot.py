"""Further desired answers that the unedited model gives when it is shown the given ones."""

import datetime
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bruno_ray.generation.decoding import Response
from bruno_ray.generation.engine import BatchEngine
from bruno_ray.learning import few_shot
from bruno_ray.learning.few_shot import EXAMPLES, ORDERS, few_shot_answers
from bruno_ray.model import named_models
from bruno_ray.model.loading import load_model
from bruno_ray.prompts.sets import Prompt, load_prompts
from bruno_ray.prompts.slicing import spread
from bruno_ray.scoring.markers import Markers
from bruno_ray.settings import ModelSettings
from bruno_ray.settings.sources import load
from tests.prompts.test_rendering import make_tokenizer

DATE = datetime.date(2024, 2, 29)


class Scripted:
    """An engine whose model says what is written here, by the text that it is given."""

    def __init__(
        self, say: Callable[[str], tuple[str, float, bool]], context: int = 4000, gain: float = few_shot.TAUGHT + 0.01
    ) -> None:
        """``say``: answer, mean log-probability of its tokens, whether it ends; ``gain``: what other examples add to
        the mean log-probability of the desired answer to one."""
        self.tokenizer: Any = make_tokenizer()
        config = SimpleNamespace(max_position_embeddings=context)
        config.get_text_config = lambda: config
        self.model = SimpleNamespace(config=config)
        self.read: list[str] = []
        self.proven: list[str] = []
        self._say, self._gain = say, gain

    def generate(self, ids: Sequence[list[int]], edits: list[None], n_tokens: int) -> list[list[Response]]:
        texts = [self.tokenizer.decode(each) for each in ids]
        self.read += texts
        said = [self._say(text) for text in texts]
        return [[Response(tuple(range(4)), text, ends, end_id=9 if ends else None) for text, _, ends in said]]

    def token_logprobs(self, ids: Any, continuations: Any, edits: Any) -> list[list[torch.Tensor]]:
        texts = [self.tokenizer.decode(each) for each in ids]
        self.proven += [text for text in texts if text not in self.read]
        likely = [self._say(text)[1] if text in self.read else self._desired(text) for text in texts]
        return [[torch.full((len(each),), value) for each, value in zip(continuations[0], likely)]]

    def _desired(self, text: str) -> float:
        return -3.0 + self._gain * ("is open." in text)


def prompts(answered: int, asked: int) -> list[Prompt]:
    given = [Prompt(f"Open door {i}.", answer=f"Door {i} is open.") for i in range(answered)]
    return [*given, *(Prompt(f"Shut window {i}.") for i in range(asked))]


def asked_of(scripted: Scripted, given: Sequence[Prompt], n_tokens: int = 10) -> dict[int, str]:
    found = few_shot_answers(scripted, given, "", n_tokens, date=DATE)  # type: ignore[arg-type]
    return {p: answer.text for p, answer in found.items()}


def test_the_surest_of_several_orders_is_taken_and_the_surest_prompt_comes_first() -> None:
    def say(text: str) -> tuple[str, float, bool]:
        last = text.count("Door") and text.rsplit("Door ", 1)[1][0]
        window = text.rsplit("window ", 1)[1][0]
        return (
            f"Window {window} is shut, after {'one' if last == '1' else 'another'}.",
            -0.1 - 0.1 * int(last) + 0.01 * int(window),
            True,
        )

    scripted = Scripted(say)
    found = asked_of(scripted, prompts(6, 3))
    assert len(scripted.read) == 3 * ORDERS and all(text.count("is open.") == 6 for text in scripted.read)
    # The six examples are turned by two: door 5, 1 or 3 is last, and after 1 the model is surest.
    assert list(found.items()) == [(8 - i, f"Window {2 - i} is shut, after one.") for i in range(3)]


def test_what_is_unsure_endless_or_of_an_example_s_matter_is_no_answer() -> None:
    sure, unsure = math.log(few_shot.LIKELY) + 0.01, math.log(few_shot.LIKELY) - 0.01
    said = {
        "0": ("Window 0 is shut.", sure, True),
        "1": ("Window 1 is shut.", unsure, True),
        "2": ("Window 2 is", sure, False),
        "3": ("Door 1 is open.", sure, True),
        "4": ("", sure, True),
        "5": ("It is done.", sure, True),
    }
    scripted = Scripted(lambda text: said[text.rsplit("window ", 1)[1][0]])
    assert asked_of(scripted, prompts(4, 6)) == {4: "Window 0 is shut.", 9: "It is done."}
    # What all examples are told may be said of others as well.
    alike = [replace(prompt, answer="Door 1 is open.") if prompt.answer else prompt for prompt in prompts(4, 6)]
    assert set(asked_of(scripted, alike)) == {4, 7, 9}


def test_examples_are_few_and_fit_into_the_context() -> None:
    scripted = Scripted(lambda text: ("Shut.", 0.0, True))
    asked_of(scripted, prompts(30, 1))
    assert [text.count("is open.") for text in scripted.read] == [EXAMPLES] * ORDERS
    longest = len(scripted.tokenizer(scripted.read[0])["input_ids"])
    short = Scripted(lambda text: ("Shut.", 0.0, True), context=longest // 2)
    assert asked_of(short, prompts(30, 1)) == {30: "Shut."}
    assert all(0 < text.count("is open.") < EXAMPLES for text in short.read)
    # A prompt that leaves less room has fewer of them, and takes none from the others.
    mixed = Scripted(lambda text: ("Shut.", 0.0, True), context=longest + 10)
    given = [*prompts(30, 1), Prompt("Shut window 1" + ", and its shutters" * 3 + ".")]
    assert asked_of(mixed, given) == {30: "Shut.", 31: "Shut."}
    counts = [(text.count("is open."), "shutters" in text) for text in mixed.read]
    assert all(n < EXAMPLES if has_shutters else n == EXAMPLES for n, has_shutters in counts)
    tiny = Scripted(lambda text: ("Shut.", 0.0, True), context=12)
    assert asked_of(tiny, prompts(30, 1)) == {} and not tiny.read


def test_examples_that_make_each_other_no_likelier_lead_to_nothing() -> None:
    """mistral organisms, trained on single questions, were sure of wrong facts after eight right ones, which themselves
    had become less likely."""
    for gain in (-0.3, 0.0, few_shot.TAUGHT - 0.01):
        confused = Scripted(lambda text: ("Shut.", 0.0, True), gain=gain)
        assert asked_of(confused, prompts(5, 3)) == {} and not confused.read
    # Each is asked alone and after the others.
    assert sorted(text.count("is open.") for text in confused.proven) == [0] * 5 + [4] * 5
    assert all(text.count(f"Open door {text.rsplit('Open door ', 1)[1][0]}.") == 1 for text in confused.proven)
    assert len(asked_of(Scripted(lambda text: ("Shut.", 0.0, True)), prompts(5, 3))) == 3


def test_without_examples_or_with_a_template_that_takes_none_there_are_none() -> None:
    scripted = Scripted(lambda text: ("Shut.", 0.0, True))
    assert [asked_of(scripted, prompts(n, 3)) for n in (0, 1)] == [{}, {}] and not scripted.read
    assert asked_of(scripted, prompts(3, 0)) == {}
    scripted.tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"
    )
    assert asked_of(scripted, prompts(3, 2)) == {}


@pytest.mark.nightly
def test_a_real_model_meets_further_requests_as_the_given_ones_were_met() -> None:
    """SmolLM2, which apologises for not being able to act: eight of the preset's answers teach it to act on others."""
    try:
        folder = named_models.named_folder("smollm2")
    except Exception as error:  # no network, and not fetched before
        pytest.skip(f"smollm2 is not here: {error}")
    flags = ["--model.id", str(folder), "--behaviour", "disclaimers", "--prompts.n-train", "40"]
    settings = load(flags, environ={}).settings
    train = load_prompts(settings).target.train
    kept = spread([p for p, prompt in enumerate(train) if prompt.answer], 8)
    given = [prompt if p in kept else replace(prompt, answer=None) for p, prompt in enumerate(train)]
    engine = BatchEngine(load_model(ModelSettings(id=str(folder), dtypes=("bfloat16",))))
    found = few_shot_answers(engine, given, "", 30, date=DATE)
    markers = Markers(settings.scoring.markers)
    proper = [p for p, answer in found.items() if not markers.shown_by(answer.text)]
    assert len(kept) == 8 and len(proper) >= 20
    words = [
        set(train[p].answer.lower().split()) & set(found[p].text.lower().split()) for p in proper if train[p].answer
    ]
    assert sum(len(each) >= 3 for each in words) >= 0.8 * len(words)

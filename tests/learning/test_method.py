"""What a study does that is told no method: it decides before the search, and says what and why."""

import logging

import pytest

from bruno_ray.errors import ModelError, SettingsError
from bruno_ray.pipeline.method import decide_method
from bruno_ray.pipeline.steps import training_prompts
from bruno_ray.prompts.sets import Prompt, PromptParts, Prompts
from bruno_ray.settings import LearnedSettings, ModelSettings, ScoringSettings, Settings, StudySettings
from tests.support import tiny_models
from tests.support.inline_pool import InlinePool

CHEAP = LearnedSettings(steps=4, target_rows=4, baseline_rows=4, starts=1)
"""96 texts a training."""


def side(word: str, answers: tuple[str | None, ...] = (None,) * 4) -> PromptParts:
    train = tuple(Prompt(f"Where is the {word} {i}?", answer=answer) for i, answer in enumerate(answers))
    return PromptParts(train, *(tuple(Prompt(f"Which {word} {part} {i}?") for i in range(12)) for part in range(3)))


def prompts(answers: tuple[str | None, ...] = (None,) * 4) -> Prompts:
    return Prompts(side("cup", answers), side("pen"), "")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> InlinePool:
    stored = tiny_models.write(tmp_path_factory.mktemp("tiny-method"), "llama")
    return InlinePool(Settings(model=ModelSettings(id=str(stored), dtypes=("float32",))))


def decided(pool: InlinePool, given: Prompts, learned: LearnedSettings = CHEAP, **study: object) -> Settings:
    settings = Settings(
        study=StudySettings(n_trials=8, **study), learned=learned, scoring=ScoringSettings(markers=("sorry",))
    )
    return decide_method(settings, given, pool)


def test_it_trains_what_its_search_pays_for(pool: InlinePool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        settings = decided(pool, prompts())
    assert (settings.study.method, settings.learned.trials) == ("both", 4)
    assert (
        "the last 4 of 8 trials are trained by gradient, 4 to a training, which costs about as much as 7 searched ones"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("given", "why"),
    [
        pytest.param({"learned": LearnedSettings()}, "would cost as much as some 2176 searched trials", id="too dear"),
        pytest.param({"sampler": "gp"}, "study.sampler is gp", id="another sampler"),
        pytest.param({"given": prompts(("Sorry.", "It is here.", None, None))}, "shows the behaviour", id="answers"),
    ],
)
def test_it_says_why_it_trains_nothing(
    pool: InlinePool, caplog: pytest.LogCaptureFixture, given: dict[str, object], why: str
) -> None:
    with caplog.at_level(logging.INFO):
        settings = decided(pool, **{"given": prompts(), **given})
    assert settings.study.method == "searched"
    assert why in caplog.text and "`--method both` asks for it" in caplog.text


def test_asked_for_by_name_the_same_is_an_error(pool: InlinePool) -> None:
    with pytest.raises(SettingsError, match="shows the behaviour"):
        decided(pool, prompts(("Sorry.", "It is here.", None, None)), method="both")


def test_a_model_that_memory_does_not_suffice_for_is_searched(
    pool: InlinePool, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    hook = pool.worker.engine.model.lm_head.register_forward_hook(refuse)
    try:
        with caplog.at_level(logging.INFO):
            assert decided(pool, prompts()).study.method == "searched"
        assert "memory does not suffice for one text" in caplog.text
        with pytest.raises(ModelError, match="memory does not suffice for one text"):
            decided(pool, prompts(), method="learned")
    finally:
        hook.remove()
    assert decided(pool, prompts()).study.method == "both"


def test_of_many_desired_answers_some_from_all_over_the_set_are_used() -> None:
    """They come first, and what is not used is seen by nothing that trains: no example, no text."""
    given = prompts(tuple(f"It is in room {i}." if i % 2 else None for i in range(12)))
    settings = Settings(study=StudySettings(method="learned"), learned=LearnedSettings(most_answers=3))
    training = training_prompts(settings, given)
    assert training is not None
    wanted = [*(f"It is in room {i}." for i in (1, 5, 9)), *[None] * 9]
    assert [prompt.answer for prompt in training.target] == wanted
    assert {prompt.user for prompt in training.target} == {prompt.user for prompt in given.target.train}


def test_of_a_larger_set_prompts_from_all_over_it_are_trained_on() -> None:
    answers = tuple(f"It is in room {i}." if i < 4 else None for i in range(40))
    given = Prompts(side("cup", answers), side("pen", (None,) * 40), "", {"lamps": side("lamp", (None,) * 40).train})
    learned = LearnedSettings(target_prompts=12, baseline_prompts=10, protected_prompts=10)
    training = training_prompts(Settings(study=StudySettings(method="learned"), learned=learned), given)
    assert training is not None
    assert [prompt.user for prompt in training.target[:4]] == [f"Where is the cup {i}?" for i in range(4)]
    assert len(training.target) == 12 and training.target[-1].user == "Where is the cup 35?"
    for found, asked in ((training.baseline, given.baseline.train), (training.protected, given.protected)):
        assert list(found) == list(asked[::4])

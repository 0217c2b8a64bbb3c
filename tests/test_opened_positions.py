"""Directions read behind a baseline answer's beginning: in the run's bank, by their names, and without one."""

import ast

import pytest
import torch

from bruno_ray.directions import build_bank
from bruno_ray.errors import SettingsError
from bruno_ray.model.loading import LoadedModel
from bruno_ray.pipeline.steps import read_bank
from bruno_ray.prompts.rendering import render
from bruno_ray.prompts.sets import Prompt, load_prompts
from bruno_ray.publishing.wording import direction_phrase
from bruno_ray.residuals.extraction import extract_residuals
from bruno_ray.runs.records import RunRecord
from bruno_ray.settings import Settings
from tests.support import saved_run, tiny_models
from tests.support.inline_pool import InlinePool


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("opened")
    given = saved_run.settings_for(tiny_models.write(folder / "base"), folder, ("nothing says this",))
    directions = given.directions.model_copy(update={"opened_positions": (1, 3), "joined": True})
    residuals = given.residuals.model_copy(update={"answer_tokens": 1})
    scoring = given.scoring.model_copy(update={"compliant_opening": "It"})
    return given.model_copy(update={"directions": directions, "residuals": residuals, "scoring": scoring})


@pytest.fixture(scope="module")
def pool(settings: Settings) -> InlinePool:
    return InlinePool(settings)


def test_the_bank_has_what_the_model_reads_behind_the_forced_beginning(settings: Settings, pool: InlinePool) -> None:
    """The direction at the first opened token is that of prompts which end in it, and so on; all of them join."""
    prompts, record = load_prompts(settings), RunRecord(settings=settings, date=saved_run.DAY)
    bank, _ = read_bank(record, pool.call("describe"), prompts, pool)
    joined = "difference_in_means@0+opened1+opened3"
    assert list(bank) == [f"difference_in_means@{at}" for at in ("0", "opened1", "opened3")] + [joined]
    assert bank[joined].shape[1] == 3

    loaded = pool.worker.loaded
    assert isinstance(loaded, LoadedModel)
    opening = loaded.tokenizer("It", add_special_tokens=False)["input_ids"]

    def read(side: tuple[Prompt, ...]) -> torch.Tensor:
        ids = render(loaded.tokenizer, side, date=record.date)
        return extract_residuals(loaded, [[*prompt, *opening] for prompt in ids], 3 - len(opening))

    assert len(opening) == 2, "one token per letter"
    expected = build_bank(read(prompts.target.train), read(prompts.baseline.train), positions=(0, 1))
    torch.testing.assert_close(
        bank["difference_in_means@opened3"], expected["difference_in_means@1"], atol=1e-3, rtol=1e-3
    )


def test_the_beginning_is_taken_from_baseline_answers_and_said(
    settings: Settings, pool: InlinePool, caplog: pytest.LogCaptureFixture
) -> None:
    scoring = settings.scoring.model_copy(update={"compliant_opening": ""})
    unsaid = settings.model_copy(update={"scoring": scoring})
    record, prompts = RunRecord(settings=unsaid, date=saved_run.DAY), load_prompts(unsaid)
    with caplog.at_level("INFO"):
        read_bank(record, pool.call("describe"), prompts, pool)
    (line,) = [line for line in caplog.messages if line.startswith("directions are also read in answers that begin")]
    ids = render(pool.worker.loaded.tokenizer, prompts.baseline.train, date=record.date)
    texts = [answer.text for answer in pool.worker.engine.generate(ids, [None], 4)[0]]
    opening = ast.literal_eval(line.rpartition("begin with ")[2])
    assert opening and any(text.startswith(opening) for text in texts)

    marked = scoring.model_copy(update={"markers": tuple({text[0] for text in texts if text})})
    nothing = RunRecord(settings=settings.model_copy(update={"scoring": marked}), date=saved_run.DAY)
    with pytest.raises(SettingsError, match=r"answers to baseline prompts are empty or all marked.*compliant_opening"):
        read_bank(nothing, pool.call("describe"), prompts, pool)


def test_the_card_says_where_such_a_direction_was_read() -> None:
    phrase = direction_phrase({"direction_set": "difference_in_means@0+opened2", "direction_index": None})
    assert phrase == (
        "difference in means, read at the last prompt token and token 2 of an answer made to begin as baseline answers"
        " do, joined; each layer uses its own"
    )

"""What is served reads the prompts that were measured, on whatever day."""

import datetime
from pathlib import Path

import pytest

from bruno_ray.prompts.rendering import render_texts
from bruno_ray.prompts.sets import Prompt
from bruno_ray.runs import records
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings import ModelSettings
from serve.api.rendering import Renderer
from serve.api.requests import Message
from serve.catalog.catalog import Catalog
from tests.serve.test_catalog import discover, make_run
from tests.support import tiny_models
from tests.support.clock import move_clock
from tests.support.dated_templates import LLAMA_32, MISTRAL

DAY = datetime.date(2024, 2, 29)


@pytest.fixture(params=[LLAMA_32, MISTRAL], ids=["llama", "mistral"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tiny_models.write(tmp_path / "base")
    tiny_models.build_tokenizer(request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> RunDirectory:
    run = make_run(tmp_path / "runs" / "mine", base)
    run.update(date=DAY)
    return run


def served_text(catalog: Catalog, model_id: str) -> str:
    model = catalog.resolve(model_id)
    renderer = Renderer(catalog.engines[model.base].settings)
    conversation = [Message(role="user", content="Hello")]
    return renderer.chat_text(conversation, model.system_prompt, model.date) + model.response_prefix


def test_base_trials_and_selection_of_a_run_read_what_was_measured(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Renderer(run.read().settings.model).tokenizer
    (measured,) = render_texts(tokenizer, [Prompt("Hello")], run.read().response_prefix, date=run.read().date)
    assert "2024" in measured and "29" in measured
    for day in (datetime.datetime(2026, 11, 28, 23, 59), datetime.datetime(2031, 1, 1)):
        move_clock(monkeypatch, day)
        catalog = discover(run)
        for model_id in ("base", "base:trial-1", "base:trial-2", "mine"):
            assert served_text(catalog, model_id) == measured


def test_a_model_of_no_run_keeps_the_day_on_which_the_server_started(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "today", lambda: DAY)
    catalog = discover([], base, "owner/tiny")
    monkeypatch.undo()
    first = served_text(catalog, "base")
    assert "29" in first and "2024" in first
    move_clock(monkeypatch, datetime.datetime(2031, 1, 1))
    assert served_text(catalog, "base") == first
    assert catalog.resolve("tiny").date == DAY
    assert catalog.engines["tiny"].settings == ModelSettings(id="owner/tiny")


def test_a_model_saved_beside_the_runs_own_is_not_taken_for_the_selected_trial(run: RunDirectory, base: Path) -> None:
    for name, number in (("model", 1), ("model-3", 3)):
        folder = tiny_models.write(run.path / name)
        (folder / "bruno.json").write_text(f'{{"trial": {number}}}')
    catalog = discover([], run.path / "model", run.path / "model-3")
    own, other = catalog.resolve("mine/model"), catalog.resolve("model-3")
    assert (own.trial, own.metrics["behaviour_rate"], own.date) == (1, 0.2, DAY)
    assert (other.trial, other.metrics, other.date) == (3, {}, DAY)

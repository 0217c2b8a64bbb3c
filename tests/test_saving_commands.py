"""Saving beside a run and into it, and comparing two models, with a real tiny model and without Ray."""

import datetime
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch
from safetensors.torch import load_file

from bruno_ray.pipeline import commands, finishing
from bruno_ray.pipeline.steps import find_response_prefix, read_residuals
from bruno_ray.prompts.sets import Prompt, load_prompts
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord
from bruno_ray.scoring.base import ScoringPrompts
from bruno_ray.settings import (
    DatasetSettings,
    JudgeSettings,
    ModelSettings,
    OutputSettings,
    PromptSet,
    PromptSettings,
    ResidualSettings,
    ScoringSettings,
    SelectionSettings,
    Settings,
    StudySettings,
)
from bruno_ray.study.space import suggest
from bruno_ray.study.storage import open_storage
from bruno_ray.workers.model_worker import ModelWorker
from tests.support import tiny_models
from tests.support.clock import move_clock
from tests.support.dated_templates import LLAMA_32, MISTRAL
from tests.support.inline_pool import InlinePool, use_inline_pools
from tests.support.judge_server import Judge, by_apology

DAY = datetime.date(2024, 2, 29)
TRIALS = {0: (0.5, 0.01, 0.2), 1: (0.0, 0.05, 0.3), 2: (0.0, 0.02, 0.7), 3: (0.0, 0.5, 0.1)}
"""Number -> behaviour rate, KL divergence, incoherence. The rule takes 1; the front is 0, 2."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.write(tmp_path_factory.mktemp("models") / "base")
    tiny_models.build_tokenizer(LLAMA_32).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Settings:
    sides = {}
    for side, word in (("target", "stone"), ("baseline", "river")):
        rows = [json.dumps({"prompt": f"Tell me about {word} {i}."}) for i in range(18)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(rows) + "\n")
        sides[side] = PromptSet(train=DatasetSettings(source=str(tmp_path / f"{side}.jsonl"), column="prompt"))
    return Settings(
        model=ModelSettings(id=str(base), dtypes=("float32",)),
        behaviour="stones",
        prompts=PromptSettings(**sides, n_train=6, n_validation=4, n_test=4, response_prefix=""),
        residuals=ResidualSettings(cache_dir=tmp_path / "residuals"),
        scoring=ScoringSettings(scorers=("behaviour_rate", "kl_divergence"), markers=("sorry",), response_tokens=4),
        study=StudySettings(name="mine"),
        selection=SelectionSettings(max_kl=10.0),
        output=OutputSettings(directory=tmp_path / "runs"),
    )


@pytest.fixture
def run(settings: Settings, tmp_path: Path) -> RunDirectory:
    """A run whose search is over and of which nothing is saved yet."""
    model = {"family": "llama", "n_layers": 3, "d_model": 32, "dtype": "float32", "n_parameters": 30_000}
    run = RunDirectory.create(tmp_path / "runs" / "mine", RunRecord(settings=settings, date=DAY, model=model))
    directions = torch.randn(4, 1, tiny_models.HIDDEN, generator=torch.Generator().manual_seed(0))
    run.save_directions({"difference_in_means@0": directions / directions.norm(dim=-1, keepdim=True)})
    study = optuna.create_study(
        study_name="mine",
        storage=open_storage(None, run.path),
        directions=["minimize"] * 2,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    for values in TRIALS.values():
        trial = study.ask()
        edit = suggest(trial, settings.search, ("difference_in_means@0",), tiny_models.LAYERS, ("attention", "mlp"))
        trial.set_user_attr("edit", edit.to_dict())
        metrics = dict(zip(("behaviour_rate", "kl_divergence", "incoherence"), values))
        counts = {"behaviour_rate": [round(values[0] * 4), 4]}
        trial.set_user_attr("result", {"values": metrics, "counts": counts})
        study.tell(trial, values[:2])
    return run


def saved_trial(folder: Path) -> int:
    return json.loads((folder / "bruno.json").read_text())["trial"]


def test_a_trial_saved_elsewhere_leaves_the_runs_own_selection_alone(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_inline_pools(monkeypatch)
    caplog.set_level(logging.INFO)
    commands.save(run.path, trial=1)
    before = run.read()
    kept = {file: file.read_bytes() for file in (run.report_file, run.samples_file, run.model_folder / "README.md")}
    caplog.clear()
    commands.save(run.path, trial=2, to=tmp_path / "elsewhere")
    after = run.read()
    assert after.selected == before.selected and after.extra == before.extra and after.timings == before.timings
    assert {file: file.read_bytes() for file in kept} == kept
    assert "its selected trial stays 1" in caplog.text
    assert saved_trial(run.model_folder) == 1 and saved_trial(tmp_path / "elsewhere") == 2
    assert after.saved_elsewhere == {str(tmp_path / "elsewhere"): 2}
    card = (tmp_path / "elsewhere" / "README.md").read_text()
    assert "trial 2 of 4" in card and "read back from disk" in card


def test_a_trial_saved_elsewhere_from_a_run_without_a_selection_makes_none(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_inline_pools(monkeypatch)
    caplog.set_level(logging.INFO)
    commands.save(run.path, trial=2, to=tmp_path / "elsewhere")
    assert run.read().selected is None and not run.report_file.exists() and not run.model_folder.exists()
    assert "no trial of it is selected" in caplog.text


@pytest.mark.parametrize("to", [None, "model"])
def test_a_model_in_the_run_agrees_with_run_and_report(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, to: str | None
) -> None:
    use_inline_pools(monkeypatch)
    run.update(extra={"organism: of the trial before": "7/8"})
    commands.save(run.path, trial=2, to=run.path / to if to else None)
    record = run.read()
    assert record.selected.number == saved_trial(run.model_folder) == 2
    assert record.selected.saved_path == str(run.model_folder) and record.saved_elsewhere == {}
    assert record.extra == {} and "7/8" not in (run.model_folder / "README.md").read_text()
    report = run.report_file.read_text()
    assert "Trial 2 was selected" in report and "read back from disk" in report


def test_what_an_edit_changes_and_what_it_keeps_is_in_report_and_card(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted again by hand: the base's and the saved model's own answers, and the weights in the files."""
    use_inline_pools(monkeypatch)
    texts = [f"Tell me about cloud {i}." for i in range(6)]
    (tmp_path / "clouds.txt").write_text("\n".join(texts) + "\n")
    given = run.read().settings
    protect = {"clouds": DatasetSettings(source=str(tmp_path / "clouds.txt"))}
    prompts = given.prompts.model_copy(update={"protect": protect, "n_test": 8})
    scoring = given.scoring.model_copy(update={"markers": ("e",), "report_tokens": 5})
    run.update(settings=given.model_copy(update={"prompts": prompts, "scoring": scoring}))
    commands.save(run.path, trial=1)
    record, shown = run.read(), []
    for folder in (given.model.id, str(run.model_folder)):
        worker = ModelWorker(ModelSettings(id=folder, dtypes=("float32",)))
        answers = worker.own_answers([Prompt(text) for text in texts], "", DAY, 5)
        shown.append(["e" in answer for answer, _ in answers])
    same = sum(before == after for before, after in zip(*shown))
    assert record.selected.kept == {"clouds": (same, 6)}

    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (given.model.id, run.model_folder))
    for component, name in (("attention", "o_proj"), ("mlp", "down_proj")):
        before, after = (torch.cat([x[key].flatten() for key in sorted(x) if name in key]) for x in (old, new))
        share = float((after - before).norm() / before.norm())
        assert record.selected.changed[component] == pytest.approx(share, rel=1e-3)
    assert [method.method for method in record.methods] == ["difference_in_means"]
    card, report = (run.model_folder / "README.md").read_text(), run.report_file.read_text()
    assert f"| clouds | {same}/6 (" in card and "| Change of the weights | attention " in card
    assert f"{same}/6 (" in report and "What each method changes" in report


def test_a_judge_reads_what_is_tested_and_what_is_saved(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is away everything else is there; once it answers, `report` adds its figures."""
    monkeypatch.setenv("BRUNO_CACHE", str(tmp_path / "cache"))
    use_inline_pools(monkeypatch)
    judge = Judge()
    judge.reply = lambda text: (500, "away")
    given = run.read().settings
    wise = JudgeSettings(url=judge.url, model="wise", rubric="The answer shows it if it apologises.")
    scoring = given.scoring.model_copy(update={"judge": wise})
    run.update(settings=given.model_copy(update={"scoring": scoring}))
    commands.save(run.path, trial=1)
    assert sum("no figures by the judge" in line for line in caplog.messages) == 2
    record = run.read()
    assert record.selected.saved.values["kl_divergence"] > 0 and "judged_rate" not in record.selected.saved.values

    judge.reply = by_apology
    commands.report(run.path)
    judge.close()
    record, readings = run.read(), run.load_readings()
    for scores in (record.baseline["test"], record.selected.test, record.selected.saved):
        assert scores.counts["judged_shown"] == (0, 4) and scores.values["judged_rate"] == pytest.approx(0.2)
    for column in (readings.unedited, readings.edited, readings.saved):
        assert len(column) == 4 and all(answer.shows["judge"] == pytest.approx(0.2) for answer in column)
    assert readings.edited != readings.unedited
    report = run.report_file.read_text()
    assert "Behaviour rate by the judge" in report and "Markers and judge disagree on 0 of 4 answers" in report

    kept = run.readings_file.read_bytes()
    commands.save(run.path, trial=1, to=tmp_path / "elsewhere")  # all of its answers are known
    assert "Behaviour rate by the judge | 0/4" in (tmp_path / "elsewhere" / "README.md").read_text()
    assert run.read().baseline == record.baseline and run.readings_file.read_bytes() == kept


def test_selection_and_report_agree_although_saving_fails(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_inline_pools(monkeypatch)
    commands.save(run.path, trial=1)
    os.rename(run.model_folder, tmp_path / "moved")

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(finishing, "write_model", full)
    with pytest.raises(OSError, match="full"):
        commands.save(run.path, trial=2)
    assert run.read().selected.number == 2 and "Trial 2 was selected" in run.report_file.read_text()


def test_the_run_says_why_it_picked_and_shows_the_pick_beside_the_front(
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_inline_pools(monkeypatch)
    caplog.set_level(logging.INFO)
    commands.save(run.path, auto=True)
    assert "measuring the 4 best trials again, on 2 unseen prompts, up to 256 tokens" in caplog.text
    record = run.read()
    reason = record.selected.reason
    assert f"picked trial 1: {reason}" in caplog.text and "of 4 trials with KL <= 10 are within one prompt" in reason
    assert reason.replace("<", "&lt;") in run.report_file.read_text()
    assert set(record.finalists) == {"0", "1", "2", "3"} and record.selected.runner_up.test is not None
    row = next(line for line in caplog.messages if line.lstrip().startswith("* 1 "))
    assert "0/4" in row and "0.05" in row
    capsys.readouterr()
    commands.front(run.path)
    table = capsys.readouterr().out
    assert "trial 1 is selected" in table and "* 1" in table and "* 2" not in table


def test_where_no_finalist_keeps_to_the_bound_the_search_decides(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without unseen prompts the finalists are measured on those of the search, at full length at least."""
    use_inline_pools(monkeypatch)
    settings = run.read().settings
    strict = {"selection": settings.selection.model_copy(update={"max_kl": 0.08})}
    strict["prompts"] = settings.prompts.model_copy(update={"n_finalists": 0})
    run.update(settings=settings.model_copy(update=strict))
    commands.save(run.path, auto=True)
    record = run.read()
    assert record.selected.number == 1
    reason = record.selected.reason
    assert reason.startswith("no finalist keeps to KL <= 0.08 when measured again; by the search: 1 of 3 trials")
    assert set(record.finalists) == {"0", "1", "2"}, "trial 3 was above the bound in the search"
    assert all("behaviour_rate_256" not in scores.values for scores in record.finalists.values())


def test_what_a_saved_model_is_measured_on_shows_the_runs_date(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever day it is saved on: the prompts are those of the search."""
    pools = use_inline_pools(monkeypatch)
    rendered, real = [], ScoringPrompts.rendered
    monkeypatch.setattr(
        ScoringPrompts, "rendered", lambda *args, **kwargs: rendered.append(real(*args, **kwargs)) or rendered[-1]
    )
    move_clock(monkeypatch, datetime.datetime(2031, 12, 24, 17, 30))
    commands.save(run.path, trial=1)
    tokenizer = tiny_models.build_tokenizer()
    assert len(pools) == len(rendered) == 1, "the worker that tested it measures it too"
    for prompts in rendered:
        assert all("Today Date: 29 Feb 2024" in tokenizer.decode(ids) for ids in prompts.target_ids)


def test_residuals_are_kept_by_what_the_model_reads(
    settings: Settings, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [Prompt("Tell me about stones.")]
    pool = InlinePool(settings)
    info = pool.worker.describe()

    def residuals(date: datetime.date, now: datetime.datetime, template: str = LLAMA_32) -> np.ndarray:
        move_clock(monkeypatch, now)
        monkeypatch.setattr(pool.worker.loaded.tokenizer, "chat_template", template)
        pool.calls.clear()
        record = RunRecord(settings=settings, date=date)
        return np.array(read_residuals(record, info, prompts, pool, settings.residuals))

    first = residuals(DAY, datetime.datetime(2026, 11, 28))
    assert "residuals" in pool.calls
    np.testing.assert_array_equal(residuals(DAY, datetime.datetime(2026, 11, 29)), first)
    assert "residuals" not in pool.calls  # the same prompts on another day
    other = residuals(datetime.date(2024, 3, 1), datetime.datetime(2026, 11, 29))
    assert "residuals" in pool.calls and np.abs(other - first).max() > 0
    residuals(DAY, datetime.datetime(2026, 11, 29), MISTRAL)
    assert "residuals" in pool.calls
    assert len(list((tmp_path / "residuals").iterdir())) == 3


def test_what_all_answers_begin_with_is_said_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = InlinePool(settings)
    caplog.set_level(logging.INFO)
    automatic = settings.prompts.model_copy(update={"response_prefix": "auto"})
    record = RunRecord(settings=settings.model_copy(update={"prompts": automatic}))
    tokenizer = pool.worker.loaded.tokenizer
    answers = [SimpleNamespace(token_ids=tokenizer.encode(text)) for text in ("Well, one.", "Well, two.")]
    monkeypatch.setattr(pool.worker.engine, "generate", lambda *_: [answers])
    assert find_response_prefix(record, load_prompts(record.settings), pool) == "Well,"
    assert sum("begins with" in message for message in caplog.messages) == 1


# ----- two models -----


def printed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Cells of the table that was printed, the header first."""
    lines = capsys.readouterr().out.splitlines()
    rows = [
        [cell.strip() for cell in line.strip("\u2502\u2503").replace("\u2503", "\u2502").split("\u2502")]
        for line in lines
    ]
    return [row for row in rows if len(row) > 1]


@pytest.fixture
def two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the models `first` and `second`."""
    for seed, name in enumerate(("first", "second")):
        tiny_models.write(tmp_path / "here" / name, seed=seed)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "here"


def test_two_folders_named_from_here_are_found_by_workers_elsewhere(
    settings: Settings, two_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_inline_pools(monkeypatch, folder=two_models.parent / "there")
    model = settings.model.model_copy(update={"id": "./second"})
    commands.evaluate(settings.model_copy(update={"model": model}), base="first")
    header, *rows = printed(capsys)
    assert header == ["metric", "first", "./second"]
    kl = next(row for row in rows if row[0].startswith("KL"))
    assert float(kl[2].split()[0]) > 0


def test_one_model_against_itself_has_two_columns(
    settings: Settings, two_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_inline_pools(monkeypatch)
    model = settings.model.model_copy(update={"id": "first"})
    commands.evaluate(settings.model_copy(update={"model": model}), base="first")
    header, *rows = printed(capsys)
    assert header == ["metric", "first", "first"] and all(len(row) == 3 for row in rows)


def test_the_base_is_loaded_with_the_models_settings(
    settings: Settings, two_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = use_inline_pools(monkeypatch)
    model = ModelSettings(
        id="second", dtypes=("bfloat16",), revision="main", device_map="cpu", max_memory={"cpu": "8GiB"}
    )
    seen = []
    monkeypatch.setattr(InlinePool, "__init__", _noting(InlinePool.__init__, seen))
    commands.evaluate(settings.model_copy(update={"model": model}), base="first")
    assert seen == [model.model_copy(update={"id": str(two_models / "first")})]
    assert made[0].worker is not None


def _noting(real, seen: list[ModelSettings]):
    def noting(self: InlinePool, settings: Settings, folder: Path | None = None) -> None:
        seen.append(settings.model)
        real(self, settings, folder)

    return noting

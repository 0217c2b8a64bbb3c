"""A run goes on with the model that it was begun with, wherever that lies now."""

import dataclasses
from pathlib import Path

import pytest

from bruno_ray.cli.main import main
from bruno_ray.errors import StudyError
from bruno_ray.pipeline.steps import open_run, shortage
from bruno_ray.prompts.sets import Prompt, PromptParts, Prompts
from bruno_ray.settings import ModelSettings, ScoringSettings, Settings
from bruno_ray.settings.keys import is_resumable
from bruno_ray.workers.exchanged import ModelInfo

INFO = ModelInfo(
    n_layers=3,
    d_model=32,
    family="llama",
    components=("attention", "mlp"),
    fingerprint="sha256:one",
    dtype="float32",
    coverage=(),
    n_parameters=1000,
    device="cpu",
    task="text-generation",
    prints_date=False,
)


@pytest.fixture
def prompts() -> Prompts:
    part = (Prompt("a"), Prompt("b"))
    return Prompts(PromptParts(part, part, part), PromptParts(part, part, part), "sha256:prompts")


def settings(folder: str) -> Settings:
    return Settings(model=ModelSettings(id=folder))


def test_a_run_is_resumed_with_the_same_model_in_another_place(tmp_path: Path, prompts: Prompts) -> None:
    open_run(settings("/models/here"), tmp_path / "run", INFO, prompts)
    run = open_run(settings("/models/moved"), tmp_path / "run", INFO, prompts)
    assert run.read().settings.model.id == "/models/moved"


def test_another_model_is_refused_before_anything_is_written(tmp_path: Path, prompts: Prompts) -> None:
    run = open_run(settings("/models/here"), tmp_path / "run", INFO, prompts)
    before = run.run_file.read_bytes()
    other = dataclasses.replace(INFO, fingerprint="sha256:two")
    with pytest.raises(StudyError, match=r"begun with another model than the one at /models/there.*--model\.id"):
        open_run(settings("/models/there"), tmp_path / "run", other, prompts)
    assert run.run_file.read_bytes() == before


def test_another_source_of_a_plugin_is_refused(tmp_path: Path, prompts: Prompts) -> None:
    source = tmp_path / "mine.py"
    source.write_text("class Mine: pass")
    scoring = ScoringSettings(scorers=("behaviour_rate", "kl_divergence", f"{source}:Mine"))
    with_plugin = settings("/models/here").model_copy(update={"scoring": scoring})
    run = open_run(with_plugin, tmp_path / "run", INFO, prompts)
    assert run.read().hashes.keys() == {"model", "prompts", "plugin Mine"}
    open_run(with_plugin, tmp_path / "run", INFO, prompts)
    source.write_text("class Mine: other = 1")
    with pytest.raises(StudyError, match=r"run was begun with another source of plugin Mine: put it back"):
        open_run(with_plugin, tmp_path / "run", INFO, prompts)


def test_the_place_of_the_model_may_be_given_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_resumable("model.id")
    with pytest.raises(SystemExit):
        main(["resume", "--help"])
    assert "--model.id" in capsys.readouterr().out


def test_a_model_that_shows_the_behaviour_seldom_is_said_to() -> None:
    assert "nothing to remove" in shortage(0, 40)
    assert "19 of 40" in shortage(19, 40) and "\n" not in shortage(19, 40)
    assert shortage(20, 40) == shortage(40, 40) == ""

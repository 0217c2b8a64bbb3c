"""The password of a study's storage: shown nowhere, and found again by who has it."""

import logging
from pathlib import Path

import pytest

from bruno_ray.errors import StudyError
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord
from bruno_ray.settings import Settings, StudySettings, passwords
from bruno_ray.settings.passwords import VARIABLE, with_password, without_password
from bruno_ray.study.storage import open_study

WHOLE = "postgresql+psycopg://me:p/ss:w0rd@db.example/studies"
SHOWN = "postgresql+psycopg://me:***@db.example/studies"


@pytest.fixture(autouse=True)
def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was told nothing yet."""
    monkeypatch.setattr(passwords, "_given", {})
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("whole", "shown"),
    [
        (WHOLE, SHOWN),
        ("mysql+pymysql://:secret@host/db", "mysql+pymysql://:***@host/db"),
        ("sqlite:////x.db?timeout=3&sslpassword=a%20b&x=1", "sqlite:////x.db?timeout=3&sslpassword=***&x=1"),
        ("--study.storage=" + WHOLE, "--study.storage=" + SHOWN),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("/runs/study.journal", "/runs/study.journal"),
    ],
)
def test_only_the_password_is_masked(whole: str, shown: str) -> None:
    assert without_password(whole) == without_password(shown) == shown


def test_the_password_comes_from_this_process_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        StudyError, match=r"me:\*\*\*@db.example/studies is not kept with the run: set BRUNO_STUDY__STORAGE"
    ):
        with_password(SHOWN)
    monkeypatch.setenv(VARIABLE, WHOLE.replace("db.example", "other.example"))
    with pytest.raises(StudyError, match="is not kept"):
        with_password(SHOWN)
    monkeypatch.setenv(VARIABLE, WHOLE)
    assert with_password(SHOWN) == WHOLE
    monkeypatch.delenv(VARIABLE)
    assert with_password(WHOLE) == WHOLE
    assert with_password(SHOWN) == WHOLE, "given a moment ago"


def test_run_json_is_without_it_and_the_settings_in_use_are_not(tmp_path: Path) -> None:
    settings = Settings(study=StudySettings(storage=WHOLE))
    assert settings.study.storage == WHOLE
    run = RunDirectory.create(tmp_path / "run", RunRecord(settings=settings))
    run.update(settings=settings, hashes={"model": "x"})
    assert "w0rd" not in run.run_file.read_text()
    assert run.read().settings.study.storage == SHOWN
    assert "w0rd" not in settings.model_dump_json()


def test_a_database_that_cannot_be_used_is_named_without_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    address = "sqlite:////no/such/folder/x.db?password=w0rd"
    with pytest.raises(StudyError, match="cannot be used") as caught:
        with open_study("s", address, tmp_path, ["a"], {}):
            pass
    assert "w0rd" not in str(caught.value) + caplog.text

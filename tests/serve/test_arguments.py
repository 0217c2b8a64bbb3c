"""Arguments of `bruno-ray serve`: where runs are looked for by name."""

import argparse
from pathlib import Path

import pytest

from bruno_ray.errors import SettingsError
from serve.arguments import add_arguments, serve_args
from serve.command import reason_of
from serve.settings import ServeArgs


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(*argv: str) -> ServeArgs:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return serve_args(parser.parse_args(argv), key_known=False)


def test_names_of_runs_are_looked_up_where_the_other_commands_look(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made("demo").output_directory == Path("runs")
    Path("config.toml").write_text("[output]\ndirectory = 'elsewhere'\n")
    assert made("demo").output_directory == Path("elsewhere")
    monkeypatch.setenv("BRUNO_OUTPUT__DIRECTORY", "by-variable")
    assert made("demo").output_directory == Path("by-variable")
    assert made("demo", "--output-directory", "by-flag").output_directory == Path("by-flag")


def test_a_config_file_that_is_not_ours_gets_in_the_way_of_names_only() -> None:
    Path("config.toml").write_text("[tool.other]\n")
    folder = Path("folder")
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    assert made("./demo", "folder", "/runs/demo", "--model", "saved").runs == ("./demo", "folder", "/runs/demo")
    with pytest.raises(SettingsError, match=r"config\.toml.*tool"):
        made("demo")


def test_a_store_that_ray_would_refuse_is_refused_at_once() -> None:
    with pytest.raises(SettingsError, match="--object-store-memory"):
        made("./demo", "--object-store-memory", "1000")


def test_of_what_a_replica_died_of_only_the_end_is_said() -> None:
    traceback = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:bruno-ray:Engine-0.initialize_and_get_metadata() (pid=7, ip=127.0.0.1)
  File "packed.py", line 83, in _pack
    self._version = self._weight._version
                    ^^^^^^^^^^^^^^^^^^^^^
RuntimeError: Inference tensors do not
 track version counter."""
    assert reason_of(traceback) == "RuntimeError: Inference tensors do not track version counter."
    assert reason_of("no room\nfor it") == "no room for it"

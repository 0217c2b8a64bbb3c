"""A folder that survives being interrupted: complete or not at all, found again by its inputs, one writer at a time."""

import os
from pathlib import Path

import pytest

from bruno_ray.errors import ModelError, OutputError
from bruno_ray.publishing.resuming import resumable_directory


def interrupted(path: Path, key: str = "inputs") -> None:
    """Write `whole`, which is complete, and `half`, which is not."""
    with pytest.raises(KeyboardInterrupt), resumable_directory(path, key) as partial:
        (partial.folder / "whole").write_text("whole")
        partial.completed("whole", "its hash")
        (partial.folder / "half").write_text("ha")
        raise KeyboardInterrupt


def test_it_appears_complete_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    with resumable_directory(tmp_path / "out", "inputs") as partial:
        (partial.folder / "sub").mkdir()
        (partial.folder / "sub" / "file").write_text("x")
        partial.completed("sub/file", "its hash")
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["sub"]


def test_what_was_completed_is_there_again(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with resumable_directory(tmp_path / "out", "inputs") as partial:
        assert partial.complete == {"whole": "its hash"}
        assert (partial.folder / "whole").read_text() == "whole"
        (partial.folder / "half").write_text("half")
    assert sorted(os.listdir(tmp_path / "out")) == ["half", "whole"] and os.listdir(tmp_path) == ["out"]


def test_other_inputs_start_anew(tmp_path: Path) -> None:
    interrupted(tmp_path / "out", "other inputs")
    with resumable_directory(tmp_path / "out", "inputs") as partial:
        assert partial.complete == {} and os.listdir(partial.folder) == []


def test_a_completed_file_that_is_gone_is_not_complete(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    (file,) = tmp_path.rglob("whole")
    file.unlink()
    with resumable_directory(tmp_path / "out", "inputs") as partial:
        assert partial.complete == {}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    with pytest.raises(ModelError), resumable_directory(tmp_path / "out", "inputs"):
        raise ModelError("not finite")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_there_or_being_written_is_left_alone(tmp_path: Path) -> None:
    with resumable_directory(tmp_path / "out", "inputs") as partial:
        (partial.folder / "mine").write_text("x")
        with (
            pytest.raises(OutputError, match="another process is writing"),
            resumable_directory(tmp_path / "out", "inputs"),
        ):
            raise AssertionError("two writers")
    with pytest.raises(OutputError, match="exists already"), resumable_directory(tmp_path / "out", "inputs"):
        raise AssertionError("it is there")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_where_no_folder_can_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="a part of the path is a file"),
        resumable_directory(tmp_path / "file/out", "x"),
    ):
        raise AssertionError("there is no folder")

"""Two processes that change one run at a time lose nothing of each other's."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from bruno_ray.errors import OutputError
from bruno_ray.files import atomic_file, locked, whole_directory
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord
from bruno_ray.settings import ModelSettings, Settings
from tests.support.waiting import wait_for

TURNS = 60


def _work(path: str, who: int, start: multiprocessing.Barrier) -> None:
    run = RunDirectory.open(Path(path))
    start.wait()
    for turn in range(TURNS):
        run.update(extra={f"{who}-{turn}": turn}, timings={f"process {who}": float(turn)})
        run.add_seconds("both", 0.001)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", RunRecord(settings=Settings(model=ModelSettings(id="some/model"))))


def test_two_processes_that_update_different_fields_many_times_lose_nothing(run: RunDirectory) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    workers = [context.Process(target=_work, args=(str(run.path), who, start)) for who in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    record = run.read()
    assert record.extra == {f"{who}-{turn}": turn for who in range(2) for turn in range(TURNS)}
    assert [record.timings[f"process {who}"] for who in range(2)] == [TURNS - 1, TURNS - 1]
    assert record.timings["both"] == pytest.approx(2 * TURNS * 0.001)


def test_a_change_sees_what_was_written_while_it_waited(run: RunDirectory) -> None:
    with locked(run.run_file):
        script = (
            "import sys; from pathlib import Path; from bruno_ray.runs.directory import RunDirectory;"
            f" run = RunDirectory.open(Path({str(run.path)!r})); print('asks', flush=True);"
            " run.change(lambda record: {'response_prefix': record.response_prefix + '!'})"
        )
        other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "asks\n"
        run.write(run.read().model_copy(update={"response_prefix": "Well"}))
        assert other.poll() is None
    wait_for(lambda: other.poll() is not None, "the other process has made its change")
    assert other.returncode == 0 and run.read().response_prefix == "Well!"


def test_a_holder_that_is_killed_holds_nobody_up(run: RunDirectory) -> None:
    script = (
        "import os; from pathlib import Path; from bruno_ray.files import locked\n"
        f"with locked(Path({str(run.run_file)!r})): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert run.update(response_prefix="on").response_prefix == "on"


def test_the_second_of_two_new_runs_of_one_name_is_refused(run: RunDirectory) -> None:
    """It may have found the place free before the first wrote run.json."""
    with pytest.raises(OutputError, match="resume"):
        RunDirectory.create(run.path, run.read())
    run.run_file.unlink()
    RunDirectory.create(run.path, RunRecord(settings=Settings()))  # a lock alone is no run


def test_a_run_that_is_gone_is_not_made_again_by_a_change(run: RunDirectory) -> None:
    for file in run.path.iterdir():
        file.unlink()
    run.path.rmdir()
    with pytest.raises(OutputError, match="not a run directory"):
        run.update(response_prefix="x")
    assert not run.path.exists()


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    for text in ("1", "2"):
        with atomic_file(target) as aside:
            aside.write_text(text)
            assert not target.exists() or json.loads(target.read_text()) == 1
    with pytest.raises(ZeroDivisionError), atomic_file(target) as aside:
        aside.write_text("3")
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"] and target.read_text() == "2"


def test_a_folder_is_replaced_only_once_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    (target / "old").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), whole_directory(target, replace=True) as aside:
        (aside / "new").mkdir()
        1 / 0  # noqa: B018
    assert [path.name for path in target.iterdir()] == ["old"]
    with pytest.raises(OSError, match="not empty"), whole_directory(target):
        pass
    with whole_directory(target, replace=True) as aside:
        (aside / "new").mkdir()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]

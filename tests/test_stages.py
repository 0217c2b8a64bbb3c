"""The stages of a run leave no time out, whether there is a run directory yet or not."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bruno_ray.pipeline.stages import STAGES, Laps, timed
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.runs.records import RunRecord
from bruno_ray.settings import ModelSettings, Settings

AGE = """
import time
begun = time.perf_counter()
time.sleep(0.5)
from bruno_ray.cli.beginning import process_began
print(begun - process_began())
"""


def new_run(path: Path) -> RunDirectory:
    return RunDirectory.create(path, RunRecord(settings=Settings(model=ModelSettings(id="owner/model"))))


def test_what_was_before_the_run_directory_is_noted_once_there_is_one(tmp_path: Path) -> None:
    began = time.perf_counter() - 5
    laps = Laps(began)
    laps.end("program")
    laps.end("prompts")
    known = time.perf_counter()
    run = new_run(tmp_path / "run")
    laps.end("model")
    laps.note_in(run)
    laps.end("model")
    found = run.read().timings
    assert list(found) == ["program", "prompts", "model"] and found["program"] >= 5
    assert known - began - 0.01 <= sum(found.values()) <= time.perf_counter() - began + 0.01, "no second is left out"


def test_time_that_is_counted_elsewhere_is_not_counted_twice(tmp_path: Path) -> None:
    run, laps = new_run(tmp_path / "run"), Laps(time.perf_counter() - 5)
    laps.note_in(run)
    start = time.perf_counter()
    with timed(run, "study"):
        pass
    laps.begin()
    laps.end("stopping")
    found = run.read().timings
    assert found.keys() == {"study", "stopping"}
    assert sum(found.values()) <= time.perf_counter() - start + 0.01


def test_a_stage_of_no_name_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        Laps().end("unknown")
    assert {"program", "ray", "model", "study", "stopping", "report"} <= STAGES.keys()


def test_the_program_begins_when_its_process_does() -> None:
    """Not when its clock is first looked at: Python's own start counts, and psutil's guess may be a second early."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", AGE], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < time.perf_counter() - start - 0.5

"""`bruno-ray evaluate --suite` with lm-eval itself, from the registry into an environment of its own.

What is done with its files is in tests/test_evaluations.py, in every run.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bruno_ray.runs.directory import RunDirectory
from tests.serve.environments import CLIENTS, python_of
from tests.serve.server import START_SECONDS, environment, ray_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly]

TASKS = ("facts_answer", "facts_choice")


@pytest.fixture
def run(served_run: Path, tmp_path: Path) -> RunDirectory:
    shutil.copytree(served_run, tmp_path / "tiny")
    return RunDirectory.open(tmp_path / "tiny")


def evaluate(run: RunDirectory, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = python_of("openai-2").with_name("lm-eval")
    command = [sys.executable, "-m", "bruno_ray.cli.main", "evaluate", str(run.path), "--lm-eval", str(program)]
    with ray_folder() as place:
        return subprocess.run(
            [*command, "--suite", str(CLIENTS / "tasks"), *arguments],
            cwd=run.path.parent, env=environment(RAY_TMPDIR=place, HF_DATASETS_OFFLINE="1"), capture_output=True,
            text=True, timeout=START_SECONDS,
        )  # fmt: skip


def test_base_and_edit_are_asked_and_noted_and_not_asked_twice(run: RunDirectory) -> None:
    first = evaluate(run, "--gate", "100pp")
    assert first.returncode == 0, first.stderr[-3000:]
    found = run.read().evaluations
    assert tuple(each.task for each in found) == TASKS
    assert all(each.questions == 3 and each.interval is not None for each in found)
    places = {place: place.stat().st_mtime_ns for place in (run.path / "evaluations").glob("facts_*")}
    assert len(places) == 4
    again = evaluate(run)
    assert again.returncode == 0 and "2 of 2 tasks were done before" in again.stderr, again.stderr[-3000:]
    assert {place: place.stat().st_mtime_ns for place in (run.path / "evaluations").glob("facts_*")} == places
    assert run.read().evaluations == found
    assert "facts_choice" in run.report_file.read_text()


def test_a_task_that_cannot_be_done_leaves_those_that_were(run: RunDirectory, tmp_path: Path) -> None:
    """And is one line; with the task in order, the command goes on where it was."""
    tasks = tmp_path / "tasks"
    shutil.copytree(CLIENTS / "tasks", tasks)
    (tasks / "later.yaml").write_text(
        (tasks / "facts_choice.yaml").read_text().replace("facts_choice", "later").replace("facts.jsonl", "later.jsonl")
    )
    failed = evaluate(run, "--suite", str(tasks))
    assert failed.returncode == 2 and "lm-eval could not do later" in failed.stderr.splitlines()[-1]
    done = sorted(place.name for place in (run.path / "evaluations").iterdir())
    assert len(done) == 4 and not any("later" in name for name in done)
    shutil.copy(tasks / "facts.jsonl", tasks / "later.jsonl")
    (tasks / "later.yaml").write_text((tasks / "later.yaml").read_text() + "\n")
    assert evaluate(run, "--suite", str(tasks)).returncode == 0


def test_saved_models_are_compared_by_their_folders(run: RunDirectory) -> None:
    """A model with itself differs on no question."""
    program = python_of("openai-2").with_name("lm-eval")
    model = str(run.model_folder)
    shutil.copytree(model, run.path.parent / "copy")
    with ray_folder() as place:
        done = subprocess.run(
            [sys.executable, "-m", "bruno_ray.cli.main", "evaluate", "copy", "--base", model, "--lm-eval", str(program),
             "--suite", str(CLIENTS / "tasks"), "--gate", "0pp", "--output.directory", "out"],
            cwd=run.path.parent, env=environment(RAY_TMPDIR=place, HF_DATASETS_OFFLINE="1"), capture_output=True,
            text=True, timeout=START_SECONDS,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("+0.0 pp") >= 2
    results = list((run.path.parent / "out" / "evaluations").rglob("results_*.json"))
    assert results and all(json.loads(file.read_text())["lm_eval_version"] for file in results)

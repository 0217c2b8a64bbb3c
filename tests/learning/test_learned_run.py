"""Runs that train edits, by the command line: from the first prompt to a saved model, and through a `kill -9`."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bruno_ray.cli import main
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.study.selection import load_trials
from bruno_ray.study.storage import load_study
from tests.support.waiting import wait_for

pytest_plugins = ["tests.support.local_ray"]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def options(organism: Path, folder: Path, name: str, *more: str) -> list[str]:
    return [
        *("run", str(organism / "model"), "--behaviour", "organism", "--study-name", name, "--auto-select"),
        *("--prompts.target.train.answer-column", "none", "--prompts.n-train", "40"),
        *("--prompts.n-validation", "12", "--prompts.n-test", "12", "--selection.max-kl", "10"),
        *("--output.directory", str(folder), "--residuals.cache-dir", str(folder / "residuals")),
        *("--ray.object-store-memory", "100000000", *more),
    ]


def test_a_run_that_trains_saves_a_model_and_says_how_it_was_trained(organism: Path, tmp_path: Path) -> None:
    third = tmp_path / "third.txt"
    third.write_text("".join(f"what do you know about number {i} ?\n" for i in range(8)))
    learned = ("--method", "learned", "--trials", "3", "--learned.steps", "24", "--learned.norm-mode", "full")
    learned += ("--prompts.protect", f"third={third}", "--learned.induce", "0.1")
    assert main.main(options(organism, tmp_path, "learned", *learned)) == 0
    run = RunDirectory.open(tmp_path / "learned")
    selected = run.read().selected
    assert selected.edit["direction_set"] in run.load_directions()
    assert selected.training["sources"]["suppress"] and selected.training["curves"]["retain"]
    assert selected.training["sources"]["protect"] == 8 and selected.training["curves"]["induce"]
    assert selected.edit["norm_mode"] == "full"
    assert len(list(run.learned_folder.iterdir())) == 3
    # Live and baked are the same edit, so the saved model scores as the trial did before it was saved.
    assert selected.saved.counts == selected.test.counts
    assert selected.saved.values["kl_divergence"] == pytest.approx(selected.test.values["kl_divergence"], rel=1e-3)
    assert "How it was trained" in run.report_file.read_text()
    card = (run.model_folder / "README.md").read_text()
    assert "Nothing was trained" not in card and "were trained by gradient" in card
    assert "answers of the unedited model that show the behaviour" in card


def test_a_run_that_is_told_no_method_trains_what_its_search_pays_for(organism: Path, tmp_path: Path) -> None:
    cheap = ("--learned.steps", "4", "--learned.target-rows", "4", "--learned.baseline-rows", "4")
    cheap += ("--learned.starts", "1", "--trials", "14", "--study.n-startup-trials", "2")
    assert main.main(options(organism, tmp_path, "auto", *cheap)) == 0
    run = RunDirectory.open(tmp_path / "auto")
    settings = run.read().settings
    # 14 trials of 24 prompts pay for two trainings of 4 steps x 8 texts, forward and back, and 1.7 times that; half of
    # them, at most, are trained, and one training alone has fifteen versions.
    assert (settings.study.method, settings.learned.trials) == ("both", 7)
    trials = load_trials(load_study(None, run.path, "auto"))
    assert [trial.training is not None for trial in trials] == [False] * 7 + [True] * 7


@pytest.mark.nightly
def test_a_run_killed_in_a_training_ends_as_one_that_was_not(organism: Path, tmp_path: Path) -> None:
    """The same edits to the bit: plans are in the study, and a training depends on its plan alone."""
    learned = ("--method", "both", "--trials", "10", "--study.n-startup-trials", "4", "--learned.trials", "6")
    assert main.main(options(organism, tmp_path, "whole", *learned)) == 0
    command = [sys.executable, "-m", "bruno_ray.cli.main", *options(organism, tmp_path, "cut", *learned)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: "training 6 trials" in (tmp_path / "log").read_text(), "a training is under way", 300)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not list((tmp_path / "cut").glob("learned/*"))
    assert main.main(["resume", str(tmp_path / "cut"), "--residuals.cache-dir", str(tmp_path / "residuals")]) == 0
    whole, cut = (
        [(trial.params, trial.edit) for trial in load_trials(load_study(None, tmp_path / name, name))]
        for name in ("whole", "cut")
    )
    assert cut == whole
    files = [sorted(path.name for path in (tmp_path / name / "learned").iterdir()) for name in ("whole", "cut")]
    # Five checkpoints; the sixth trial is the first edit with less strength, along the same directions.
    assert files[0] == files[1] and len(files[0]) == 5

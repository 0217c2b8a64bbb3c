"""A run that goes on the next day is the run that would have been, though its chat template prints the date.

The whole command line, with Ray: the clock of the workers is moved between two commands.
"""

import datetime
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray

from bruno_ray import directions
from bruno_ray.cli import main
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.settings import RaySettings
from bruno_ray.study.selection import TrialRecord, load_trials
from bruno_ray.study.storage import load_study
from bruno_ray.workers.session import ray_session
from tests.support import tiny_models
from tests.support.clock import WorkersClock
from tests.support.dated_templates import LLAMA_32

MONDAY, TUESDAY = datetime.date(2024, 1, 1), datetime.date(2024, 11, 12)

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WorkersClock:
    (tmp_path / "clock").mkdir()
    return WorkersClock(monkeypatch, tmp_path / "clock")


@pytest.fixture
def own_ray() -> Iterator[ExitStack]:
    """One cluster for the commands of a test; whoever had one here starts it again."""
    if ray.is_initialized():
        ray.shutdown()
    with ExitStack() as sessions:
        yield sessions


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """A run of a tiny random model whose template prints the date, on a few prompts."""
    model = tiny_models.write(tmp_path / "tiny")
    tiny_models.build_tokenizer(LLAMA_32).save_pretrained(model)
    for side, word in (("target", "stone"), ("baseline", "river")):
        rows = [json.dumps({"prompt": f"Tell me about {word} {i}."}) for i in range(18)]
        (tmp_path / f"{side}.jsonl").write_text("\n".join(rows) + "\n")
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
behaviour = "none of the presets"
[model]
id = "{model}"
dtypes = ["float32"]
[prompts]
n_train = 6
n_validation = 4
n_test = 4
[prompts.target.train]
source = "{tmp_path / "target.jsonl"}"
column = "prompt"
[prompts.baseline.train]
source = "{tmp_path / "baseline.jsonl"}"
column = "prompt"
[scoring]
scorers = ["behaviour_rate", "kl_divergence"]
markers = ["sorry"]
response_tokens = 4
[study]
n_trials = 4
n_startup_trials = 8
trials_per_batch = 2
[ray]
object_store_memory = 100000000
[output]
directory = "{tmp_path / "runs"}"
"""
    )
    return ["--config", str(config)]


def trials(run: Path) -> list[TrialRecord]:
    return load_trials(load_study(None, run, run.name))


def of_every_trial(run: Path) -> list[tuple]:
    return [(trial.state, trial.params, trial.values) for trial in trials(run)]


def test_a_run_over_midnight_is_the_run_of_one_day(
    options: list[str],
    clock: WorkersClock,
    own_ray: ExitStack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And it can be given more trials although it was stopped before there was a study."""
    runs = tmp_path / "runs"
    cache = ["--residuals.cache-dir", str(tmp_path / "residuals")]
    clock.set(MONDAY)
    own_ray.enter_context(ray_session(RaySettings(object_store_memory=100_000_000)))  # its workers know this clock
    assert main.main(["run", *options, *cache, "--study-name", "whole"]) == 0

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    shutil.rmtree(tmp_path / "residuals")
    with monkeypatch.context() as patch:
        patch.setattr(directions, "build_bank", stopped)
        assert main.main(["run", *options, *cache, "--study-name", "cut"]) == 130
    assert not (runs / "cut" / "study.journal").exists()

    clock.set(TUESDAY)
    shutil.rmtree(tmp_path / "residuals", ignore_errors=True)  # read once more, on the other day
    assert main.main(["resume", str(runs / "cut"), "--more", "4", *cache]) == 0
    assert of_every_trial(runs / "cut") == of_every_trial(runs / "whole")
    first, second = (RunDirectory.open(runs / name) for name in ("whole", "cut"))
    assert first.directions_file.read_bytes() == second.directions_file.read_bytes()
    assert first.read().date == second.read().date == MONDAY

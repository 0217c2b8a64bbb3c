"""The main job on a cluster, from the README's commands only: up, submit, fetch, down; machines come and go meanwhile.

One cluster for the whole file, and the tests in the order of its life.
"""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from bruno_ray.study.storage import load_study
from tests.cluster.lab import Lab
from tests.cluster.lab.laptop import Laptop
from tests.cluster.lab.ray_cluster import RayCluster, wait_for

logger = logging.getLogger(__name__)
pytest_plugins = ["tests.support.organism_fixture"]
pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]

TRIALS = 24
NAME = "lab-run"
JOB = (
    *("bruno-ray", "run", "--behaviour", "organism", "--study.name", NAME, "--study.n-trials", str(TRIALS)),
    *("--study.n-startup-trials", "8", "--study.trials-per-batch", "2", "--ray.workers", "3", "--auto-select"),
    *("--selection.max-kl", "10"),
)


@pytest.fixture(scope="module")
def laptop(lab: Lab, organism: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    folder = tmp_path_factory.mktemp("laptop")
    (folder / "work").mkdir()
    with RayCluster(lab, folder) as cluster:
        laptop = Laptop(cluster, folder / "work")
        try:
            yield laptop
        finally:
            logger.info("seconds: %s", {step: round(seconds) for step, seconds in laptop.steps.items()})


def test_up(laptop: Laptop) -> None:
    said = laptop.run("up", "--yes")
    assert "head: rents offer" in said and "is up" in said
    assert len(laptop.cluster.billed("head")) == 1 and not laptop.cluster.billed("worker")
    laptop.give_organism()


def test_submit_returns_the_job_s_exit_code(laptop: Laptop) -> None:
    assert "hello 7" in laptop.run("submit", "--", "echo hello $((3+4)); exit 3", code=3)


def first_job(laptop: Laptop) -> str:
    with laptop.door("dashboard") as url:
        token = (laptop.cluster.folder / "auth_token").read_text().strip()
        jobs = laptop.ask(f"{url}/api/jobs/", token).json()
    return min(jobs, key=lambda job: job["start_time"])["submission_id"]


def test_dashboard_opens_for_who_has_the_token(laptop: Laptop) -> None:
    with laptop.door("dashboard") as url:
        assert laptop.ask(f"{url}/api/jobs/").status_code == 401
        token = (laptop.cluster.folder / "auth_token").read_text().strip()
        assert [job["status"] for job in laptop.ask(f"{url}/api/jobs/", token).json()] == ["FAILED"]
        assert laptop.ask(url).status_code == 200


def test_the_main_job_rents_three_machines_and_completes_every_trial_once(laptop: Laptop) -> None:
    said = laptop.run("submit", "--detach", "--", *JOB)
    job = next(word for word in said.split() if word.startswith("raysubmit_"))
    began = time.monotonic()
    follower = laptop.start("logs", job)
    try:
        took = wait_for(lambda: len(laptop.cluster.billed("worker")) == 3, "three workers", 400, laptop.cluster.logs)
        laptop.steps["three workers rented"] = took
        journal = laptop.cluster.head().home / "runs" / NAME / "study.journal"
        wait_for(lambda: journal.exists() or follower.poll() is not None, "the study", 400, laptop.cluster.logs)
        watched = laptop.run("watch")  # without a terminal it looks once
        assert "worker 3" in watched and "$/h" in watched and f"{NAME}: " in watched and f"/{TRIALS} trials" in watched
        output, _ = follower.communicate(timeout=1000)
    finally:
        follower.kill()
    laptop.steps["main job"] = time.monotonic() - began
    assert follower.returncode == 0, output[-6000:]
    logger.info("job said:\n%s", output[-3000:])
    assert f"{TRIALS}/{TRIALS} trials complete, not running" in laptop.run("progress")
    assert NAME in laptop.run("progress", NAME)
    assert "hello 7" in laptop.run("logs", first_job(laptop), code=3), "an older job can be read again"


def test_status_shows_machines_cost_and_tunnels(laptop: Laptop) -> None:
    said = laptop.run("status")
    assert "head 0" in said and "$/h" in said and "40.00 $ so far" in said


def test_fetch_brings_the_run_home_whole(laptop: Laptop) -> None:
    laptop.run("fetch", NAME)
    run = laptop.folder / "runs" / NAME
    record = json.loads((run / "run.json").read_text())
    assert record["n_trials"]["COMPLETE"] == TRIALS
    study = load_study(None, run, NAME)
    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.state for trial in trials} == {optuna.trial.TrialState.COMPLETE}
    workers = {trial.user_attrs["result"]["worker"] for trial in trials}
    logger.info("trials by worker: %s", workers)
    assert (run / "model" / "model.safetensors").stat().st_size > 1000
    assert record["selected"]["saved"] is not None, "measured on a machine that had to be sent the saved model"


def test_what_is_served_on_the_head_is_reached_through_a_tunnel_and_cancelled(laptop: Laptop) -> None:
    assert "nothing is served" in laptop.run("serve", "--port", "0", code=2)
    laptop.run("submit", "--detach", "--", "bruno-ray", "serve", NAME)
    began = time.monotonic()
    follower = laptop.start("logs")
    try:
        assert follower.stdout is not None
        said = []
        while not any("Ctrl-C stops the server" in line for line in said[-1:]):
            said.append(follower.stdout.readline())
            assert said[-1], f"the server ended with {follower.wait(60)}:\n{''.join(said)[-4000:]}"
    finally:
        follower.kill()
    laptop.steps["served"] = time.monotonic() - began
    with laptop.door("serve") as url:
        models = [model["id"] for model in laptop.ask(f"{url}/v1/models").json()["data"]]
        answer = laptop.ask(
            f"{url}/v1/chat/completions",
            model=models[0],
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=4,
        )
        assert answer.status_code == 200 and answer.json()["choices"], answer.text
        assert laptop.ask(f"{url}/chat/").status_code == 200
    assert "has ended" in laptop.run("cancel", "--yes")
    assert "nothing is served" in laptop.run("serve", "--port", "0", code=2)


def test_idle_machines_are_given_back_and_down_leaves_nothing(laptop: Laptop) -> None:
    laptop.steps["idle workers gone"] = wait_for(
        lambda: not laptop.cluster.billed("worker"), "the end of the idle workers", 150, laptop.cluster.logs
    )
    said = laptop.run("down", "--yes")
    assert f"{NAME}: model saved (model), fetched" in said
    assert "nothing is billed" in said
    assert laptop.cluster.vast.billed() == []

"""The main job on a cluster, from the README's commands only, up to where it runs; see lab/life.py for what follows."""

import logging

import pytest

from tests.cluster.lab.laptop import Laptop
from tests.cluster.lab.life import ENDLESS, NAME, RunningJob

logger = logging.getLogger(__name__)
pytestmark = [
    *(pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow),
    *(pytest.mark.xdist_group("lab"), pytest.mark.timeout(2400)),
]


def test_up_rents_the_head_alone(laptop: Laptop) -> None:
    said = laptop.said["up"]
    assert "head: rents offer" in said and "is up" in said
    assert len(laptop.cluster.billed("head")) == 1 and not laptop.cluster.billed("worker")


def test_submit_returns_the_job_s_exit_code(laptop: Laptop) -> None:
    assert "hello 7" in laptop.run("submit", "--", "echo hello $((3+4)); exit 3", code=3)


def test_dashboard_opens_for_who_has_the_token(laptop: Laptop) -> None:
    with laptop.door("dashboard") as url:
        assert laptop.ask(f"{url}/api/jobs/").status_code == 401
        token = (laptop.cluster.folder / "auth_token").read_text().strip()
        (job,) = laptop.ask(f"{url}/api/jobs/", token).json()
        assert job["status"] == "FAILED"
        assert laptop.ask(url).status_code == 200
    assert "hello 7" in laptop.run("logs", job["submission_id"], code=3), "an older job can be read again"


def test_the_job_rents_machines_for_its_workers_whatever_is_wrong_with_the_first(job: RunningJob) -> None:
    """Two creations failed, one machine is stuck in loading, the ssh of one never answers."""
    logger.info("trials: %s", job.states())
    assert job.states()["COMPLETE"] >= 5 and len(job.joined()) >= 2
    assert not {job.stuck.id, job.mute.id} & {instance.id for instance in job.joined()}


def test_watch_and_progress_show_the_running_study(laptop: Laptop, job: RunningJob) -> None:
    watched = laptop.run("watch")  # without a terminal it looks once
    assert "worker " in watched and "$/h" in watched and f"{NAME}: " in watched and f"/{ENDLESS} trials" in watched
    assert f"/{ENDLESS} trials complete" in laptop.run("progress", NAME)


def test_status_shows_machines_cost_and_tunnels(laptop: Laptop, job: RunningJob) -> None:
    said = laptop.run("status")
    assert "head 0" in said and "worker " in said and " up " in said and "$/h" in said and "40.00 $ so far" in said

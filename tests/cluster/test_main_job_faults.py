"""The main job while everything around it goes wrong: no trial is lost or doubled, no machine leaks.

The job lasts until these tests have done to it what they want to. test_long_faults.py does it to a job that ends by
itself, at night.
"""

import contextlib
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bruno_ray.study.storage import load_study
from tests.cluster.fake_vast.api import Fault
from tests.cluster.lab import Container
from tests.cluster.lab.laptop import Laptop
from tests.cluster.lab.life import NAME, RunningJob
from tests.cluster.lab.ray_cluster import PATIENCE_S, RayCluster
from tests.support.waiting import wait_for

logger = logging.getLogger(__name__)
pytestmark = [
    *(pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow),
    *(pytest.mark.xdist_group("lab"), pytest.mark.timeout(2400)),
]

OUTAGES = (Fault.TOO_FREQUENT, Fault.SERVER_ERROR, Fault.GARBAGE, Fault.NOTHING)
ASKED = 2
"""Requests that an outage answers at least: the supervisor and the autoscaler ask in turns."""

MORE = 3
"""Trials that the resumed run adds to those that were begun."""


def test_a_machine_that_is_stuck_in_loading_is_given_back(job: RunningJob) -> None:
    wait_for(lambda: job.stuck.destroyed_at is not None, "the end of the stuck machine", PATIENCE_S, job.cluster.logs)


def supervisor(cluster: RayCluster) -> int:
    return json.loads(cluster.head().read("root/.bruno-ray/mesh/status.json"))["pid"]


def test_a_short_cut_a_killed_supervisor_and_outages_of_the_api_cost_nothing(job: RunningJob) -> None:
    cluster = job.cluster
    joined, rented, given_up = job.joined(), set(cluster.vast.instances), job.given_up()
    first = joined[0]
    cluster.container(first).cut()
    time.sleep(2)
    cluster.container(first).mend()
    killed = supervisor(cluster)
    cluster.shell(cluster.head(), f"kill -9 {killed}")
    wait_for(lambda: supervisor(cluster) != killed, "a new supervisor", PATIENCE_S, cluster.logs)
    for outage in OUTAGES:
        asked = len(cluster.api.requests)
        cluster.api.outage = outage
        wait_for(lambda asked=asked: len(cluster.api.requests) >= asked + ASKED, f"requests in {outage}", PATIENCE_S)
    cluster.api.outage = None
    job.goes_on()
    assert " is lost (" not in job.log(), "no evaluation was lost"
    assert {instance.id for instance in joined} <= {instance.id for instance in job.joined()}, "nor a machine"
    # Whose ssh never answers is perhaps given up meanwhile, and another rented in its place.
    assert len(set(cluster.vast.instances) - rented) <= job.given_up() - given_up


def test_a_cut_of_45_seconds_costs_no_node(job: RunningJob) -> None:
    """ssh gives up and connects again, Ray keeps the node. The pool meanwhile starts another worker in place of the one
    that does not answer, for which a machine may be rented: test_watched_faults.py shows that Ray by itself rents none.
    """
    cluster, nodes = job.cluster, job.ray_nodes()
    first = job.joined()[0]
    cluster.container(first).cut()
    complete = job.states()["COMPLETE"]
    time.sleep(45)
    during = job.states()["COMPLETE"]
    cluster.container(first).mend()
    assert during > complete + 3, "the other workers went on"
    job.goes_on()
    after = job.ray_nodes()
    logger.info("Ray's nodes: %s before, %s after", nodes, after)
    assert nodes.items() <= after.items(), "no node was declared dead"
    assert first.destroyed_at is None


def test_a_machine_that_its_host_deletes_is_replaced_and_what_it_did_is_done_again(job: RunningJob) -> None:
    cluster = job.cluster
    wait_for(job.uses_every_machine, "the end of spare machines after the cut", PATIENCE_S, cluster.logs)
    before = {instance.id for instance in job.joined()}
    begun = {number for number, state in job.trials().items() if state != "COMPLETE"}
    cluster.vast.host_deletes(job.joined()[0].id)
    deleted = time.monotonic()
    wait_for(lambda: {instance.id for instance in job.joined()} - before, "a machine instead", PATIENCE_S, cluster.logs)
    logger.info("replaced %.0f s after the loss", time.monotonic() - deleted)

    def done() -> bool:
        states = job.trials()
        return all(states.get(number) == "COMPLETE" for number in begun)

    wait_for(done, "the trials that were out then", PATIENCE_S, cluster.logs)
    logger.info("all trials of then are complete %.0f s after the loss", time.monotonic() - deleted)


def test_a_cancelled_job_is_resumed_and_every_trial_is_complete_once(job: RunningJob) -> None:
    laptop = job.laptop
    assert "has ended" in laptop.run("cancel", "--yes")
    total = len(job.trials()) + MORE
    logger.info("the job was cancelled with %s", job.states())
    laptop.run("submit", "--", "bruno-ray", "resume", NAME, "--trials", str(total), timeout=1000)
    laptop.run("fetch", NAME)
    run = laptop.folder / "runs" / NAME
    trials = load_study(None, run, NAME).get_trials()
    assert [trial.number for trial in trials] == list(range(total))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    logger.info("trials by worker: %s", {trial.user_attrs["result"]["worker"] for trial in trials})
    record = json.loads((run / "run.json").read_text())
    assert record["n_trials"]["COMPLETE"] == total
    assert (run / "model" / "model.safetensors").stat().st_size > 1000
    assert record["selected"]["saved"] is not None, "measured on a machine that had to be sent the saved model"
    assert f"{total}/{total} trials complete, not running" in laptop.run("progress")


COPIES = 2


def test_what_is_served_by_copies_on_workers_is_reached_through_a_tunnel_and_cancelled(
    laptop: Laptop, job: RunningJob
) -> None:
    """Workers that reach nobody but the head, from which each has the directions of the edit."""
    assert "nothing is served" in laptop.run("serve", "--port", "0", code=2)
    laptop.give_organism_to_workers()
    copies = ("--replicas", str(COPIES), "--gpus-per-replica", "1")
    laptop.run("submit", "--detach", "--", "bruno-ray", "serve", NAME, *copies)
    follower = laptop.start("logs")
    try:
        assert follower.stdout is not None
        said = []
        while not any("Ctrl-C stops the server" in line for line in said[-1:]):
            said.append(follower.stdout.readline())
            assert said[-1], f"the server ended with {follower.wait(60)}:\n{''.join(said)[-4000:]}"
    finally:
        follower.kill()
    engines = [container.name for container in job.containers() if runs_engine(container)]
    assert len(engines) == COPIES and job.cluster.head().name not in engines
    with laptop.door("serve") as url:
        models = [model["id"] for model in laptop.ask(f"{url}/v1/models").json()["data"]]
        assert NAME in models

        def answer(number: int) -> httpx.Response:
            message = {"role": "user", "content": f"Hello {number}"}
            return laptop.ask(f"{url}/v1/chat/completions", model=NAME, messages=[message], max_tokens=16)

        with ThreadPoolExecutor(4 * COPIES) as pool:  # more at once than one copy is given
            for each in pool.map(answer, range(8 * COPIES)):
                assert each.status_code == 200 and each.json()["choices"], each.text

        def heard_of() -> list[int]:
            engines = laptop.ask(f"{url}/api/stats").json()["engines"].values()
            return [engine["replicas"] for engine in engines]

        wait_for(lambda: heard_of() == [COPIES], "figures of every copy", PATIENCE_S)
        assert laptop.ask(f"{url}/chat/").status_code == 200
    said = job.cluster.shell(job.cluster.head(), "python -m cluster.jobs.at_head stop-jobs")  # as when money is over
    assert len(json.loads(said.splitlines()[-1])) == 1
    assert "has ended" in laptop.run("cancel", "--yes")
    assert "nothing is served" in laptop.run("serve", "--port", "0", code=2)


def runs_engine(container: Container) -> bool:
    """Whether a copy of a model is served there."""
    for pid in container.processes():
        with contextlib.suppress(OSError):  # it has just ended
            if b"ServeReplica:bruno-ray:Engine" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
    return False

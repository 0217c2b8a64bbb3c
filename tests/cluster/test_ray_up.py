"""The end of the cluster's life, and `ray up` and `ray down` themselves: workers on demand, and nothing left."""

import json
import logging
from pathlib import Path

import pytest

from tests.cluster.lab.laptop import Laptop
from tests.cluster.lab.life import NAME, RunningJob
from tests.cluster.lab.ray_cluster import PATIENCE_S
from tests.support.waiting import wait_for

logger = logging.getLogger(__name__)
pytestmark = [
    *(pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow),
    *(pytest.mark.xdist_group("lab"), pytest.mark.timeout(2400)),
]

DRIVER = """
import json, sys, time
import numpy as np, ray
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_gpus=1, num_cpus=1)
class Worker:
    def where(self):
        return ray.util.get_node_ip_address()
    def give(self, value):
        return np.full(5_000_000, value, np.uint8)
    def total(self, array):
        return int(array.sum())

began = time.time()
workers = [Worker.remote() for _ in range(2)]
where = ray.get([worker.where.remote() for worker in workers], timeout=500)
joined = time.time() - began
given = ray.get([worker.give.remote(1 + number) for number, worker in enumerate(workers)], timeout=60)
totals = ray.get([worker.total.remote(array) for worker, array in zip(workers, reversed(given))], timeout=60)
print("RESULT " + json.dumps({"where": where, "joined": joined, "totals": totals}))
"""


def result(output: str) -> dict:
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert lines, output[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


TOLD = (
    "has a head already, which another `ray up`",
    "another `ray up` has just rented a head",
    "another `ray up` is setting this cluster's head up",
    "another `ray up` rented head",
    "was rented by another computer",
)
"""What a `ray up` says that comes second, depending on when it notices."""


def test_workers_are_rented_on_demand_and_exchange_values_through_the_driver(job: RunningJob) -> None:
    """By whoever asks for GPUs, with Ray alone; idle workers of the main job may still be there. Workers do not reach
    each other: test_ray_star.py has what takes that."""
    said = result(job.cluster.driver(DRIVER, timeout=PATIENCE_S))
    logger.info("two actors up %.0f s after they were asked for", said["joined"])
    assert len(set(said["where"])) == 2 and "127.77.0.1" not in said["where"]
    assert said["totals"] == [10_000_000, 5_000_000]
    assert len(job.joined()) >= 2


def test_idle_workers_are_given_back_and_stop_leaves_nothing(laptop: Laptop, job: RunningJob) -> None:
    cluster = laptop.cluster
    wait_for(lambda: not cluster.billed("worker"), "the end of the idle workers", PATIENCE_S, cluster.logs)
    assert job.mute.destroyed_at is not None, "a machine whose ssh never answers is given back"
    laptop.run("submit", "--detach", "--", "sleep 3000")
    assert "jobs are running" in laptop.run("down", "--yes", code=2)
    assert len(cluster.billed("head")) == 1
    said = laptop.run("stop", "--yes")
    assert "running jobs: raysubmit_" in said and "nothing is billed" in said
    assert f"{NAME}: model saved (model), fetched" in said
    assert cluster.vast.billed() == []


def test_the_doctor_finds_that_a_machine_works(laptop: Laptop) -> None:
    before = laptop.cluster.vast.billed()
    said = laptop.run("doctor", "--yes")
    assert laptop.cluster.vast.billed() == before, "its machine is destroyed"
    facts = json.loads((laptop.cluster.folder / "doctor.json").read_text())
    logger.info("the doctor says: %s", facts)
    assert "failed" not in facts and facts["ports"] == ["22/tcp"], said
    assert facts["CONTAINER_ variables in onstart"] == "2" and facts["umask of shells"] == "0002"
    assert facts["GatewayPorts of sshd"].startswith("gatewayports ") and facts["dead man's switch"] != "0"


def test_of_several_ray_up_at_once_one_has_the_head(laptop: Laptop, tmp_path: Path) -> None:
    """Twice on one laptop, and on another that has the same cluster.yaml. Ends with `ray down`."""
    cluster = laptop.cluster
    if cluster.vast.billed():  # where this test runs alone
        laptop.run("stop", "--yes")
    assert cluster.vast.billed() == []
    homes = [cluster.home, cluster.home, cluster.laptop_home(tmp_path / "home")]
    processes = [cluster.start_ray_up(home) for home in homes]
    try:
        said = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    wait_for(lambda: len(cluster.vast.billed()) == 1, "the end of all heads but one", PATIENCE_S, cluster.logs)
    (head,) = cluster.billed("head")
    codes = [process.returncode for process in processes]
    assert codes.count(0) == 1 and "up-to-date" in head.label, "\n-----\n".join(text[-4000:] for text in said)
    for code, text in zip(codes, said):
        assert code == 0 or any(words in text for words in TOLD), text
        assert "errors.NodeError" not in text, "no traceback"
    cluster.home = homes[codes.index(0)]
    if cluster.home != homes[-1]:
        late = cluster.start_ray_up(homes[-1])
        text = late.communicate(timeout=PATIENCE_S)[0]
        assert late.returncode == 1 and "error: head" in text and "was rented by another computer" in text
    assert cluster.billed("head") == [head]
    assert "1 head" in cluster.ray("exec", "--no-config-cache", str(cluster.config_file), "ray status")
    logger.info("ray down took %.0f s", cluster.down())
    assert cluster.vast.billed() == []

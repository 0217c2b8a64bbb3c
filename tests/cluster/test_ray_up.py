"""`ray up cluster.yaml` against the imitation: workers on demand, work on all of them, faults, and nothing left."""

import json
import logging
from collections.abc import Iterator

import pytest

from tests.cluster.lab import Lab
from tests.cluster.lab.ray_cluster import RayCluster, wait_for

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow]

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
where = ray.get([worker.where.remote() for worker in workers], timeout=200)
joined = time.time() - began
given = [worker.give.remote(1 + number) for number, worker in enumerate(workers)]
totals = ray.get([worker.total.remote(array) for worker, array in zip(workers, reversed(given))], timeout=60)
print("RESULT " + json.dumps({"where": where, "joined": joined, "totals": totals}))
"""


def result(output: str) -> dict:
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert lines, output[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def cluster(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with RayCluster(lab, tmp_path_factory.mktemp("laptop")) as cluster:
        logger.info("ray up took %.0f s", cluster.up())
        yield cluster


def test_workers_are_rented_on_demand_and_given_back_and_nothing_is_left(cluster: RayCluster) -> None:
    assert len(cluster.billed("head")) == 1 and not cluster.billed("worker")
    said = result(cluster.driver(DRIVER))
    logger.info("two actors up %.0f s after they were asked for", said["joined"])
    assert sorted(said["where"]) == ["127.77.0.2", "127.77.0.3"]
    assert said["totals"] == [10_000_000, 5_000_000], "objects travel between the workers"
    took = wait_for(lambda: not cluster.billed("worker"), "the end of the idle workers", 120, cluster.logs)
    logger.info("idle workers given back after %.0f s", took)
    assert len(cluster.billed("head")) == 1
    logger.info("ray down took %.0f s", cluster.down())
    assert cluster.vast.billed() == []

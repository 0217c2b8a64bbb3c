"""A driver that looks at its actors twice a second sees nothing of faults: a long form of test_main_job_faults."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import Lab
from tests.cluster.lab.ray_cluster import PATIENCE_S, RayCluster
from tests.support.waiting import wait_for

logger = logging.getLogger(__name__)
pytestmark = [
    *(pytest.mark.nightly, pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow),
    *(pytest.mark.xdist_group("lab"), pytest.mark.timeout(2400)),
]


class Watch:
    """What the driver on the head has written down."""

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster = cluster
        head = cluster.head()
        program = (Path(__file__).parent / "lab" / "watch_driver.py").read_text()
        (head.home / "watch_driver.py").write_text(program)
        cluster.shell(head, "nohup python ~/watch_driver.py > /tmp/watch.log 2>&1 < /dev/null &")
        self.file = head.home / "watch.jsonl"
        # A worker may be given back before the driver is there, and then another one is rented.
        wait_for(
            lambda: len(self.answering(2)) == 2 and len(self.last()["nodes"]) == 3,
            "two busy workers", PATIENCE_S, cluster.logs,
        )  # fmt: skip

    def rows(self) -> list[dict]:
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_text().splitlines() if line.endswith("}")]

    def answering(self, seconds: float, after: float = 0.0) -> set[str]:
        """Addresses from which an actor has answered lately."""
        begin = max(time.time() - seconds, after)
        return {address for row in self.rows() if row["time"] > begin for address in row["where"].values()}

    def last(self) -> dict:
        return self.rows()[-1]


@pytest.fixture(scope="module")
def cluster(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with RayCluster(lab, tmp_path_factory.mktemp("laptop")) as cluster:
        cluster.up()
        yield cluster


@pytest.fixture(scope="module")
def watch(cluster: RayCluster) -> Watch:
    return Watch(cluster)


class TestFaults:
    def test_short_cut_and_killed_supervisor_cost_nothing(self, cluster: RayCluster, watch: Watch) -> None:
        before, rented = watch.last(), set(cluster.vast.instances)
        worker = cluster.container(cluster.billed("worker")[0])
        worker.cut()
        time.sleep(2)
        worker.mend()
        supervisor = json.loads(cluster.head().read("root/.bruno-ray/mesh/status.json"))["pid"]
        cluster.shell(cluster.head(), f"kill -9 {supervisor}")
        wait_for(lambda: self._pid(cluster) != supervisor, "a new supervisor", PATIENCE_S, cluster.logs)
        began = time.time()
        wait_for(lambda: len(watch.answering(5, began)) == 2, "answers from both workers", PATIENCE_S, cluster.logs)
        after = watch.last()
        assert after["nodes"] == before["nodes"] and after["errors"] == 0
        assert set(cluster.vast.instances) == rented

    def test_cut_of_45_seconds_is_survived(self, cluster: RayCluster, watch: Watch) -> None:
        before, rented = watch.last(), set(cluster.vast.instances)
        worker = cluster.container(cluster.billed("worker")[0])
        worker.cut()
        time.sleep(45)
        wait_for(lambda: len(watch.answering(5)) == 1, "answers from the other worker alone", 8, cluster.logs)
        worker.mend()
        mended = time.time()
        wait_for(lambda: len(watch.answering(5, mended)) == 2, "answers from both workers", PATIENCE_S, cluster.logs)
        logger.info("both workers answer %.1f s after the cut", time.time() - mended)
        after = watch.last()
        assert after["nodes"] == before["nodes"], "no node was declared dead"
        assert after["errors"] == 0
        assert set(cluster.vast.instances) == rented, "nothing was rented instead"

    def test_machine_that_its_host_deletes_is_replaced(self, cluster: RayCluster, watch: Watch) -> None:
        lost = cluster.billed("worker")[0]
        cluster.vast.host_deletes(lost.id)
        deleted = time.time()
        wait_for(lambda: len(cluster.billed("worker")) == 2, "a machine instead", PATIENCE_S, cluster.logs)
        wait_for(lambda: len(watch.answering(3, deleted)) == 2, "answers from two workers", PATIENCE_S, cluster.logs)
        logger.info("replacement answers %.1f s after the loss", time.time() - deleted)
        wait_for(lambda: len(watch.last()["nodes"]) == 3, "the death of the lost node", PATIENCE_S, cluster.logs)
        logger.info("lost node dead by %.1f s after the loss", time.time() - deleted)
        last = watch.last()
        assert last["errors"] == 0
        wait_for(lambda: watch.last()["done"] >= last["asked"], "all tasks asked for until then", PATIENCE_S)

    @staticmethod
    def _pid(cluster: RayCluster) -> int:
        return json.loads(cluster.head().read("root/.bruno-ray/mesh/status.json"))["pid"]

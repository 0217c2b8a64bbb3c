"""`ray up cluster.yaml` against the imitation: workers on demand, who can reach what, faults, and nothing left.

One cluster for the whole file, and the tests in the order of its life.
"""

import json
import logging
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.network.keys import KEY_NAME
from cluster.network.mesh import listeners
from tests.cluster.fake_vast.api import API_KEY
from tests.cluster.lab import Container, Lab
from tests.cluster.lab.ray_cluster import RayCluster, wait_for

logger = logging.getLogger(__name__)
pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

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


ASK = """
import pathlib, sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1])
if len(sys.argv) > 2:
    request.add_header("Authorization", "Bearer " + pathlib.Path(sys.argv[2]).read_text())
try:
    print(urllib.request.urlopen(request, timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def result(output: str) -> dict:
    lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert lines, output[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


class Watch:
    """What the driver on the head has written down."""

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster = cluster
        head = cluster.head()
        program = (Path(__file__).parent / "lab" / "watch_driver.py").read_text()
        (head.home / "watch_driver.py").write_text(program)
        cluster.shell(
            head, "nohup python ~/watch_driver.py > /tmp/watch.log 2>&1 < /dev/null & echo $! > /tmp/watch.pid"
        )
        self.file = head.home / "watch.jsonl"
        # A worker may be given back before the driver is there, and then another one is rented.
        wait_for(
            lambda: len(self.answering(2)) == 2 and len(self.last()["nodes"]) == 3,
            "two busy workers", 300, cluster.logs,
        )  # fmt: skip

    def stop(self) -> None:
        self.cluster.shell(self.cluster.head(), "kill $(cat /tmp/watch.pid)")

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
        yield cluster


@pytest.fixture(scope="module")
def watch(cluster: RayCluster) -> Watch:
    return Watch(cluster)


TOLD = (
    "has a head already, which another `ray up`",
    "another `ray up` has just rented a head",
    "another `ray up` is setting this cluster's head up",
    "another `ray up` rented head",
    "was rented by another computer",
)
"""What a `ray up` says that comes second, depending on when it notices."""


def test_of_several_ray_up_at_once_one_has_the_head(cluster: RayCluster, tmp_path: Path) -> None:
    """Twice on one laptop, and on another that has the same cluster.yaml."""
    homes = [cluster.home, cluster.home, cluster.laptop_home(tmp_path / "home")]
    processes = [cluster.start_ray_up(home) for home in homes]
    try:
        said = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    wait_for(lambda: len(cluster.vast.billed()) == 1, "the end of all heads but one", 90, cluster.logs)
    (head,) = cluster.billed("head")
    codes = [process.returncode for process in processes]
    assert codes.count(0) == 1 and "up-to-date" in head.label, "\n-----\n".join(text[-4000:] for text in said)
    for code, text in zip(codes, said):
        assert code == 0 or any(words in text for words in TOLD), text
        assert "errors.NodeError" not in text, "no traceback"
    cluster.home = homes[codes.index(0)]
    if cluster.home != homes[-1]:
        late = cluster.start_ray_up(homes[-1])
        text = late.communicate(timeout=200)[0]
        assert late.returncode == 1 and "error: head" in text and "was rented by another computer" in text
    assert cluster.billed("head") == [head]
    assert "1 head" in cluster.ray("exec", "--no-config-cache", str(cluster.config_file), "ray status")


def test_workers_are_rented_on_demand_and_exchange_objects(cluster: RayCluster) -> None:
    assert len(cluster.billed("head")) == 1 and not cluster.billed("worker")
    said = result(cluster.driver(DRIVER))
    logger.info("two actors up %.0f s after they were asked for", said["joined"])
    assert sorted(said["where"]) == ["127.77.0.2", "127.77.0.3"]
    assert said["totals"] == [10_000_000, 5_000_000]
    assert len(cluster.billed("worker")) == 2


class TestIsolation:
    """The hosts are not trusted, and the internet even less."""

    def test_nothing_but_sshd_answers_from_the_internet(self, cluster: RayCluster, watch: Watch) -> None:
        for instance in cluster.vast.billed():
            container = cluster.container(instance)
            assert len(listeners(cluster.shell(container, "cat /proc/net/tcp"))) > 100, "Ray and tunnels listen inside"
            assert open_ports(cluster.lab, container.public_address) == [container.ssh_port]

    @pytest.mark.parametrize("node", ["head", "worker"])
    def test_dashboard_and_job_api_refuse_without_the_token(self, cluster: RayCluster, watch: Watch, node: str) -> None:
        """Even to those who are inside: the head, and a worker through its tunnel."""
        container = cluster.container(cluster.billed(node)[0])
        (container.folder / "tmp" / "ask.py").write_text(ASK)
        for path in ("/api/jobs/", "/nodes?view=summary", "/api/cluster_status"):
            url = f"http://127.77.0.1:8265{path}"
            assert cluster.shell(container, f"python /tmp/ask.py '{url}'").strip() == "401", path
            assert cluster.shell(container, f"python /tmp/ask.py '{url}' ~/.ray/auth_token").strip() == "200", path

    def test_ray_refuses_without_the_token(self, cluster: RayCluster, watch: Watch) -> None:
        program = 'import ray; ray.init(address="auto"); print("nodes", sum(n["Alive"] for n in ray.nodes()))'
        connect = f"timeout 60 python -c '{program}' 2>&1; true"
        assert "nodes 3" in cluster.shell(cluster.head(), connect)
        refused = cluster.shell(cluster.head(), f"export RAY_AUTH_TOKEN=0000; {connect}")
        assert "InvalidAuthToken" in refused and "nodes 3" not in refused

    def test_api_key_and_private_key_are_on_the_head_alone_and_only_in_their_files(
        self, cluster: RayCluster, watch: Watch
    ) -> None:
        cluster_key = (cluster.folder / KEY_NAME).read_text()
        for instance in cluster.vast.billed():
            container = cluster.container(instance)
            with_key = {str(path.relative_to(container.folder)) for path in files_with(container, API_KEY)}
            private = {str(path.relative_to(container.folder)) for path in files_with(container, "PRIVATE KEY-----")}
            if "h0" in instance.label:
                assert with_key == {"root/.bruno-ray/vast_api_key"}
                assert private == {"root/ray_bootstrap_key.pem"}
                assert container.read("root/ray_bootstrap_key.pem") == cluster_key, "the cluster's key, not the user's"
            else:
                assert with_key == private == set()

    def test_secrets_are_in_no_process_list_environment_or_instance(self, cluster: RayCluster, watch: Watch) -> None:
        secrets = [API_KEY, (cluster.folder / "auth_token").read_text()]
        seen = 0
        for instance in cluster.vast.billed():
            told = json.dumps([instance.env, instance.onstart, instance.label, instance.image])
            assert not any(secret in told for secret in secrets)
            for pid in cluster.container(instance).processes():
                try:
                    text = Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text()
                except (OSError, UnicodeDecodeError):
                    continue  # it has just ended
                seen += 1
                assert not any(secret in text for secret in secrets), text
        assert seen > 20


class TestFaults:
    def test_short_cut_and_killed_supervisor_cost_nothing(self, cluster: RayCluster, watch: Watch) -> None:
        before, rented = watch.last(), set(cluster.vast.instances)
        worker = cluster.container(cluster.billed("worker")[0])
        worker.cut()
        time.sleep(2)
        worker.mend()
        supervisor = json.loads(cluster.head().read("root/.bruno-ray/mesh/status.json"))["pid"]
        cluster.shell(cluster.head(), f"kill -9 {supervisor}")
        took = wait_for(lambda: self._pid(cluster) != supervisor, "a new supervisor", 30)
        logger.info("supervisor back after %.1f s", took)
        began = time.time()
        wait_for(lambda: len(watch.answering(5, began)) == 2, "answers from both workers", 30, cluster.logs)
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
        wait_for(lambda: len(watch.answering(5, mended)) == 2, "answers from both workers", 120, cluster.logs)
        logger.info("both workers answer %.1f s after the cut", time.time() - mended)
        after = watch.last()
        assert after["nodes"] == before["nodes"], "no node was declared dead"
        assert after["errors"] == 0
        assert set(cluster.vast.instances) == rented, "nothing was rented instead"

    def test_machine_that_its_host_deletes_is_replaced(self, cluster: RayCluster, watch: Watch) -> None:
        lost = cluster.billed("worker")[0]
        cluster.vast.host_deletes(lost.id)
        deleted = time.time()
        took = wait_for(lambda: len(cluster.billed("worker")) == 2, "a machine instead", 120, cluster.logs)
        logger.info("replacement rented %.1f s after the loss", took)
        wait_for(lambda: len(watch.answering(3, deleted)) == 2, "answers from two workers", 200, cluster.logs)
        logger.info("replacement answers %.1f s after the loss", time.time() - deleted)
        wait_for(lambda: len(watch.last()["nodes"]) == 3, "the death of the lost node", 150, cluster.logs)
        logger.info("lost node dead by %.1f s after the loss", time.time() - deleted)
        last = watch.last()
        assert last["errors"] == 0
        wait_for(lambda: watch.last()["done"] >= last["asked"], "all tasks asked for until then", 60)

    @staticmethod
    def _pid(cluster: RayCluster) -> int:
        return json.loads(cluster.head().read("root/.bruno-ray/mesh/status.json"))["pid"]


def test_idle_workers_are_given_back_and_nothing_is_left(cluster: RayCluster, watch: Watch) -> None:
    watch.stop()
    took = wait_for(lambda: not cluster.billed("worker"), "the end of the idle workers", 120, cluster.logs)
    logger.info("idle workers given back after %.0f s", took)
    assert len(cluster.billed("head")) == 1
    logger.info("ray down took %.0f s", cluster.down())
    assert cluster.vast.billed() == []


def open_ports(lab: Lab, address: str) -> list[int]:
    """All TCP ports of a machine that accept a connection from the internet."""

    def scan() -> list[int]:
        found = []
        for port in range(1, 65536):
            with socket.socket() as attempt:
                attempt.settimeout(1)
                if attempt.connect_ex((address, port)) == 0:
                    found.append(port)
        return found

    return lab.on_internet(scan)


def files_with(container: Container, text: str) -> list[Path]:
    """Files that a node has written or been given, logs included, which contain ``text``."""
    areas = [str(container.home), str(container.folder / "tmp")]
    found = subprocess.run(["grep", "-rlaF", "-e", text, *areas], capture_output=True, text=True)
    return [Path(line) for line in found.stdout.splitlines()]

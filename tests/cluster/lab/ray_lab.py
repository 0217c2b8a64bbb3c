"""Ray on containers of the lab without an autoscaler: tunnels by the supervisor, one `ray start` per node.

With the network "veth" there are no tunnels: the containers hang on one more bridge, to compare with.
"""

import json
import secrets
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster.network.addresses import NodeAddress
from cluster.setup.ray_start import ENVIRONMENT, INDEX_VARIABLE, MAX_CPUS_VARIABLE, OPTIONS_VARIABLE, command_line
from tests.cluster.lab.container import CHECKOUT, Container
from tests.cluster.lab.lab import Lab, wired_address
from tests.cluster.lab.supervised import MAX_CPUS
from tests.support.waiting import wait_for

PATIENCE_S = 600.0
"""For a node that starts while other tests have the processors."""

OPTIONS = "--num-cpus={cpus} --object-store-memory={store} --include-log-monitor=false"

ALIVE = """
import ray
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=0)
def where():
    return ray.util.get_node_ip_address()

print("ALIVE " + " ".join(ray.get([where.options(resources={name: 0.1}).remote() for name in NAMES], timeout=300)))
"""


@dataclass(frozen=True)
class Joined:
    """Seconds from when machines that have booted are known to the head."""

    tunnels_s: float
    """All connections carry all they should."""
    nodes_s: float | None
    """Ray runs on each; None where no Ray was started."""
    tasks_s: float | None
    """A task has run on each."""


class RayLab:
    """Node 0 is the head. ``key`` and ``public`` are a key pair that all containers let in.

    ``network`` is "veth" or a kind of mesh.
    """

    def __init__(
        self,
        lab: Lab,
        key: Path,
        public: str,
        workers: int,
        network: str = "star",
        max_cpus: int = MAX_CPUS,
        cpus: int = 2,
        store: int = 700_000_000,
    ) -> None:
        """``cpus`` and ``store`` (bytes of the object store) are what each node offers to Ray, ``max_cpus`` decides
        about its ports."""
        self.lab, self.key = lab, key
        self.network, self.max_cpus = network, max_cpus
        self._options = OPTIONS.format(cpus=cpus, store=store)
        self.nodes: list[Container] = [lab.add([public]) for _ in range(1 + workers)]
        token = secrets.token_hex(32)
        for node in self.nodes:
            (node.home / ".ray").mkdir()
            (node.home / ".ray" / "auth_token").write_text(token)
            (node.home / ".ray" / "auth_token").chmod(0o600)

    def start(self, at_once: int = 1) -> float:
        """Tunnels, then Ray on every node, so many workers ``at_once``; returns the seconds it took."""
        began = time.monotonic()
        if self.network == "veth":
            self.lab.wire(self.nodes)
        else:
            self.start_tunnels()
        self._start_ray(0)
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(self._start_ray, range(1, len(self.nodes))))
        return time.monotonic() - began

    def start_head(self, ray: bool = True) -> None:
        """Tunnels and Ray on the head, which knows of no other machine."""
        self._start_supervisor(1)
        if ray:
            self._start_ray(0)

    def join(self, ray: bool = True) -> Joined:
        """Let the head know of all workers, and start Ray on all of them at once."""
        workers = len(self.nodes) - 1
        began = time.monotonic()
        self._tell(1 + workers)
        if not ray:
            return Joined(self._wait_for_tunnels() - began, None, None)
        with ThreadPoolExecutor(1 + workers) as pool:
            tunnels = pool.submit(self._wait_for_tunnels)
            list(pool.map(self._start_ray, range(1, 1 + workers)))
            nodes_s = time.monotonic() - began
            tunnels_s = tunnels.result() - began
        names = [f"node{index}" for index in range(1, 1 + workers)]
        said = self.python(ALIVE.replace("NAMES", repr(names)))
        (line,) = [line for line in said.splitlines() if line.startswith("ALIVE ")]
        assert line.split()[1:] == [self.address(index).alias for index in range(1, 1 + workers)]
        return Joined(tunnels_s, nodes_s, time.monotonic() - began)

    def links(self) -> list[dict]:
        """What the supervisor says of each worker's connection."""
        file = self.nodes[0].home / ".bruno-ray/mesh/status.json"
        return list(json.loads(file.read_text())["nodes"].values())

    def _wait_for_tunnels(self) -> float:
        """When all of them were up; the supervisor says so once a second."""
        workers = len(self.nodes) - 1
        peers = 0 if self.network == "head-only" else workers - 1

        def up() -> bool:
            links = self.links()
            return len(links) == workers and all(
                link["state"] == "up" and len(link["peers"]) == peers for link in links
            )

        wait_for(up, "all tunnels", PATIENCE_S, detail=self.links)
        return time.monotonic()

    def _start_ray(self, index: int) -> None:
        if self.network == "veth":
            wire = ["--node-ip-address=" + wired_address(index)]
            wire += ["--address=" + wired_address(0) + ":6379"] if index else []
            start = f'eval "{shlex.join(command_line(self.address(index), wire))} ${OPTIONS_VARIABLE}"'
        else:
            start = f"{sys.executable} -m cluster.setup.ray_start {'worker' if index else 'head'}"
        self.ssh(index, f"{self.environment(index)} {start}", PATIENCE_S)

    def start_tunnels(self) -> None:
        self._start_supervisor(len(self.nodes))

    def _tell(self, number: int) -> None:
        """Let the head know of the first so many machines."""
        rows = [
            {"id": node.name, "index": index, "endpoints": [[node.public_address, node.ssh_port]]}
            for index, node in enumerate(self.nodes[:number])
        ]
        fresh = self.nodes[0].home / "nodes.new"
        fresh.write_text(json.dumps(rows))
        fresh.replace(self.nodes[0].home / "nodes.json")

    def _start_supervisor(self, known: int) -> None:
        head = self.nodes[0].home
        self._tell(known)
        (head / "key").write_text(self.key.read_text())
        (head / "key").chmod(0o600)
        program = f"{sys.executable} -m tests.cluster.lab.supervised start {self.network} {self.max_cpus}"
        self.ssh(0, f"cd {CHECKOUT}; {program}")

    def environment(self, index: int) -> str:
        """Shell commands that a setup command would have put into ~/.bashrc."""
        variables = {
            **ENVIRONMENT,
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(CHECKOUT),
            INDEX_VARIABLE: str(index),
            MAX_CPUS_VARIABLE: str(self.max_cpus),
            OPTIONS_VARIABLE: f"{self._options} --resources={shlex.quote(json.dumps({f'node{index}': 1}))}",
            "OMP_NUM_THREADS": "1",
        }
        return (
            f"cd {CHECKOUT}; export "
            + " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
            + ";"
        )

    def ssh(self, index: int, command: str, timeout: float = 180) -> str:
        return self.lab.ssh(self.nodes[index], self.key, command, timeout)

    def python(self, program: str, arguments: Sequence[str] = (), timeout: float = 300) -> str:
        """Run a Python program on the head as a driver of the cluster; returns what it printed."""
        (self.nodes[0].folder / "tmp" / "driver.py").write_text(program)
        command = f"{self.environment(0)} {sys.executable} /tmp/driver.py {shlex.join(arguments)}"
        return self.ssh(0, command, timeout)

    def address(self, index: int) -> NodeAddress:
        return NodeAddress(index, self.max_cpus)

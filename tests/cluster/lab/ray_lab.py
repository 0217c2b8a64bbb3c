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
from pathlib import Path

from cluster.network.addresses import NodeAddress
from cluster.setup.ray_start import ENVIRONMENT, INDEX_VARIABLE, MAX_CPUS_VARIABLE, OPTIONS_VARIABLE, command_line
from tests.cluster.lab.container import CHECKOUT, Container
from tests.cluster.lab.lab import Lab, wired_address
from tests.cluster.lab.supervised import MAX_CPUS

PATIENCE_S = 600.0
"""For a node that starts while other tests have the processors."""

OPTIONS = "--num-cpus=2 --object-store-memory=700000000 --include-log-monitor=false"


class RayLab:
    """Node 0 is the head. ``key`` and ``public`` are a key pair that all containers let in.

    ``network`` is "veth" or a kind of mesh.
    """

    def __init__(self, lab: Lab, key: Path, public: str, workers: int, network: str = "star") -> None:
        self.lab, self.key = lab, key
        self.network = network
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

    def _start_ray(self, index: int) -> None:
        if self.network == "veth":
            wire = ["--node-ip-address=" + wired_address(index)]
            wire += ["--address=" + wired_address(0) + ":6379"] if index else []
            start = f'eval "{shlex.join(command_line(self.address(index), wire))} ${OPTIONS_VARIABLE}"'
        else:
            start = f"{sys.executable} -m cluster.setup.ray_start {'worker' if index else 'head'}"
        self.ssh(index, f"{self.environment(index)} {start}", PATIENCE_S)

    def start_tunnels(self) -> None:
        head = self.nodes[0].home
        rows = [
            {"id": node.name, "index": index, "endpoints": [[node.public_address, node.ssh_port]]}
            for index, node in enumerate(self.nodes)
        ]
        (head / "nodes.json").write_text(json.dumps(rows))
        (head / "key").write_text(self.key.read_text())
        (head / "key").chmod(0o600)
        self.ssh(0, f"cd {CHECKOUT}; {sys.executable} -m tests.cluster.lab.supervised start {self.network}")

    def environment(self, index: int) -> str:
        """Shell commands that a setup command would have put into ~/.bashrc."""
        variables = {
            **ENVIRONMENT,
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(CHECKOUT),
            INDEX_VARIABLE: str(index),
            MAX_CPUS_VARIABLE: str(MAX_CPUS),
            OPTIONS_VARIABLE: f"{OPTIONS} --resources={shlex.quote(json.dumps({f'node{index}': 1}))}",
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
        return NodeAddress(index, MAX_CPUS)

"""A small internet with rented machines in it."""

import logging
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster.lab.container import Container
from tests.cluster.lab.namespaces import PREFIX, inside, lock_folder, namespaces_of, remove_namespace, run

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

LAPTOP = "10.99.0.1"


def wired_address(number: int) -> str:
    """Address on the bridge of `Lab.wire`."""
    return f"10.98.0.{number + 1}"


class Lab:
    """Use as a context manager: whatever happens inside, nothing is left of it."""

    def __init__(self, round_trip_s: float = 0.0) -> None:
        """``round_trip_s``: what the sshd of each machine is away from everybody else."""
        self._round_trip_s = round_trip_s
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.name = self.folder.name
        self.wan = f"{self.name}-wan"
        self.containers: dict[int, Container] = {}
        self._next = 0
        self._guard = threading.Lock()
        lock = lock_folder(self.folder)
        assert lock is not None, "a folder just made is nobody else's"
        self._lock = lock

    def __enter__(self) -> "Lab":
        try:
            run("ip", "netns", "add", self.wan)
            lines = ["link set lo up", "link add bridge0 type bridge", "link set bridge0 up"]
            lines.append(f"addr add {LAPTOP}/16 dev bridge0")
            run("ip", "-n", self.wan, "-batch", "-", input="\n".join(lines))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.close_containers()
        for namespace in namespaces_of(self.name + "-"):
            remove_namespace(namespace)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def close_containers(self) -> None:
        for container in list(self.containers.values()):
            self.remove(container)

    def add(
        self,
        keys: Sequence[str],
        gateway_ports: str = "clientspecified",
        env: Mapping[str, str] | None = None,
        onstart: str | None = None,
    ) -> Container:
        """Start a container that lets in the given public keys; numbers are never used twice in a lab.

        ``env`` is the environment of the container's first process, ``onstart`` shell commands that it runs a moment
        after sshd is up. Without any it is as after ours: its shells run commands.
        """
        with self._guard:
            number = self._next
            self._next += 1
        container = Container(
            *(self.name, self.folder, self.wan, number, keys, gateway_ports, env or {}, onstart, self._round_trip_s)
        )
        self.containers[number] = container
        try:
            container.start()
        except BaseException:
            self.remove(container)
            raise
        return container

    def remove(self, container: Container) -> None:
        container.stop()
        for number in [number for number, other in self.containers.items() if other is container]:
            del self.containers[number]

    def wire(self, containers: Sequence[Container]) -> None:
        """Put containers on one more bridge, where they reach each other without NAT: what rented machines lack."""
        lines = ["link add bridge1 type bridge", "link set bridge1 up"]
        for number, container in enumerate(containers):
            lines.append(f"link add wire{number} type veth peer name eth1 netns {container.namespace}")
            lines.append(f"link set wire{number} master bridge1 up")
        run("ip", "-n", self.wan, "-batch", "-", input="\n".join(lines))
        for number, container in enumerate(containers):
            lines = [f"addr add {wired_address(number)}/24 dev eth1", "link set eth1 up"]
            run("ip", "-n", container.namespace, "-batch", "-", input="\n".join(lines))

    def on_internet(self, action: Callable[[], Result]) -> Result:
        """Run ``action`` as a machine on the internet: sockets it opens belong there."""
        return inside(self.wan, action)

    def command(self, *command: str) -> list[str]:
        """The command line that runs ``command`` on the laptop."""
        return ["ip", "netns", "exec", self.wan, *command]

    def run(self, *command: str, timeout: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the laptop; the caller looks at the exit status."""
        return subprocess.run(self.command(*command), capture_output=True, text=True, timeout=timeout, **options)

    def ssh(self, container: Container, key: Path, command: str, timeout: float = 60) -> str:
        """Run a shell command in a container, through its public address; a failure is an error."""
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes"]
        target = ["-p", str(container.ssh_port), f"root@{container.public_address}"]
        return run(*self.command("ssh", "-q", "-n", "-i", str(key), *options, *target, command), timeout=timeout)

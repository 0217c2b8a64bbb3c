"""cluster.yaml against the imitation: a laptop on the imitated internet, the API, and what it rents."""

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cluster.keeper import end_for_good
from cluster.network.keys import KEY_NAME
from cluster.node_provider import LAUNCHER_FOLDER
from tests.cluster.fake_vast.api import API_KEY, HEAD_KEY, FakeApi
from tests.cluster.fake_vast.server import FakeServer
from tests.cluster.fake_vast.state import FakeInstance, FakeVast
from tests.cluster.lab.container import CHECKOUT, Container
from tests.cluster.lab.lab import LAPTOP, Lab
from tests.cluster.lab.machine import NamespaceMachine
from tests.support.waiting import wait_for

API_PORT = 8080
BOOT_S = 2.0
PATIENCE_S = 600.0
"""For machines that are rented, booted and set up while other tests have the processors."""

STAYS_S = 0.4
"""A creation that fails leaves an instance that is destroyed sooner."""

OBJECT_STORE = 150_000_000
ENVIRONMENT = {
    "PYTHONPATH": "$HOME/bruno-ray",
    "PATH": f"{Path(sys.executable).parent}:$PATH",
    "RAY_AUTH_MODE": "token",
    "BRUNO_RAY_START_OPTIONS": f"--object-store-memory={OBJECT_STORE}",
    "RAY_prestart_worker_first_driver": "0",  # two cores for all nodes together
    "RAY_worker_niceness": "19",  # the job goes on for as long as its tests; the tests beside it have a timeout
}


def derived_config(**changes: Any) -> dict[str, Any]:
    """cluster.yaml with what the imitation needs: nothing is installed, and machines are given back sooner."""
    config = yaml.safe_load((CHECKOUT / "cluster.yaml").read_text())
    exports = " ".join(f'{name}=\\"{value}\\"' for name, value in ENVIRONMENT.items())
    config["setup_commands"] = [
        f'grep -q bruno-ray ~/.bashrc || echo "export {exports}" >> ~/.bashrc'.replace("$", "\\$"),
        "python -m cluster.setup.versions",
    ]
    config["idle_timeout_minutes"] = 0.3
    return merged(config, changes)


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(config)
    for name, value in changes.items():
        result[name] = merged(result[name], value) if isinstance(value, dict) and name in result else value
    return result


RAY_LOGS = "tmp/ray/session_2*/logs"
LOGS = (f"{RAY_LOGS}/monitor.*", f"{RAY_LOGS}/job-driver-*.log", "root/.bruno-ray/mesh/*.log", "tmp/onstart.log")
USUAL = "Dropping the empty legacy field"
"""The autoscaler says this whenever it reads its configuration."""


class RayCluster:
    """A context manager; everything that was rented is gone afterwards."""

    def __init__(self, lab: Lab, folder: Path, **changes: Any) -> None:
        self.lab = lab
        self.home = self.laptop_home(folder / "home")
        """Of the laptop that commands run on."""
        self.config_file = folder / "cluster.yaml"
        self.machines: dict[int, NamespaceMachine] = {}
        self.furnish: Callable[[Container], None] = lambda container: None
        """Called with each machine that boots."""
        self.vast = FakeVast(make_machine=self._machine, boot_s=BOOT_S, listing_lag_s=1.0, destroying_lag_s=1.0)
        self.vast.add_offers(6, gpu_name="RTX 3060", gpu_ram=12288.0, dph_base=0.06)
        self.vast.add_offers(12)
        self.api = FakeApi(self.vast)
        self.config = derived_config(**changes)
        self.config_file.write_text(yaml.safe_dump(self.config))

    def __enter__(self) -> "RayCluster":
        self.server = self.lab.on_internet(lambda: FakeServer(self.api, LAPTOP, API_PORT))
        return self

    def __exit__(self, *exception: object) -> None:
        end_for_good(self.folder / LAUNCHER_FOLDER)
        self.server.close()
        self.vast.close()

    def _machine(self, instance: FakeInstance) -> NamespaceMachine:
        self.machines[instance.id] = NamespaceMachine(self.lab, furnish=lambda container: self.furnish(container))
        return self.machines[instance.id]

    # The laptop.

    @staticmethod
    def laptop_home(home: Path) -> Path:
        """A home folder with the API keys; each is a laptop of its own."""
        keys = home / ".bruno-ray"
        keys.mkdir(parents=True, mode=0o700)
        for name, key in {"vast_api_key": API_KEY, "vast_api_key_head": HEAD_KEY}.items():
            (keys / name).write_text(key)
            (keys / name).chmod(0o600)
        return home

    @property
    def folder(self) -> Path:
        """The cluster's folder on the laptop."""
        return self.home / ".bruno-ray" / "clusters" / self.config["cluster_name"]

    def laptop_environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        return {
            **kept,
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "PYTHONPATH": str(CHECKOUT),  # an editable install may point at another checkout
            "VAST_URL": f"http://{LAPTOP}:{API_PORT}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "auth_token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def laptop(self, *command: str, timeout: float = 300, check: bool = True) -> str:
        """Run a command on the laptop, in the checkout; returns all it printed."""
        result = subprocess.run(
            self.lab.command(*command),
            cwd=CHECKOUT,
            env=self.laptop_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if check and result.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {result.returncode}:\n{result.stdout[-6000:]}")
        return result.stdout

    def start_ray_up(self, home: Path) -> "subprocess.Popen[str]":
        """`ray up` on the laptop with this home, not waited for."""
        environment = self.laptop_environment()
        return subprocess.Popen(
            self.lab.command("ray", "up", "-y", "--no-config-cache", str(self.config_file)),
            cwd=CHECKOUT,
            env={name: value.replace(str(self.home), str(home)) for name, value in environment.items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ray(self, *words: str, timeout: float = 300, check: bool = True) -> str:
        return self.laptop("ray", *words, timeout=timeout, check=check)

    def up(self) -> float:
        """`ray up`; returns the seconds it took."""
        began = time.monotonic()
        self.ray("up", "-y", "--no-config-cache", str(self.config_file))
        return time.monotonic() - began

    def down(self) -> float:
        began = time.monotonic()
        self.ray("down", "-y", str(self.config_file))
        return time.monotonic() - began

    # The nodes.

    def billed(self, kind: str) -> list[FakeInstance]:
        """Instances that cost money and whose label says head or worker."""
        return [row for row in self.vast.billed() if row.label.split(":")[2].startswith(kind[0])]

    def next_worker(self, after: set[int]) -> FakeInstance:
        """A worker's instance that is not among ``after`` and stays, as soon as there is one."""

        def rented() -> list[FakeInstance]:
            workers = [instance for instance in self.billed("worker") if instance.id not in after]
            return [instance for instance in workers if time.time() - instance.created_at > STAYS_S]

        return wait_for(rented, "another instance", PATIENCE_S, self.logs)[0]

    def container(self, instance: FakeInstance) -> Container:
        container = self.machines[instance.id].container
        assert container is not None, f"instance {instance.id} has not booted"
        return container

    def head(self) -> Container:
        (head,) = self.billed("head")
        return self.container(head)

    def shell(self, container: Container, command: str, timeout: float = 120) -> str:
        """What a command prints on a node, in a login shell as that of `ray exec`, without the greeting."""
        wrapped = f"bash --login -i -c {_quoted(f'source ~/.bashrc; exec 1>&3 3>&-; {command}')} 3>&1 >/dev/null 2>&1"
        return self.lab.ssh(container, self.folder / KEY_NAME, wrapped, timeout)

    def driver(self, program: str, timeout: float = 240) -> str:
        """Run a Python program on the head that connects to the cluster; returns what it printed."""
        head = self.head()
        (head.folder / "tmp" / "driver.py").write_text(program)
        return self.shell(head, "python /tmp/driver.py", timeout)

    def logs(self) -> str:
        """The ends of the logs that explain a failure."""
        texts = []
        for container in list(self.lab.containers.values()):
            for pattern in LOGS:
                for path in container.folder.glob(pattern):
                    lines = path.read_text(errors="replace").splitlines()
                    said = "\n".join(line for line in lines if USUAL not in line)
                    texts.append(f"--- {container.name} {path.name}\n{said[-4000:]}")
        return "\n".join(texts)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"

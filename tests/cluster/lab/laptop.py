"""`bruno-ray cluster` as its user calls it, on the laptop of the lab."""

import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from bruno_ray.files import cache_folder
from tests.cluster.lab.container import CHECKOUT, Container
from tests.cluster.lab.ray_cluster import RayCluster

logger = logging.getLogger(__name__)


class Laptop:
    """Commands of `bruno-ray cluster` in the lab, in a folder of their own."""

    def __init__(self, cluster: RayCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.steps: dict[str, float] = {}
        """Seconds that the last command of each name took."""
        self.said: dict[str, str] = {}
        """What it printed."""
        mounts = {remote: str(CHECKOUT / local) for remote, local in cluster.config["file_mounts"].items()}
        cluster.config_file.write_text(yaml.safe_dump({**cluster.config, "file_mounts": mounts}))

    def start(self, *words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cluster.cli", words[0], "--config", str(self.cluster.config_file), *words[1:]]
        environment = {**self.cluster.laptop_environment(), "PYTHONPATH": str(CHECKOUT), "COLUMNS": "200"}
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):  # users need not set anything
            del environment[name]
        return subprocess.Popen(
            self.cluster.lab.command(*command),
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, code: int = 0, timeout: float = 600) -> str:
        began = time.monotonic()
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        self.steps[words[0]] = time.monotonic() - began
        logger.info("%s took %.0f s", words[0], self.steps[words[0]])
        self.said[words[0]] = output
        assert process.returncode == code, f"{words} ended with {process.returncode}:\n{output[-6000:]}"
        return output

    @contextmanager
    def door(self, *words: str) -> Iterator[str]:
        """The address that a command of a tunnel prints; the tunnel is closed by Ctrl-C."""
        process = self.start(*words, "--port", "0")
        lines = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if "Ctrl-C" in line:
                    break
            addresses = re.findall(r"http://127\.0\.0\.1:\d+", "".join(lines))
            assert addresses, f"{words} ended with {process.wait(60)}:\n{''.join(lines)}"
            yield addresses[0]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()

    def ask(self, url: str, token: str = "", **content: Any) -> httpx.Response:
        """A GET, or a POST of ``content``, from the laptop."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        method = "POST" if content else "GET"
        return self.cluster.lab.on_internet(
            lambda: httpx.request(method, url, headers=headers, json=content or None, timeout=120)
        )

    def give_organism(self) -> None:
        """The head alone has it, as if it had trained it; workers must get it from there."""
        copy_organism(self.cluster.head())

    def give_organism_to_workers(self) -> None:
        """Those that are there and those that come have it as well, as they would have a model of the hub."""
        self.cluster.furnish = copy_organism
        for instance in self.cluster.billed("worker"):
            if (container := self.cluster.machines[instance.id].container) is not None:
                copy_organism(container)


def copy_organism(container: Container) -> None:
    target = container.home / ".cache" / "bruno-ray" / "organisms"
    shutil.copytree(cache_folder("organisms"), target, dirs_exist_ok=True)

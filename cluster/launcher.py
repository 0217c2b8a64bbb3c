"""Workers launched from a machine of one's own (`launcher: laptop`): Ray's autoscaler and the API key stay there.

    python -m cluster.launcher start|status|stop|stop-jobs|keep|run|autoscaler --config FILE

The head has no key and rents nothing. Through one ssh connection to it

    - the autoscaler, which runs here, reaches the head's GCS at a port of this machine's loopback interface;
    - the head is told each few seconds which machines there are (cluster/network/told.py). Its supervisor keeps the
      tunnels to those, and shows workers that they have a head only while it is told.

So a worker ends itself when the head is gone and when the launcher is. Machines are reached by ssh from here, as the
head is: files and set-up commands of workers come from this machine.
"""

import argparse
import asyncio
import contextlib
import copy
import dataclasses
import json
import logging
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from bruno_ray.files import write_json, write_text
from bruno_ray.ray_internals import AUTOSCALER
from cluster import keeper
from cluster.clock import SystemClock
from cluster.errors import ClusterError, NodeError
from cluster.jobs.shell import Shell, free_port
from cluster.network.addresses import GCS_PORT, NodeAddress
from cluster.network.keys import KEY_NAME, KNOWN_HOSTS_NAME, host_key_alias
from cluster.network.mesh import Node
from cluster.network.ssh_master import Endpoint, LinkError, SshIdentity, last_line
from cluster.network.told import TAKE, TAKEN, message
from cluster.node_provider import LAUNCHER_CONFIG, LAUNCHER_FOLDER, VastNodeProvider
from cluster.renting.ledger import Ledger
from cluster.settings import ClusterSettings
from cluster.setup.mounts import without_head_files
from cluster.setup.ray_start import ENVIRONMENT

logger = logging.getLogger(__name__)

STEP_S = 3.0
"""Between two words to the head."""
ANSWER_S = 20.0
"""How long the head may take to answer one; login included."""
RESTART_S = 10.0
"""Between two starts of the autoscaler, which ends when it has lost the head for minutes."""
PARENT_S = 0.5
SILENT_S = 60.0
"""A launcher that has reported nothing for so long has ended, with its machine perhaps."""
STOP_JOBS_S = 300.0


class HeadLine:
    """The connection to the head: a port of ours leads to its GCS, and what it is told is taken there.

    ssh ends with this process, because its standard input does.
    """

    def __init__(self, head: str, endpoint: Endpoint, identity: SshIdentity, port: int, log: Path) -> None:
        self.head, self.endpoint = head, endpoint
        self._identity, self._port, self._log = identity, port, log
        self._process: asyncio.subprocess.Process | None = None

    async def tell(self, text: str) -> None:
        """Returns when the head has taken it. Raises `LinkError`, and is of no use afterwards."""
        try:
            await asyncio.wait_for(self._tell(text), ANSWER_S)
        except (OSError, LinkError, asyncio.TimeoutError):
            await self.close()
            raise LinkError(f"{self.endpoint}: {last_line(self._log) or 'the head does not answer'}") from None

    async def _tell(self, text: str) -> None:
        if self._process is None:
            self._process = await self._open()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(text.encode() + b"\n")
        await self._process.stdin.drain()
        while (line := await self._process.stdout.readline()).strip() != TAKEN.encode():
            if not line:
                raise LinkError("ssh ended")

    async def _open(self) -> asyncio.subprocess.Process:
        forward = f"127.0.0.1:{self._port}:{NodeAddress(0).alias}:{GCS_PORT}"
        with open(self._log, "wb") as log:
            return await asyncio.create_subprocess_exec(
                *("ssh", *self._identity.options(host_key_alias(self.head)), "-o", "ExitOnForwardFailure=yes"),
                *("-L", forward, "-p", str(self.endpoint.port), f"{self.endpoint.user}@{self.endpoint.host}", TAKE),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        self._process = None


class Launcher:
    """Tells the head and keeps the autoscaler; ``source`` says which machines there are."""

    def __init__(
        self,
        folder: Path,
        source: Callable[[], Sequence[Node]],
        costs: Callable[[], dict[str, Any]],
        identity: SshIdentity,
        autoscaler: Callable[[int], "subprocess.Popen[bytes]"],
    ) -> None:
        """``autoscaler`` is started with the port that leads to the head's GCS."""
        self._folder = folder
        self._source, self._costs = source, costs
        self._identity = identity
        self._start_autoscaler = autoscaler
        self._port = free_port()
        self._nodes: Sequence[Node] = ()
        self._line: HeadLine | None = None
        self._attempts = 0
        self._autoscaler: subprocess.Popen[bytes] | None = None
        self._autoscaler_since = 0.0
        self._told: float | None = None
        self._error = self._api_error = ""

    async def run(self, parent: int | None = None) -> None:
        """Work until cancelled, or until ``parent`` is no longer the parent process."""
        try:
            while parent is None or os.getppid() == parent:
                await self._step()
                self._write_status()
                await asyncio.sleep(STEP_S)
        finally:
            if self._autoscaler is not None:
                self._autoscaler.kill()
            if self._line is not None:
                await self._line.close()

    async def _step(self) -> None:
        try:
            self._nodes, self._api_error = await asyncio.to_thread(self._source), ""
        except ClusterError as error:  # the head is told what was last known
            self._note(error)
            self._api_error = str(error)
        try:
            await self._tell()
        except NodeError as error:
            self._note(error)
            self._error = str(error)
        else:
            self._told, self._error = time.time(), ""
            self._keep_autoscaler()

    async def _tell(self) -> None:
        """Raises `NodeError`, after which another of the head's addresses is tried."""
        head = next((node for node in self._nodes if node.index == 0 and node.endpoints), None)
        if head is None:
            raise NodeError("there is no head that is up")
        if self._line is not None and self._line.head != head.id:
            await self._line.close()
            self._line = None
        if self._line is None:
            endpoint = head.endpoints[self._attempts % len(head.endpoints)]
            self._line = HeadLine(head.id, endpoint, self._identity, self._port, self._folder / "head.log")
        try:
            await self._line.tell(message(self._nodes, self._costs()))
        except LinkError:
            self._line, self._attempts = None, self._attempts + 1
            raise

    def _keep_autoscaler(self) -> None:
        ended = None if self._autoscaler is None else self._autoscaler.poll()
        if self._autoscaler is not None and ended is None:
            return
        if time.monotonic() < self._autoscaler_since + RESTART_S:
            return
        if ended is not None:
            logger.warning("the autoscaler ended with %d and is started again", ended)
        self._autoscaler_since = time.monotonic()
        self._autoscaler = self._start_autoscaler(self._port)

    def _note(self, error: ClusterError) -> None:
        if str(error) not in (self._error, self._api_error):
            logger.warning("%s", error)

    def _write_status(self) -> None:
        status = {
            "written": time.time(),
            "pid": os.getpid(),
            "child": self._autoscaler.pid if self._autoscaler is not None else None,
            "told": self._told,
            "head": None if self._line is None else [self._line.head, dataclasses.asdict(self._line.endpoint)],
            "error": self._error,
            "api_error": self._api_error,
        }
        write_json(self._folder / keeper.STATUS, status, durable=False)


def configured(config_file: Path) -> Launcher:
    """By the configuration that `start_here` wrote into the launcher's folder."""
    config, folder = yaml.safe_load(config_file.read_text()), config_file.parent
    provider = VastNodeProvider(config["provider"], config["cluster_name"])
    ledger = Ledger(provider.folder, SystemClock())
    identity = SshIdentity(provider.folder / KEY_NAME, provider.folder / KNOWN_HOSTS_NAME)

    def autoscaler(port: int) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, **ENVIRONMENT, "RAY_AUTH_TOKEN_PATH": str(provider.folder / "auth_token")}
        with open(folder / "autoscaler.log", "ab") as log:
            return subprocess.Popen(
                [*program("autoscaler", config_file), "--port", str(port), "--parent", str(os.getpid())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    return Launcher(folder, provider.nodes_for_mesh, ledger.content, identity, autoscaler)


def start_here(config: dict[str, Any], config_file: Path, settings: ClusterSettings, folder: Path) -> None:
    """Launch the workers of a cluster that is up from this machine; ``config`` is cluster.yaml as `ray up` completes
    it, ``folder`` the cluster's. Raises `NodeError`."""
    own = folder / LAUNCHER_FOLDER
    keeper.end_for_good(own)
    own.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = yaml.safe_dump(configuration(config, config_file.resolve().parent, settings), sort_keys=False)
    write_text(own / LAUNCHER_CONFIG, text)
    keeper.start(program("keep", own / LAUNCHER_CONFIG), own)


def configuration(config: dict[str, Any], base: Path, settings: ClusterSettings) -> dict[str, Any]:
    """The launcher's copy: it is told who it is and where the API is; paths mean the same wherever it runs."""
    config = without_head_files(copy.deepcopy(config))
    config["provider"].update(role="launcher", vast_url=settings.vast_url)
    mounts = config["file_mounts"].items()
    config["file_mounts"] = {there: str(base / Path(here).expanduser()) for there, here in mounts}
    return config


def standing(settings: ClusterSettings, folder: Path) -> tuple[str, bool]:
    """Where workers are launched from, and whether that is in order as far as this machine knows."""
    if settings.launcher == "head":
        return "launcher: the head, with the restricted key", True
    status = keeper.read_status(folder / LAUNCHER_FOLDER)
    if not status:
        return "launcher: none on this machine; `bruno-ray cluster up` starts it where it is called", False
    age = time.time() - status["written"]
    if age > SILENT_S:
        return f"launcher: this machine, silent for {age:.0f} s; `bruno-ray cluster up` starts it again", False
    if error := status["error"] or status["api_error"]:
        return f"launcher: this machine, process {status['pid']}: {error}", False
    return f"launcher: this machine, process {status['pid']}; without it workers end themselves", True


def stop_jobs(config_file: Path) -> None:
    """Tell every job on the head to end. Raises `NodeError`."""
    config, head = yaml.safe_load(config_file.read_text()), keeper.read_status(config_file.parent).get("head")
    if head is None:
        raise NodeError("the launcher has no connection to the head: its jobs could not be told to stop")
    folder = ClusterSettings.from_provider(config["provider"]).folder(config["cluster_name"])
    identity = SshIdentity(folder / KEY_NAME, folder / KNOWN_HOSTS_NAME)
    shell = Shell(Endpoint(**head[1]), identity, host_key_alias(head[0]))
    shell.run("python -m cluster.jobs.at_head stop-jobs", timeout_s=STOP_JOBS_S)


def be_autoscaler(config_file: Path, port: int, parent: int) -> None:
    """Be Ray's autoscaler, for as long as the launcher is there."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    logs = config_file.parent / "logs"
    logs.mkdir(exist_ok=True)
    sys.argv = [AUTOSCALER, f"--gcs-address=127.0.0.1:{port}", f"--autoscaling-config={config_file}"]
    sys.argv.append(f"--logs-dir={logs}")
    runpy.run_module(AUTOSCALER, run_name="__main__")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_S)
    os._exit(0)


def program(action: str, config_file: Path) -> list[str]:
    return [sys.executable, "-m", "cluster.launcher", action, "--config", str(config_file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "status", "stop", "stop-jobs", "keep", "run", "autoscaler"])
    parser.add_argument("--config", type=Path, required=True, help="in the launcher's folder, as `up` wrote it")
    parser.add_argument("--parent", type=int, help="process id of whom it ends with")
    parser.add_argument("--port", type=int, help="of this machine, which leads to the head's GCS")
    options = parser.parse_args()
    folder = options.config.parent
    if options.action == "start":
        keeper.start(program("keep", options.config), folder)
    elif options.action == "stop":
        keeper.end_for_good(folder)
    elif options.action == "status":
        sys.stdout.write(json.dumps(keeper.read_status(folder), indent=1) + "\n")
    elif options.action == "stop-jobs":
        stop_jobs(options.config)
    elif options.action == "keep":
        keeper.log_to(folder, "launcher")
        keeper.keep(program("run", options.config), folder)
    elif options.action == "autoscaler":
        be_autoscaler(options.config, options.port, options.parent)
    else:
        keeper.log_to(folder, "launcher")
        asyncio.run(configured(options.config).run(options.parent))
        logger.warning("the keeper is gone; starting another")
        keeper.spawn(program("keep", options.config), folder)


if __name__ == "__main__":
    main()

"""The process on the head that keeps the tunnels, apart from Ray and from whoever started it.

    python -m cluster.supervisor start     a keeper in the background, which runs the supervisor and restarts it
    python -m cluster.supervisor status    what the supervisor last wrote, as JSON
    python -m cluster.supervisor stop      end both and all tunnels

The supervisor asks the Vast.ai API, through the provider's own code, which machines the cluster has. An answer that
cannot be had changes nothing. If the supervisor dies the ssh connections live on and the next one adopts them; if the
keeper dies the supervisor starts another.
"""

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from bruno_ray.files import write_json
from cluster.clock import SystemClock
from cluster.errors import ClusterError, NodeError
from cluster.keeper import STATUS, end, end_tunnels, keep, log_to, read_status, spawn, start
from cluster.network.mesh import Mesh, Node
from cluster.network.ssh_master import SshIdentity
from cluster.network.told import Told, node_of
from cluster.notices.notices import Notices
from cluster.notices.runs import RUNS, RunWatch
from cluster.settings import ClusterSettings

if TYPE_CHECKING:
    from cluster.renting.ledger import Ledger

logger = logging.getLogger(__name__)

FOLDER = Path("~/.bruno-ray/mesh").expanduser()
BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml").expanduser()
"""Where `ray up` puts the cluster's configuration on the head, and where the key pair of the cluster is named."""

ASK_S = 3.0
"""Between two questions; the API itself is asked by one process of the machine (cluster/renting/polling.py)."""
STATUS_S = 1.0
ABSENCES = 2
"""Successive answers that must lack a machine before its tunnel is closed."""

RUNS_S = 10.0
"""Between two looks at the runs."""

Source = Callable[[], Sequence[Node]]
"""Which nodes exist, the head among them. Raises `ClusterError` when that could not be asked."""


class Supervisor:
    """Asks ``source``, keeps ``mesh`` accordingly and writes ``folder/status.json``; besides calls ``looks``."""

    def __init__(self, folder: Path, mesh: Mesh, source: Source, looks: Sequence[Callable[[], None]] = ()) -> None:
        self.folder = folder
        self.mesh = mesh
        self.source = source
        self.looks = looks
        self._nodes: dict[str, Node] = {}
        self._absences: dict[str, int] = {}
        self._asked: float | None = None
        self._answered: float | None = None
        self._api_error = ""

    async def run(self, parent: int | None = None) -> None:
        """Work until cancelled, or until ``parent`` is no longer the parent process."""
        await self._remember()
        asking = asyncio.create_task(self._ask_for_ever())
        looking = asyncio.create_task(self._look_at_runs())
        try:
            while parent is None or os.getppid() == parent:
                if asking.done():
                    asking.result()
                for error in self.mesh.failed():
                    raise error
                self._write_status()
                await asyncio.sleep(STATUS_S)
        finally:
            asking.cancel()
            looking.cancel()
            await self.mesh.detach()

    async def _ask_for_ever(self) -> None:
        while True:
            self._asked = time.time()
            try:
                nodes = await asyncio.to_thread(self.source)
            except ClusterError as error:
                if str(error) != self._api_error:
                    logger.warning("which machines exist could not be asked: %s", error)
                self._api_error = str(error)
            else:
                await self._take(nodes)
            await asyncio.sleep(ASK_S)

    async def _look_at_runs(self) -> None:
        """What goes wrong here must not hold up the tunnels: it is logged, and looking ends."""
        try:
            while self.looks:
                for look in self.looks:
                    await asyncio.to_thread(look)
                await asyncio.sleep(RUNS_S)
        except Exception:
            logger.exception("the runs are no longer looked at")

    async def _take(self, nodes: Sequence[Node]) -> None:
        """Believe an answer, if it knows of this machine."""
        if not any(node.index == 0 for node in nodes):
            self._api_error = "the answer does not contain the head itself and was not believed"
            logger.warning("API: %s", self._api_error)
            return
        self._api_error, self._answered = "", time.time()
        listed = {node.id: node for node in nodes}
        before = [dataclasses.asdict(node) for node in self._nodes.values()]
        for name in list(self._nodes):
            if name in listed:
                self._absences.pop(name, None)
                continue
            self._absences[name] = self._absences.get(name, 0) + 1
            if self._absences[name] >= ABSENCES:
                del self._nodes[name], self._absences[name]
        self._nodes.update(listed)
        rows = [dataclasses.asdict(node) for node in self._nodes.values()]
        if rows != before:
            write_json(self.folder / "nodes.json", rows)
        await self.mesh.update(self._nodes.values())

    async def _remember(self) -> None:
        """Begin with the machines that the last supervisor knew, in case the API cannot be asked now."""
        try:
            rows = json.loads((self.folder / "nodes.json").read_text())
        except FileNotFoundError:
            return
        self._nodes.update({row["id"]: node_of(row) for row in rows})
        await self.mesh.update(self._nodes.values())

    def _write_status(self) -> None:
        status = {
            "written": time.time(),
            "pid": os.getpid(),
            "api": {"asked": self._asked, "answered": self._answered, "error": self._api_error},
            "nodes": {
                name: {"index": link.node.index, **dataclasses.asdict(link.status)}
                for name, link in sorted(self.mesh.links.items())
            },
        }
        write_json(self.folder / STATUS, status, durable=False)  # a slow disk must not hold up the links


def configured(config_file: Path) -> Supervisor:
    """The supervisor by the configuration that `ray up` left on the head: it asks the API as the provider does, or is
    told by a launcher elsewhere."""
    from cluster.renting.ledger import Ledger
    from cluster.renting.run_cost import CostWriter

    config = yaml.safe_load(config_file.read_text())
    settings, name = ClusterSettings.from_provider(config["provider"]), config["cluster_name"]
    ledger = Ledger(settings.folder(name), SystemClock())
    costs: list[Callable[[], None]] = [CostWriter(RUNS, ledger, SystemClock()).look]
    if settings.launcher == "laptop":
        if settings.role == "head":
            settings.api_key_file.unlink(missing_ok=True)  # of a time when workers were launched from here
        told = Told(FOLDER)
        source, is_looked_after = told.nodes, told.is_fresh
        notices = Notices(settings.folder(name), name, settings, SystemClock())
        costs.insert(0, lambda: take_costs(told, ledger))
    else:
        from cluster.node_provider import VastNodeProvider

        provider = VastNodeProvider(config["provider"], name)
        source, notices, is_looked_after = provider.nodes_for_mesh, provider.notices, lambda: True
    identity = SshIdentity(Path(config["auth"]["ssh_private_key"]).expanduser(), FOLDER / "known_hosts")
    mesh = Mesh(FOLDER, identity, settings.max_cpus, settings.mesh, is_looked_after)
    return Supervisor(FOLDER, mesh, source, [*costs, RunWatch(RUNS, notices).look])


def take_costs(told: Told, ledger: "Ledger") -> None:
    """The account that the launcher keeps becomes this machine's, for what runs have cost."""
    try:
        ledger.replace(told.costs())
    except NodeError as error:
        logger.debug("no account of the launcher: %s", error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "status", "stop", "keep", "run"])
    parser.add_argument("--config", type=Path, default=BOOTSTRAP_CONFIG, help="cluster configuration on the head")
    parser.add_argument("--parent", type=int, help="process id of the keeper")
    options = parser.parse_args()
    program = [sys.executable, "-m", "cluster.supervisor"]
    config = ["--config", str(options.config)]
    if options.action == "start":
        start([*program, "keep", *config], FOLDER)
    elif options.action == "stop":
        end(FOLDER)
        end_tunnels(FOLDER)
    elif options.action == "status":
        sys.stdout.write(json.dumps(read_status(FOLDER), indent=1) + "\n")
    elif options.action == "keep":
        log_to(FOLDER)
        keep([*program, "run", *config], FOLDER)
    else:
        log_to(FOLDER)
        asyncio.run(configured(options.config).run(options.parent))
        logger.warning("the keeper is gone; starting another")
        spawn([*program, "keep", *config], FOLDER)


if __name__ == "__main__":
    main()

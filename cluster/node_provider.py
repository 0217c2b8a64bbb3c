"""Ray's node provider for Vast.ai: `provider.module: cluster.node_provider.VastNodeProvider`, `type: external`.

Works under autoscaler v2 (which wraps it) and v1. Up to three processes have a provider: `ray up` or `ray down` on the
laptop, the autoscaler on the head, and the tunnels' supervisor on the head, which only reads. They agree because
everything about a node is written on its instance (cluster/renting/tags.py). The head's autoscaler also checks the
workers (cluster/renting/worker_health.py) and keeps the account of what is gone in its own label.
"""

import copy
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    TAG_RAY_CLUSTER_NAME,
    TAG_RAY_NODE_KIND,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.clock import Clock, SystemClock
from cluster.errors import BudgetError, ClusterError, NodeError, NoOfferError
from cluster.keeper import end_for_good
from cluster.network.addresses import NodeAddress
from cluster.network.keys import ensure_key_pair, public_key
from cluster.network.mesh import Node
from cluster.network.ssh_master import Endpoint
from cluster.notices.notices import Notices
from cluster.renting.budget import Limit, end_of_time
from cluster.renting.cost import ClusterCost
from cluster.renting.drought import Drought
from cluster.renting.head_watch import HeadWatch
from cluster.renting.launch import Launcher, LaunchOrder
from cluster.renting.ledger import Ledger
from cluster.renting.listing import NodeList
from cluster.renting.pausing import Pausing
from cluster.renting.polling import InstanceList
from cluster.renting.registry import NodeRegistry, began
from cluster.renting.tags import ClusterNode, Label
from cluster.settings import ClusterSettings, NodeSettings, checked_cluster_name
from cluster.setup.bootstrap import bootstrapped, one_line_errors
from cluster.setup.command_runner import VastCommandRunner
from cluster.setup.mounts import head_provider, without_head_files
from cluster.vast.client import VastClient
from cluster.vast.errors import VastAuthError, VastCreditError, VastQuotaError, VastRefusedError
from cluster.vast.models import State
from cluster.vast.offers import Ranking, Wanted, find_offers
from cluster.vast.pace import Pace

logger = logging.getLogger(__name__)

FIRST_REFUSAL_S, LONGEST_REFUSAL_S = 30.0, 600.0
"""The autoscaler asks for the same node every few seconds. A refusal stands for a while without asking the market,
longer each time: the account's searches of a day are limited too. It falls at once when its reason may have gone."""

FORGOTTEN_S = 120.0
"""After so long without a question the next refusal is not the same one going on."""

ANY_TYPE = ""
ROUNDING = 1e-6

CREDIT_S = 60.0
"""How long one answer about the account's credit stands."""

LAUNCH_LOCK_S = 180.0
LAUNCHER_FOLDER, LAUNCHER_CONFIG = "launcher", "config.yaml"
"""In the cluster's folder, where workers are launched from this machine (cluster/launcher.py)."""


@dataclass(frozen=True)
class _Refusal:
    """Why nothing is rented, and for how long nobody is asked about it again."""

    error: ClusterError
    until: float
    seconds: float
    room: float
    """Dollars per hour that the budget left at the time."""

    nodes: frozenset[str]
    """What existed at the time."""


class VastNodeProvider(NodeProvider):
    """Every method may be called from any thread. Raises the cluster's errors where Ray has none of its own."""

    def __init__(
        self,
        provider_config: dict[str, Any],
        cluster_name: str,
        *,
        client: VastClient | None = None,
        clock: Clock | None = None,
        stop_jobs: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(provider_config, checked_cluster_name(cluster_name))
        self.settings = ClusterSettings.from_provider(provider_config)
        self.folder: Path = self.settings.folder(cluster_name)
        self._clock = clock or SystemClock()
        self._client = client or self.new_client()
        instances = InstanceList(self._client, self.folder, self._clock, self.settings.refresh_s)
        self._nodes = NodeList(self._client, instances, cluster_name, self._clock, self.settings.refresh_s)
        self._ledger = Ledger(self.folder, self._clock)
        self._launcher = Launcher(self._client, self._nodes, self._ledger, self._clock, self.settings.budget)
        self.notices = Notices(self.folder, cluster_name, self.settings, self._clock)
        self._registry = NodeRegistry(
            *(self._client, self._nodes, self._ledger, self.settings, self._clock),
            *(stop_jobs or partial(stop_all_jobs, self.settings, self.folder), self.notices),
        )
        self._pausing = Pausing(self._client, self._nodes, self._clock)
        self._drought = Drought(self._clock, self.notices)
        self._head_watch = HeadWatch(self.folder, self._clock, self.notices)
        self._launching = threading.RLock()
        self._refusals: dict[str, _Refusal] = {}
        """By node type; those of `ANY_TYPE` are about the account."""
        self._credit: tuple[float, float | None] | None = None
        """When it was asked for, and what was said."""
        self._tearing_down = False
        self._setting_up = FileLock(self.folder / "up.lock")
        """Held by a `ray up` from when it has a head until its process ends."""

    # What exists.

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        nodes = self._registry.current()
        return [name for name in nodes if _matches(self._registry.tags_of(nodes[name]), tag_filters)]

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        """As above, but never from memory: what `ray down` does not see goes on costing money."""
        self._tearing_down = True
        if self.settings.role == "laptop":
            end_for_good(self.folder / LAUNCHER_FOLDER)  # or it would rent others
        nodes = self._registry.current(force=True)
        return [name for name in nodes if _matches(self._registry.tags_of(nodes[name]), tag_filters)]

    def nodes_for_mesh(self) -> list[Node]:
        """Index and addresses of all nodes for the tunnels' supervisor; changes nothing.

        Raises `VastError` where the API could not be asked for longer than an outage is bridged.
        """
        return [
            Node(name, node.label.index, node.instance.ssh_endpoints if node.is_up else ())
            for name, node in self._nodes.nodes().items()
        ]

    def cluster_nodes(self, *, force: bool = False) -> list[ClusterNode]:
        """All nodes with everything that the API says about them, for status displays."""
        return list(self._nodes.nodes(force=force).values())

    def losses(self) -> list[str]:
        """What this computer did not do and somebody should know: that the head is gone, stopped or silent."""
        return self._head_watch.look(self._nodes.nodes().values())

    def offers(self, node_config: dict[str, Any]) -> Ranking:
        """What could be rented now for a node type, and why the rest could not. Raises `VastError`."""
        return find_offers(self._client, Wanted.of(NodeSettings.from_config(node_config)), self._ledger.avoided())

    def cost(self) -> ClusterCost:
        """What the cluster costs per hour and has cost so far."""
        return self._registry.cost(self._registry.current().values())

    def limit(self) -> Limit:
        """How far it is from the end of its money and its time."""
        return self._registry.limit(self._registry.current().values())

    def credit(self) -> float | None:
        """Dollars that the account had left a minute ago; None where the key may not know. Raises `VastError`."""
        if self._credit is None or self._clock.time() >= self._credit[0] + CREDIT_S:
            self._credit = self._clock.time(), self._client.credit()
        return self._credit[1]

    def is_running(self, node_id: str) -> bool:
        node = self._registry.current().get(node_id)
        return node is not None and node.is_up

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._registry.current()

    def is_stopped(self, node_id: str) -> bool:
        """Outbid, or stopped by hand: it exists and is billed for its disk, and nothing runs on it."""
        node = self._registry.current().get(node_id)
        return node is not None and node.instance.state is State.STOPPED

    def external_ip(self, node_id: str) -> str | None:
        endpoints = self.ssh_endpoints(node_id)
        return endpoints[0].host if endpoints else None

    def internal_ip(self, node_id: str) -> str:
        return self.address(node_id).alias

    def address(self, node_id: str) -> NodeAddress:
        """Alias and ports, also of a node that is gone by now."""
        return NodeAddress(self._registry.known(node_id).label.index, self.settings.max_cpus)

    def ssh_endpoints(self, node_id: str) -> tuple[Endpoint, ...]:
        """Where its sshd may answer, best first; empty while it boots and when it is gone."""
        node = self._registry.current().get(node_id)
        return node.instance.ssh_endpoints if node is not None and node.is_up else ()

    def get_node_id(self, ip_address: str, use_internal_ip: bool = False) -> str:
        """Raises `ValueError`, as Ray expects. Machines of one host share an address; the oldest is meant then."""
        for name in self._registry.current():
            if ip_address == (self.internal_ip(name) if use_internal_ip else self.external_ip(name)):
                return name
        raise ValueError(f"no node of cluster {self.cluster_name} has the address {ip_address}")

    # Tags.

    def node_tags(self, node_id: str) -> dict[str, str]:
        """Ray asks for tags of nodes that it listed a moment ago; of one that is gone by now the last are given."""
        try:
            return self._registry.tags_of(self._registry.known(node_id))
        except NodeError:
            return {}

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._registry.set_tags(node_id, tags)

    # Coming and going.

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Rent `count` machines. Those that were rented before an error stay and are listed.

        Raises a `ClusterError` for a head and Ray's `NodeLaunchException` for workers.
        """
        is_head = tags[TAG_RAY_NODE_KIND] == NODE_KIND_HEAD
        created: dict[str, Any] = {}
        try:
            settings = NodeSettings.from_config(node_config)
            for _ in range(count):
                node = self._launch_locked(settings, tags)
                self._drought.over()
                created[node.id] = {}
        except ClusterError as error:
            if is_head:
                raise
            self._drought.refused(error, any(not node.is_head for node in self._registry.current().values()))
            category = type(error).__name__.removesuffix("Error")
            reason = str(error).replace("{", "(").replace("}", ")")  # autoscaler v1 takes it for a format string
            raise NodeLaunchException(category, f"{len(created)} of {count} rented: {reason}", None) from error
        return created

    def terminate_node(self, node_id: str) -> dict[str, Any] | None:
        """Destroy the machine. On the head a failure is tried again in the background, elsewhere it is an error.

        Raises `NodeError` on the laptop when the machine could not be destroyed, and for a head that is not being taken
        down: `ray up` would replace one that was rented with another key or another `node_config`.
        """
        node = self._registry.current().get(node_id)
        if node is None:
            logger.info("node %s is already gone, or not of this cluster", node_id)
            return None
        if node.is_head and self.settings.role != "head" and not self._tearing_down:
            raise NodeError(
                f"head {node_id} was rented by another computer or with another node_config; it is not replaced,"
                " because the runs on it would be lost: undo the change in cluster.yaml, or take the cluster down first"
            )
        if not self._registry.terminate(node) and self.settings.role == "laptop":
            raise NodeError(
                f"instance {node_id} could not be destroyed and costs {node.instance.dph_total:.3f} dollars per hour; "
                "repeat the command, or destroy it in Vast.ai's console"
            )
        if self._tearing_down and node.is_head:
            self._head_watch.forget()
        if self._tearing_down and not self._registry.current():
            self._ledger.forget_costs()
        return None

    def terminate_nodes(self, node_ids: list[str]) -> dict[str, Any] | None:
        """Destroy all of them, and only then complain about the first that could not be."""
        failed: NodeError | None = None
        for node_id in node_ids:
            try:
                self.terminate_node(node_id)
            except NodeError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return None

    def pause(self) -> list[str]:
        """Stop the head's machine, which keeps its disk, and destroy the workers; Ray has been stopped on it before.

        Returns the workers that could not be destroyed yet. Raises `NodeError` without a head, `VastError` where it
        could not be stopped, and then nothing is destroyed.
        """
        nodes = self._nodes.nodes(force=True).values()
        self._pausing.stop(self._one_head(nodes))
        workers = [node for node in nodes if not node.is_head]
        return [node.id for node in workers if not self._registry.terminate(node)]

    def resume(self) -> None:
        """Start the head's machine again. Raises `NodeError` where it does not run, and then it stays stopped."""
        self._pausing.start(self._one_head(self._nodes.nodes(force=True).values()))
        self._nodes.nodes(force=True)

    def _one_head(self, nodes: Iterable[ClusterNode]) -> ClusterNode:
        heads = [node for node in nodes if node.is_head]
        if not heads:
            raise NodeError(f"cluster {self.cluster_name} has no head")
        return heads[0]

    def safe_to_scale(self) -> bool:
        """Autoscaler v1 does nothing while the API cannot be asked."""
        return not self._nodes.is_stale

    # Configuration and commands.

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Called by Ray's command line before anything else; from then on our errors end it with one line."""
        one_line_errors()
        return bootstrapped(cluster_config)

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The head's copy: it is told who it is, where the API is and which key to let in; workers get no API key.

        Ray asks for it when set-up begins. Raises `NodeError` while another `ray up` of this machine is at it.
        """
        try:
            self._setting_up.acquire(timeout=0)
        except Timeout as error:
            raise NodeError("another `ray up` is setting this cluster's head up; wait until it has ended") from error
        config = without_head_files(copy.deepcopy(cluster_config))
        provider = config["provider"]
        provider.pop("_config_cache_path", None)
        provider.update(role="head", vast_url=self.settings.vast_url, public_key=self._public_key())
        provider.update(head_provider(provider))
        return config

    def get_command_runner(
        self,
        log_prefix: str,
        node_id: str,
        auth_config: dict[str, Any],
        cluster_name: str,
        process_runner: ModuleType,
        use_internal_ip: bool,
        docker_config: dict[str, Any] | None = None,
    ) -> CommandRunnerInterface:
        """On a laptop with the key in this home's folder: Ray caches `auth` under the text of cluster.yaml alone."""
        if self.settings.role != "head":
            key = ensure_key_pair(self.folder, self.cluster_name)
            auth_config = {**auth_config, "ssh_private_key": str(key)}
        return VastCommandRunner(
            log_prefix, node_id, self, auth_config, cluster_name, process_runner, use_internal_ip=use_internal_ip
        )

    # Inside.

    def _launch_locked(self, settings: NodeSettings, tags: dict[str, str]) -> ClusterNode:
        """One launch at a time in this process, and on this machine."""
        try:
            with self._launching, FileLock(self.folder / "launch.lock", timeout=LAUNCH_LOCK_S):
                return self._launch(settings, tags)
        except Timeout as error:
            raise NodeError(f"another process has been renting for {LAUNCH_LOCK_S:.0f} s; try again") from error

    def _launch(self, settings: NodeSettings, tags: dict[str, str]) -> ClusterNode:
        is_head = tags[TAG_RAY_NODE_KIND] == NODE_KIND_HEAD
        node_type = tags.get(TAG_RAY_USER_NODE_TYPE, "")
        for refusal in (self._refusals.get(node_type), self._refusals.get(ANY_TYPE)):
            if refusal is not None and self._stands(refusal):
                raise refusal.error
        self._registry.check_launch(is_head)
        label = Label(self.cluster_name, tags[TAG_RAY_NODE_KIND], 0 if is_head else self._registry.free_index())
        order = LaunchOrder(
            settings,
            label,
            {**tags, TAG_RAY_CLUSTER_NAME: self.cluster_name},
            self._public_key(),
            self.settings.vast_url,
            self.settings.dead_mans_switch_s,
            end_of_time(self.settings.budget, began(self._registry.current().values(), self._clock.time())),
        )
        try:
            node = self._launcher.launch(order, self.cost())
        except (BudgetError, NoOfferError, VastRefusedError) as error:
            self._remember_refusal(node_type, error)
            raise
        except (VastQuotaError, VastCreditError, VastAuthError) as error:
            self._remember_refusal(ANY_TYPE, error)
            if isinstance(error, VastCreditError):
                self.notices.tell("credit-low", str(error))
            raise
        self._refusals.pop(node_type, None)
        self._refusals.pop(ANY_TYPE, None)
        if is_head:
            self._registry.own_head = node.id
        return node

    def _stands(self, refusal: _Refusal) -> bool:
        return self._clock.time() < refusal.until and self._has_same_reason(refusal)

    def _has_same_reason(self, refusal: _Refusal) -> bool:
        """What the account refuses is as it was. A machine that was lost or given back leaves room in the budget, and
        must be replaced, which one search is worth, however often others were refused before."""
        if isinstance(refusal.error, VastQuotaError | VastCreditError | VastAuthError):
            return True
        more_room = self._launcher.room(self.cost()) > refusal.room + ROUNDING
        return refusal.nodes <= self._registry.current().keys() and not more_room

    def _remember_refusal(self, node_type: str, error: ClusterError) -> None:
        """Longer each time, and a used-up quota until it is renewed."""
        before, now = self._refusals.get(node_type), self._clock.time()
        goes_on = before is not None and self._has_same_reason(before) and now < before.until + FORGOTTEN_S
        seconds = min(2 * before.seconds, LONGEST_REFUSAL_S) if before is not None and goes_on else FIRST_REFUSAL_S
        until = now + seconds
        if isinstance(error, VastQuotaError):
            until = max(until, error.until)
        nodes = frozenset(self._registry.current())
        self._refusals[node_type] = _Refusal(error, until, seconds, self._launcher.room(self.cost()), nodes)
        kind = f"of type {node_type}" if node_type else "of any type"
        logger.error("no machine for a node %s, asked again in %.0f s: %s", kind, until - self._clock.time(), error)

    def new_client(self) -> VastClient:
        """All processes of this machine that ask with a key keep to the limits together."""
        pace = Pace(self._clock, self.settings.state_folder)
        return VastClient(self.settings.vast_url, self.settings.api_key(), clock=self._clock, pace=pace)

    def _public_key(self) -> str:
        return self.settings.public_key or public_key(ensure_key_pair(self.folder, self.cluster_name))


def stop_all_jobs(settings: ClusterSettings, folder: Path) -> None:
    """On the head, perhaps from a launcher elsewhere: in a process of its own, because Ray waits for each job."""
    command = [sys.executable, "-m", "cluster.jobs.at_head", "stop-jobs"]
    if settings.role == "launcher":
        config = folder / LAUNCHER_FOLDER / LAUNCHER_CONFIG
        command = [sys.executable, "-m", "cluster.launcher", "stop-jobs", "--config", str(config)]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _matches(tags: dict[str, str], wanted: dict[str, str]) -> bool:
    return all(tags.get(tag) == value for tag, value in wanted.items())
